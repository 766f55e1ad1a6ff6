"""The objects that channels use, made from what `-object` and `object-add` say (cli.md §4, qmp.md §14).

    tls-creds-x509  tls-creds-psk  tls-creds-anon      credentials.py
    authz-simple    authz-list     authz-listfile      authz.py
    secret                                             a password, for the key of a certificate

Who keeps the objects is no business of this room: it is handed a function that finds one by its id.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from . import authz, credentials

REQUIRED = object()
FindObject = Callable[[str], Any]
"""The object of that id, of whatever kind, or None."""


@dataclass(frozen=True)
class Property:
    """One property: *kind* is "string", "switch", "list" or the tuple of words it takes."""

    name: str
    kind: str | tuple[str, ...]
    default: Any = None

    @property
    def is_required(self) -> bool:
        return self.default is REQUIRED

    def checked(self, value: Any) -> Any:
        """*value* as JSON or a command line gives it, as the property's type; OptionError when it is none."""
        if self.kind == "switch":
            return self._switch(value)
        if self.kind == "list":
            return value
        if not isinstance(value, str):
            text = f"Invalid parameter type for '{self.name}', expected: string"
            raise OptionError(text, name=self.name, value=value)
        if isinstance(self.kind, tuple) and value not in self.kind:
            raise OptionError(f"Parameter '{self.name}' does not accept value '{value}'", name=self.name, value=value)
        return value

    def _switch(self, value: Any) -> bool:
        if isinstance(value, bool):
            return value
        if value in ("on", "yes", "true", "y"):
            return True
        if value in ("off", "no", "false", "n"):
            return False
        raise OptionError(f"Parameter '{self.name}' expects 'on' or 'off'", name=self.name, value=value)


@dataclass(frozen=True)
class Secret:
    """secret: a password, as bytes."""

    data: bytes


def _make_secret(values: dict[str, Any], find: FindObject) -> Secret:
    if (values["data"] is None) == (values["file"] is None):
        raise OptionError("Provide either 'data' or 'file', not both or neither", name="data")
    if values["keyid"] is not None:
        raise OptionError("a secret that is enciphered with another one ('keyid') is not built", name="keyid")
    data = values["data"].encode() if values["data"] is not None else _read_secret(values["file"])
    if values["format"] == "base64":
        try:
            data = base64.b64decode(data, validate=True)
        except binascii.Error as error:
            raise OptionError(f"the secret is not base64: {error}", name="data") from error
    return Secret(data)


def _read_secret(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise OptionError(f"Unable to read {path}: {os.strerror(error.errno or 0)}", name="file", value=path) from error


def _make_x509(values: dict[str, Any], find: FindObject) -> credentials.X509Credentials:
    password = b""
    if values["passwordid"] is not None:
        secret = find(values["passwordid"])
        if not isinstance(secret, Secret):
            text = f"No secret with id '{values['passwordid']}'"
            raise OptionError(text, name="passwordid", value=values["passwordid"])
        password = secret.data
    return credentials.X509Credentials(
        _directory(values), values["endpoint"], values["verify-peer"], values["priority"], values["sanity-check"], password
    )


def _make_psk(values: dict[str, Any], find: FindObject) -> credentials.PskCredentials:
    if values["endpoint"] == credentials.SERVER and values["username"] is not None:
        raise OptionError("username should not be set when endpoint=server", name="username", value=values["username"])
    user = values["username"] or credentials.DEFAULT_USER
    return credentials.PskCredentials(
        _directory(values), values["endpoint"], values["verify-peer"], values["priority"], user
    )


def _directory(values: dict[str, Any]) -> str:
    if not values["dir"]:
        raise OptionError("Missing 'dir' property value", name="dir")
    return str(values["dir"])


_CREDENTIALS = (
    Property("endpoint", credentials.ENDPOINTS, credentials.CLIENT),
    Property("dir", "string"),
    Property("verify-peer", "switch", True),
    Property("priority", "string", "NORMAL"),
)

Factory = Callable[[dict[str, Any], FindObject], Any]
TYPES: Mapping[str, tuple[tuple[Property, ...], Factory]] = {
    "authz-list": (
        (Property("policy", authz.POLICIES, "deny"), Property("rules", "list", ())),
        lambda values, find: authz.make_list(values["rules"], values["policy"]),
    ),
    "authz-listfile": (
        (Property("filename", "string", REQUIRED), Property("refresh", "switch", True)),
        lambda values, find: authz.FileAuthorizer(values["filename"], values["refresh"]),
    ),
    "authz-simple": (
        (Property("identity", "string", REQUIRED),),
        lambda values, find: authz.SimpleAuthorizer(values["identity"]),
    ),
    "secret": (
        (
            Property("data", "string"),
            Property("file", "string"),
            Property("format", ("raw", "base64"), "raw"),
            Property("iv", "string"),
            Property("keyid", "string"),
        ),
        _make_secret,
    ),
    "tls-creds-anon": (
        _CREDENTIALS,
        lambda values, find: credentials.AnonymousCredentials(values["endpoint"], values["priority"]),
    ),
    "tls-creds-psk": ((*_CREDENTIALS, Property("username", "string")), _make_psk),
    "tls-creds-x509": (
        (*_CREDENTIALS, Property("passwordid", "string"), Property("sanity-check", "switch", True)),
        _make_x509,
    ),
}


def create_object(qom_type: str, object_id: str, properties: Mapping[str, Any], find: FindObject) -> Any:
    """The object of type *qom_type* (a key of TYPES) with these *properties*, as JSON values or a command line's text.

    *find* gives the objects that exist already.  Raises OptionError when a property or what it points to is wrong.
    """
    if qom_type not in TYPES:
        raise OptionError(f"Parameter 'qom-type' does not accept value '{qom_type}'", name="qom-type", value=qom_type)
    known, factory = TYPES[qom_type]
    by_name = {entry.name: entry for entry in known}
    for name in properties:
        if name not in by_name:
            raise OptionError(f"Invalid parameter '{name}'", name=name, value=properties[name])
    values: dict[str, Any] = {}
    for entry in known:
        if entry.name in properties:
            values[entry.name] = entry.checked(properties[entry.name])
        elif entry.is_required:
            raise OptionError(f"Parameter '{entry.name}' is missing", name=entry.name)
        else:
            values[entry.name] = entry.default
    try:
        return factory(values, find)
    except credentials.TlsError as error:
        raise OptionError(f"object '{object_id}' cannot be made: {error}", name="id", value=object_id) from error
