"""TLS credentials: the objects that parameter `tls-creds` names (channels.md §3).

    tls-creds-x509   DIR/ca-cert.pem  [ca-crl.pem]  server-cert.pem server-key.pem | client-cert.pem client-key.pem
    tls-creds-psk    DIR/keys.psk     lines of `user name:key in hexadecimal`
    tls-creds-anon   nothing: enciphered, but nobody knows for whom

Everything is read when the object is made, so that a mistake shows itself then; a server reads its keys again for each
client, so that a new user needs no new object.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from ..errors import OptionError
from .openssl import TLS1_2_VERSION, TLS1_3_VERSION, Certificate, Context, TlsError

CLIENT, SERVER = "client", "server"
ENDPOINTS = (CLIENT, SERVER)
DEFAULT_USER = "qemu"
PEM_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
CERTIFICATE_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:DHE+CHACHA20:!aNULL:!PSK"
PSK_CIPHERS = "kECDHEPSK+CHACHA20:kDHEPSK+AESGCM:kDHEPSK+CHACHA20:kECDHEPSK+AES"
PSK_SUITES = "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256"  # a key of this kind goes with SHA-256
ANONYMOUS_CIPHERS = "AECDH+AES:ADH+AESGCM:@SECLEVEL=0"  # not strong enough for any level: nobody is who they say


class Credentials:
    """What every kind has: *endpoint* is the side it is for, *context* what its connections have in common."""

    has_certificate = False

    def __init__(self, endpoint: str, verify_peer: bool, priority: str) -> None:
        self.endpoint = endpoint
        self.verify_peer = verify_peer
        self.context = Context(server=endpoint == SERVER)
        self.context.set_versions(*versions(priority))


class X509Credentials(Credentials):
    """Certificates; a server with *verify_peer* demands one of its clients, a client without it takes any."""

    has_certificate = True

    def __init__(
        self, directory: str, endpoint: str, verify_peer: bool, priority: str, sanity_check: bool, password: bytes
    ) -> None:
        super().__init__(endpoint, verify_peer, priority)
        self._directory = directory
        self._sanity_check = sanity_check
        authorities = self._path("ca-cert.pem")
        own, key = self._path(f"{endpoint}-cert.pem"), self._path(f"{endpoint}-key.pem")
        self._trust(authorities)
        if endpoint == SERVER or os.path.exists(own) or os.path.exists(key):
            self._show(own, key, password, authorities)
        self.context.set_ciphers(CERTIFICATE_CIPHERS)
        self.context.verify_peers(verify_peer)

    def _path(self, name: str) -> str:
        return f"{self._directory}/{name}"

    def _trust(self, path: str) -> None:
        for certificate in self._certificates(path, f"Unable to import CA certificate list {path}"):
            if self._sanity_check:
                self._check_dates(certificate, f"The CA certificate {path}")
                if not certificate.is_authority():
                    raise OptionError(f"The certificate {path} basic constraints do not show a CA", name="dir")
        try:
            self.context.trust(path)
            revocations = self._path("ca-crl.pem")
            if os.path.exists(revocations):
                self.context.distrust(revocations)
        except TlsError as error:
            raise OptionError(f"Unable to import the CA certificates and CRL in {self._directory}: {error}") from error

    def _show(self, own: str, key: str, password: bytes, authorities: str) -> None:
        problem = f"Unable to import {self.endpoint} certificate {own}"
        certificates = list(self._certificates(own, problem))
        read_file(key)
        if self._sanity_check:
            self._check_dates(certificates[0], f"The {self.endpoint} certificate {own}")
        try:
            self.context.use_certificate(own)
            self.context.use_key(key, password)
        except TlsError as error:
            raise OptionError(f"Cannot load certificate '{own}' & key '{key}': {error}", name="dir") from error
        reason = self.context.check_own_certificate() if self._sanity_check else ""
        if reason:
            text = f"Our own certificate {own} failed validation against {authorities}: {reason}"
            raise OptionError(text, name="dir", value=self._directory)

    def _certificates(self, path: str, problem: str) -> Iterator[Certificate]:
        """Those in the file *path*, at least one."""
        pems = PEM_CERTIFICATE.findall(read_file(path))
        if not pems:
            raise OptionError(f"{problem}: there is no certificate in it", name="dir", value=self._directory)
        try:
            for pem in pems:
                yield Certificate(pem)
        except TlsError as error:
            raise OptionError(f"{problem}: {error}", name="dir", value=self._directory) from error

    def _check_dates(self, certificate: Certificate, what: str) -> None:
        if certificate.has_expired():
            raise OptionError(f"{what} has expired", name="dir", value=self._directory)
        if certificate.is_not_yet_active():
            raise OptionError(f"{what} is not yet active", name="dir", value=self._directory)


class PskCredentials(Credentials):
    """Keys that both sides have; a client is one *user*, a server knows all in its file."""

    def __init__(self, directory: str, endpoint: str, verify_peer: bool, priority: str, user: str) -> None:
        super().__init__(endpoint, verify_peer, priority)
        self._path = f"{directory}/keys.psk"
        read_file(self._path)
        self.context.set_ciphers(PSK_CIPHERS, PSK_SUITES)
        if endpoint == CLIENT:
            self.context.use_psk(user, self._own_key(user))
        else:
            self.context.ask_psk(self._find_key)

    def _own_key(self, user: str) -> bytes:
        key = self._keys().get(user)
        if key is None:
            raise OptionError(f"Username {user} not found in PSK file {self._path}", name="username", value=user)
        return key

    def _find_key(self, user: str) -> bytes | None:
        try:
            return self._keys().get(user)
        except OptionError:
            return None  # the file is broken now: nobody is known

    def _keys(self) -> dict[str, bytes]:
        """Every user's key; OptionError names the line that holds none."""
        found = {}
        for number, line in enumerate(read_file(self._path).decode("utf-8", "replace").splitlines(), start=1):
            user, colon, digits = line.strip().partition(":")
            if not user or user.startswith("#"):
                continue
            try:
                key = bytes.fromhex(digits) if colon else b""
            except ValueError:
                key = b""
            if not key:
                text = f"PSK file {self._path}, line {number}: found no key in hexadecimal, expected 'user:key'"
                raise OptionError(text, name="dir", value=self._path)
            found[user] = key
        return found


class AnonymousCredentials(Credentials):
    """No proof of anything, TLS 1.2 at most, which is the last that has it.

    As a client it may find no cipher in common with a recent GnuTLS (seen with QEMU 11.1): that one wants groups for
    Diffie-Hellman named as RFC 7919 does, which the library names in TLS 1.3 only.
    """

    def __init__(self, endpoint: str, priority: str) -> None:
        super().__init__(endpoint, False, priority)
        self.context.set_versions(TLS1_2_VERSION, TLS1_2_VERSION)
        self.context.set_ciphers(ANONYMOUS_CIPHERS)
        self.context.verify_peers(False)


def read_file(path: str) -> bytes:
    """A file of credentials; OptionError in QEMU's words when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        text = f"Unable to access credentials {path}: {os.strerror(error.errno or 0)}"
        raise OptionError(text, name="dir", value=path) from error


BASES = ("", "NORMAL", "SYSTEM", "@SYSTEM", "@QEMU,SYSTEM")
VERSIONS = {"TLS1.2": TLS1_2_VERSION, "TLS1.3": TLS1_3_VERSION}


def versions(priority: str) -> tuple[int, int]:
    """The lowest and highest protocol version that a GnuTLS priority string leaves.

    Only what chooses versions has a counterpart here; OptionError names the first element that has none.
    """
    base, *changes = priority.split(":")
    chosen = set(VERSIONS.values())
    known = base in BASES
    for change in changes:
        sign, what = change[:1], change[1:].removeprefix("VERS-")
        if not known or sign not in ("+", "-") or not change[1:].startswith("VERS-"):
            known = False
        elif sign == "-" and what in ("ALL", "TLS-ALL"):
            chosen.clear()
        elif what in VERSIONS:
            (chosen.add if sign == "+" else chosen.discard)(VERSIONS[what])
        elif sign == "+":
            known = False
    if not known or not chosen:
        raise OptionError(
            f"Unable to set TLS session priority {priority}: "
            f"expected NORMAL, followed by :-VERS-… and :+VERS-… that leave TLS1.2 or TLS1.3",
            name="priority",
            value=priority,
        )
    return min(chosen), max(chosen)
