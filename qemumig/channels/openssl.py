"""The few functions of libssl that TLS channels need, through ctypes, and one object for each thing that must be freed.

    Context      SSL_CTX: certificates, keys, what is accepted of a peer
    Connection   SSL: one handshake over two descriptors, then a TlsSession

The library is the one that Python's own `ssl` module is linked to: whoever can import that has it.  The module itself
knows no pre-shared keys before Python 3.13, and its objects copy every byte through the interpreter.

Threads   a Context may be used by many at once after it is set up; a Connection by one, until its session takes over.
"""

from __future__ import annotations

import ctypes
import os
import select
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

from .session import CUT_OFF, TlsSession

TLS1_2_VERSION = 0x0303
TLS1_3_VERSION = 0x0304
SSL_FILETYPE_PEM = 1
SSL_VERIFY_NONE = 0
SSL_VERIFY_PEER = 1
SSL_VERIFY_FAIL_IF_NO_PEER_CERT = 2
SSL_ERROR_WANT_READ = 2
SSL_ERROR_WANT_WRITE = 3
SSL_ERROR_SYSCALL = 5
SSL_ERROR_ZERO_RETURN = 6
SSL_OP_NO_COMPRESSION = 1 << 17
SSL_OP_NO_RENEGOTIATION = 1 << 30
SSL_CTRL_SET_READ_AHEAD = 41
SSL_CTRL_SET_TLSEXT_HOSTNAME = 55
SSL_CTRL_SET_DH_AUTO = 118
SSL_CTRL_SET_MIN_PROTO_VERSION = 123
SSL_CTRL_SET_MAX_PROTO_VERSION = 124
X509_V_OK = 0
X509_V_FLAG_CRL_CHECK = 0x4
X509_V_FLAG_PARTIAL_CHAIN = 0x80000
X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS = 0x4
# a name as RFC 4514 writes it, but in the order of the certificate and with its own letters, as GnuTLS does
XN_FLAG_SEP_COMMA_PLUS = 1 << 16
ASN1_STRFLGS_ESC_2253 = 1
ASN1_STRFLGS_ESC_CTRL = 2
ASN1_STRFLGS_UTF8_CONVERT = 0x10
ASN1_STRFLGS_DUMP = 0x100 | 0x200
NAME_FORM = (
    XN_FLAG_SEP_COMMA_PLUS | ASN1_STRFLGS_ESC_2253 | ASN1_STRFLGS_ESC_CTRL | ASN1_STRFLGS_UTF8_CONVERT | ASN1_STRFLGS_DUMP
)
READ_BUFFER = 0x11000  # four records and their frames at once
SSL_R_UNEXPECTED_EOF_WHILE_READING = 294
REASON_MASK = 0x7FFFFF

PASSWORD_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
PSK_CLIENT_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_uint, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint
)
PSK_SERVER_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint)

_PTR, _INT, _LONG, _TEXT = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_char_p
_PROTOTYPES: dict[str, tuple[Any, ...]] = {  # name: result, arguments
    "TLS_client_method": (_PTR,),
    "TLS_server_method": (_PTR,),
    "SSL_CTX_new": (_PTR, _PTR),
    "SSL_CTX_free": (None, _PTR),
    "SSL_CTX_ctrl": (_LONG, _PTR, _INT, _LONG, _PTR),
    "SSL_CTX_set_options": (ctypes.c_uint64, _PTR, ctypes.c_uint64),
    "SSL_CTX_set_cipher_list": (_INT, _PTR, _TEXT),
    "SSL_CTX_set_ciphersuites": (_INT, _PTR, _TEXT),
    "SSL_CTX_set_num_tickets": (_INT, _PTR, ctypes.c_size_t),
    "SSL_CTX_set_verify": (None, _PTR, _INT, _PTR),
    "SSL_CTX_set_default_read_buffer_len": (None, _PTR, ctypes.c_size_t),
    "SSL_CTX_set_default_passwd_cb": (None, _PTR, PASSWORD_CALLBACK),
    "SSL_CTX_load_verify_locations": (_INT, _PTR, _TEXT, _TEXT),
    "SSL_CTX_use_certificate_chain_file": (_INT, _PTR, _TEXT),
    "SSL_CTX_use_PrivateKey_file": (_INT, _PTR, _TEXT, _INT),
    "SSL_CTX_check_private_key": (_INT, _PTR),
    "SSL_CTX_get_cert_store": (_PTR, _PTR),
    "SSL_CTX_get0_certificate": (_PTR, _PTR),
    "SSL_CTX_set_client_CA_list": (None, _PTR, _PTR),
    "SSL_CTX_set_psk_client_callback": (None, _PTR, PSK_CLIENT_CALLBACK),
    "SSL_CTX_set_psk_server_callback": (None, _PTR, PSK_SERVER_CALLBACK),
    "SSL_load_client_CA_file": (_PTR, _TEXT),
    "SSL_new": (_PTR, _PTR),
    "SSL_free": (None, _PTR),
    "SSL_ctrl": (_LONG, _PTR, _INT, _LONG, _PTR),
    "SSL_set_rfd": (_INT, _PTR, _INT),
    "SSL_set_wfd": (_INT, _PTR, _INT),
    "SSL_set_connect_state": (None, _PTR),
    "SSL_set_accept_state": (None, _PTR),
    "SSL_do_handshake": (_INT, _PTR),
    "SSL_get_error": (_INT, _PTR, _INT),
    "SSL_get0_param": (_PTR, _PTR),
    "SSL_get_verify_result": (_LONG, _PTR),
    "SSL_read_ex": (_INT, _PTR, _PTR, ctypes.c_size_t, _PTR),
    "SSL_peek_ex": (_INT, _PTR, _PTR, ctypes.c_size_t, _PTR),
    "SSL_write_ex": (_INT, _PTR, _PTR, ctypes.c_size_t, _PTR),
    "SSL_shutdown": (_INT, _PTR),
    "ERR_clear_error": (None,),
    "ERR_get_error": (ctypes.c_ulong,),
    "ERR_peek_error": (ctypes.c_ulong,),
    "ERR_reason_error_string": (_TEXT, ctypes.c_ulong),
    "X509_STORE_set_flags": (_INT, _PTR, ctypes.c_ulong),
    "X509_STORE_CTX_new": (_PTR,),
    "X509_STORE_CTX_free": (None, _PTR),
    "X509_STORE_CTX_init": (_INT, _PTR, _PTR, _PTR, _PTR),
    "X509_STORE_CTX_get_error": (_INT, _PTR),
    "X509_verify_cert": (_INT, _PTR),
    "X509_verify_cert_error_string": (_TEXT, _LONG),
    "X509_VERIFY_PARAM_set1_host": (_INT, _PTR, _TEXT, ctypes.c_size_t),
    "X509_VERIFY_PARAM_set1_ip_asc": (_INT, _PTR, _TEXT),
    "X509_VERIFY_PARAM_set_hostflags": (None, _PTR, ctypes.c_uint),
    "X509_get0_notBefore": (_PTR, _PTR),
    "X509_get0_notAfter": (_PTR, _PTR),
    "X509_cmp_current_time": (_INT, _PTR),
    "X509_check_ca": (_INT, _PTR),
    "X509_free": (None, _PTR),
    "X509_get_subject_name": (_PTR, _PTR),
    "X509_NAME_print_ex": (_INT, _PTR, _PTR, _INT, ctypes.c_ulong),
    "PEM_read_bio_X509": (_PTR, _PTR, _PTR, _PTR, _PTR),
    "BIO_new_mem_buf": (_PTR, _TEXT, _INT),
    "BIO_new": (_PTR, _PTR),
    "BIO_s_mem": (_PTR,),
    "BIO_read": (_INT, _PTR, _PTR, _INT),
    "BIO_free": (_INT, _PTR),
}
SESSION_FUNCTIONS = (
    "SSL_read_ex",
    "SSL_peek_ex",
    "SSL_write_ex",
    "SSL_shutdown",
    "SSL_get_error",
    "ERR_peek_error",
    "ERR_clear_error",
)


class TlsError(Exception):
    """The library refused; the message is the end of a sentence."""


@cache
def library() -> Any:
    """The library with its prototypes, loaded when it is first asked for; TlsError where Python has none."""
    try:
        import _ssl
    except ImportError as error:
        raise TlsError(f"this Python was built without its ssl module ({error}), which TLS needs") from error
    handle = ctypes.CDLL(
        getattr(_ssl, "__file__", None), use_errno=True
    )  # symbols are looked for in what it is linked to, as well
    for name, (result, *arguments) in _PROTOTYPES.items():
        try:
            function = getattr(handle, name)
        except AttributeError as error:
            raise TlsError(f"the TLS library of this Python has no function {name}") from error
        function.restype = result
        function.argtypes = arguments
    return handle


def describe(code: int) -> str:
    """An error code of the library as the end of a sentence."""
    if code & REASON_MASK == SSL_R_UNEXPECTED_EOF_WHILE_READING:
        return CUT_OFF
    text = library().ERR_reason_error_string(code)
    return text.decode() if text else f"error {code:#x} of the TLS library"


def last_error() -> TlsError:
    """What the library noted first; its notes are cleared."""
    code = library().ERR_get_error()
    library().ERR_clear_error()
    return TlsError(describe(code))


def _check(result: Any) -> Any:
    if not result or (isinstance(result, int) and result < 0):
        raise last_error()
    return result


class Certificate:
    """One X.509 certificate, read from PEM text."""

    def __init__(self, pem: bytes) -> None:
        ssl = library()
        ssl.ERR_clear_error()
        memory = _check(ssl.BIO_new_mem_buf(pem, len(pem)))
        try:
            self.pointer = _check(ssl.PEM_read_bio_X509(memory, None, None, None))
        finally:
            ssl.BIO_free(memory)
        weakref.finalize(self, ssl.X509_free, self.pointer)

    def has_expired(self) -> bool:
        ssl = library()
        return bool(ssl.X509_cmp_current_time(ssl.X509_get0_notAfter(self.pointer)) < 0)

    def is_not_yet_active(self) -> bool:
        ssl = library()
        return bool(ssl.X509_cmp_current_time(ssl.X509_get0_notBefore(self.pointer)) > 0)

    def is_authority(self) -> bool:
        """Whether its basic constraints let it sign others."""
        return bool(library().X509_check_ca(self.pointer))


class Context:
    """Everything that connections of one credentials object have in common."""

    def __init__(self, *, server: bool) -> None:
        ssl = library()
        ssl.ERR_clear_error()
        method = ssl.TLS_server_method() if server else ssl.TLS_client_method()
        self.server = server
        self.pointer = _check(ssl.SSL_CTX_new(method))
        weakref.finalize(self, ssl.SSL_CTX_free, self.pointer)
        self.identities: dict[int, str] = {}  # of the clients that came with a key, by connection
        self._callbacks: list[Any] = []  # the library calls them as long as a connection lives
        self.set_versions(TLS1_2_VERSION, TLS1_3_VERSION)
        ssl.SSL_CTX_set_options(self.pointer, SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION)
        ssl.SSL_CTX_ctrl(self.pointer, SSL_CTRL_SET_READ_AHEAD, 1, None)
        ssl.SSL_CTX_set_default_read_buffer_len(self.pointer, READ_BUFFER)
        if server:
            ssl.SSL_CTX_ctrl(self.pointer, SSL_CTRL_SET_DH_AUTO, 1, None)
            ssl.SSL_CTX_set_num_tickets(self.pointer, 0)  # a source that never reads would close over them: a reset

    def set_versions(self, lowest: int, highest: int) -> None:
        """The protocol versions to speak."""
        for control, version in ((SSL_CTRL_SET_MIN_PROTO_VERSION, lowest), (SSL_CTRL_SET_MAX_PROTO_VERSION, highest)):
            _check(library().SSL_CTX_ctrl(self.pointer, control, version, None))

    def set_ciphers(self, tls12: str, tls13: str = "") -> None:
        """The cipher suites up to TLS 1.2, and of TLS 1.3 where they are not the default ones."""
        _check(library().SSL_CTX_set_cipher_list(self.pointer, tls12.encode()))
        if tls13:
            _check(library().SSL_CTX_set_ciphersuites(self.pointer, tls13.encode()))

    # ---- certificates ----

    def trust(self, path: str) -> None:
        """Trust the authorities in the PEM file *path*; a server names them to its clients."""
        ssl = library()
        name = os.fsencode(path)
        _check(ssl.SSL_CTX_load_verify_locations(self.pointer, name, None))
        ssl.X509_STORE_set_flags(ssl.SSL_CTX_get_cert_store(self.pointer), X509_V_FLAG_PARTIAL_CHAIN)
        if self.server:
            ssl.SSL_CTX_set_client_CA_list(self.pointer, _check(ssl.SSL_load_client_CA_file(name)))

    def distrust(self, path: str) -> None:
        """Refuse what the revocation list in the PEM file *path* names."""
        ssl = library()
        _check(ssl.SSL_CTX_load_verify_locations(self.pointer, os.fsencode(path), None))
        ssl.X509_STORE_set_flags(ssl.SSL_CTX_get_cert_store(self.pointer), X509_V_FLAG_CRL_CHECK)

    def use_certificate(self, path: str) -> None:
        """Show the certificate of the PEM file *path*, and the chain behind it."""
        _check(library().SSL_CTX_use_certificate_chain_file(self.pointer, os.fsencode(path)))

    def use_key(self, path: str, password: bytes) -> None:
        """The private key to the certificate; *password* is tried when it is encrypted."""
        ssl = library()
        callback = _password_callback(password)
        ssl.SSL_CTX_set_default_passwd_cb(self.pointer, callback)
        self._callbacks.append(callback)
        _check(ssl.SSL_CTX_use_PrivateKey_file(self.pointer, os.fsencode(path), SSL_FILETYPE_PEM))
        _check(ssl.SSL_CTX_check_private_key(self.pointer))

    def check_own_certificate(self) -> str:
        """Why a peer that trusts the same authorities would not trust this side's certificate; "" when it would."""
        ssl = library()
        check = _check(ssl.X509_STORE_CTX_new())
        try:
            store, own = ssl.SSL_CTX_get_cert_store(self.pointer), ssl.SSL_CTX_get0_certificate(self.pointer)
            _check(ssl.X509_STORE_CTX_init(check, store, own, None))
            if ssl.X509_verify_cert(check) == 1:
                return ""
            return verification_text(ssl.X509_STORE_CTX_get_error(check))
        finally:
            ssl.X509_STORE_CTX_free(check)

    def verify_peers(self, wanted: bool) -> None:
        """Whether a peer must show a certificate that a trusted authority has signed."""
        mode = SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT if wanted else SSL_VERIFY_NONE
        library().SSL_CTX_set_verify(self.pointer, mode, None)

    # ---- pre-shared keys ----

    def use_psk(self, identity: str, key: bytes) -> None:
        """As a client, show *identity* and prove to have *key*."""
        callback = _psk_client_callback(identity.encode(), key)
        self._callbacks.append(callback)
        library().SSL_CTX_set_psk_client_callback(self.pointer, callback)

    def ask_psk(self, find_key: Callable[[str], bytes | None]) -> None:
        """As a server, ask *find_key* for the key of the identity that a client shows."""
        callback = _psk_server_callback(find_key, self.identities)
        self._callbacks.append(callback)
        library().SSL_CTX_set_psk_server_callback(self.pointer, callback)


# Each callback is made where it sees no Context: a cycle through the library's pointer would never be collected.


def _password_callback(password: bytes) -> Any:
    def callback(buffer: int, size: int, writing: int, data: int) -> int:
        if len(password) > size:
            return 0
        ctypes.memmove(buffer, password, len(password))
        return len(password)

    return PASSWORD_CALLBACK(callback)


def _psk_client_callback(identity: bytes, key: bytes) -> Any:
    def callback(_ssl: int, _hint: bytes, name: int, name_size: int, target: int, target_size: int) -> int:
        if len(identity) + 1 > name_size or len(key) > target_size:
            return 0
        ctypes.memmove(name, identity + b"\0", len(identity) + 1)
        ctypes.memmove(target, key, len(key))
        return len(key)

    return PSK_CLIENT_CALLBACK(callback)


def _psk_server_callback(find_key: Callable[[str], bytes | None], identities: dict[int, str]) -> Any:
    def callback(connection: int, identity: bytes | None, target: int, target_size: int) -> int:
        name = (identity or b"").decode("utf-8", "replace")
        key = find_key(name)
        if key is None or len(key) > target_size:
            return 0
        identities[connection] = name  # proved when the handshake succeeds
        ctypes.memmove(target, key, len(key))
        return len(key)

    return PSK_SERVER_CALLBACK(callback)


class Connection:
    """One handshake over *read_fd* and *write_fd*, which are non-blocking."""

    def __init__(self, context: Context, read_fd: int, write_fd: int) -> None:
        ssl = library()
        ssl.ERR_clear_error()
        self.context = context  # its callbacks must outlive this
        self.pointer = _check(ssl.SSL_new(context.pointer))
        weakref.finalize(self, _free_connection, self.pointer, context.identities)
        _check(ssl.SSL_set_rfd(self.pointer, read_fd))
        _check(ssl.SSL_set_wfd(self.pointer, write_fd))
        (ssl.SSL_set_accept_state if context.server else ssl.SSL_set_connect_state)(self.pointer)
        self.expected_name = ""
        self._fds = (read_fd, write_fd)

    def expect_name(self, name: str, *, is_address: bool) -> None:
        """Accept only a certificate for *name*; a host name is told to the server, too."""
        ssl = library()
        self.expected_name = name
        parameters = ssl.SSL_get0_param(self.pointer)
        try:
            text = name.encode("ascii" if name.isascii() else "idna")
        except UnicodeError as error:
            raise TlsError(f"the host name '{name}' cannot be in a certificate: {error}") from error
        if is_address:
            _check(ssl.X509_VERIFY_PARAM_set1_ip_asc(parameters, text))
            return
        ssl.X509_VERIFY_PARAM_set_hostflags(parameters, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS)
        _check(ssl.X509_VERIFY_PARAM_set1_host(parameters, text, len(text)))
        _check(
            ssl.SSL_ctrl(self.pointer, SSL_CTRL_SET_TLSEXT_HOSTNAME, 0, ctypes.cast(ctypes.c_char_p(text), ctypes.c_void_p))
        )

    def advance(self) -> int:
        """Go on with the handshake: 0 when it is done, POLLIN or POLLOUT when that has to be waited for.

        Raises TlsError when it fails.
        """
        ssl = library()
        ssl.ERR_clear_error()
        ctypes.set_errno(0)
        result = ssl.SSL_do_handshake(self.pointer)
        if result == 1:
            return 0
        kind = ssl.SSL_get_error(self.pointer, result)
        if kind == SSL_ERROR_WANT_READ:
            return select.POLLIN
        if kind == SSL_ERROR_WANT_WRITE:
            return select.POLLOUT
        if kind == SSL_ERROR_ZERO_RETURN:
            raise TlsError("the peer ended the connection")
        if kind == SSL_ERROR_SYSCALL:
            number = ctypes.get_errno()
            raise TlsError(os.strerror(number) if number else CUT_OFF)
        raise last_error()

    def verification(self) -> int:
        """What the check of the peer's certificate came to; X509_V_OK also when there was none to check."""
        return int(library().SSL_get_verify_result(self.pointer))

    def peer_name(self) -> str | None:
        """The distinguished name in the peer's certificate; None when it showed none."""
        ssl = library()
        certificate = _peer_certificate(self.pointer)
        if certificate is None:
            return None
        memory = _check(ssl.BIO_new(ssl.BIO_s_mem()))
        try:
            _check(ssl.X509_NAME_print_ex(memory, ssl.X509_get_subject_name(certificate), 0, NAME_FORM) >= 0)
            return _read_all(memory).decode("utf-8", "backslashreplace")
        finally:
            ssl.BIO_free(memory)
            ssl.X509_free(certificate)

    def psk_identity(self) -> str | None:
        """The user name that the peer has proved with a pre-shared key; None when there was none."""
        return self.context.identities.get(self.pointer)

    def session(self, quit_fd: int) -> TlsSession:
        """The connection as a carrier, after the handshake."""
        ssl = library()
        functions = {name: _address(getattr(ssl, name)) for name in SESSION_FUNCTIONS}
        return TlsSession(self, self.pointer, functions, describe, *self._fds, quit_fd)


def _free_connection(pointer: int, identities: dict[int, str]) -> None:
    identities.pop(pointer, None)
    library().SSL_free(pointer)


def _address(function: Any) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


def _peer_certificate(connection: int) -> int | None:
    """A reference of our own to the peer's certificate; its function has two names."""
    ssl = library()
    function = getattr(ssl, "SSL_get1_peer_certificate", None) or ssl.SSL_get_peer_certificate
    function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    pointer: int | None = function(connection)
    return pointer


def _read_all(memory: int) -> bytes:
    piece = ctypes.create_string_buffer(4096)
    data = b""
    while (length := library().BIO_read(memory, piece, len(piece))) > 0:
        data += piece.raw[:length]
    return data


UNKNOWN_ISSUER = (2, 18, 19, 20, 21, 27)  # X509_V_ERR_… for every way to lack a trusted authority
VERIFICATION = dict.fromkeys(UNKNOWN_ISSUER, "The certificate hasn't got a known issuer") | {
    9: "The certificate is not yet activated",
    10: "The certificate has expired",
    23: "The certificate has been revoked",
}
NAME_MISMATCH = (62, 64)  # of a host name, of an address


def verification_text(number: int) -> str:
    """Why a certificate was not accepted: in QEMU's words where it has any, else in the library's."""
    return VERIFICATION.get(number) or library().X509_verify_cert_error_string(number).decode()
