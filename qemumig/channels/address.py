"""Addresses: QEMU's URIs and QMP's MigrationAddress, both into the same small records (channels.md §1).

tcp:HOST:PORT[,to=N][,ipv4[=on|off]][,ipv6[=on|off]][,numeric[=on|off]][,mptcp[=on|off]]
             [,keep-alive[=on|off]][,keep-alive-count=N][,keep-alive-idle=S][,keep-alive-interval=S]
unix:PATH    vsock:CID:PORT    fd:NAME    exec:COMMAND    file:PATH[,offset=SIZE]

A record is only well-formed; whether its host, port or number means anything is found out when it is used, as in QEMU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError

SIZE_SUFFIXES = {"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}
HEX_SIZE = re.compile(r"0[xX]([0-9a-fA-F]{1,32})")
DECIMAL_SIZE = re.compile(r"(?=[0-9.]*[0-9])([0-9]{0,32})(\.[0-9]{0,32})?([bBkKmMgGtTpPeE]?)")


@dataclass(frozen=True)
class InetAddress:
    """A TCP end point; *to* is the last port to try when listening, None for just one.

    *numeric*: no names.  *keep_alive_count*, *_idle* and *_interval* (in seconds) are the kernel's unless given.
    """

    host: str
    port: str
    to: int | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool = False
    numeric: bool = False
    mptcp: bool = False
    keep_alive_count: int | None = None
    keep_alive_idle: int | None = None
    keep_alive_interval: int | None = None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class UnixAddress:
    """A unix socket by its path, or by an *abstract* name: its bytes alone when *tight*, else filled up with zeroes."""

    path: str
    abstract: bool = False
    tight: bool = True

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class VsockAddress:
    """A socket between a host and its guests: context id and port, as text."""

    cid: str
    port: str

    def __str__(self) -> str:
        return f"{self.cid}:{self.port}"


@dataclass(frozen=True)
class FdAddress:
    """A descriptor by the name it was given, or by its number."""

    name: str

    def __str__(self) -> str:
        return f"fd:{self.name}"


@dataclass(frozen=True)
class ExecAddress:
    """A command: program first, no shell added."""

    args: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.args)


@dataclass(frozen=True)
class FileAddress:
    """A file, from *offset* bytes on."""

    path: str
    offset: int = 0

    def __str__(self) -> str:
        return self.path


Address = InetAddress | UnixAddress | VsockAddress | FdAddress | ExecAddress | FileAddress


def parse_uri(uri: str) -> Address:
    """The address that a URI of `migrate` or `-incoming` names; OptionError says what is wrong with it."""
    scheme, colon, rest = uri.partition(":")
    parser = _URI_PARSERS.get(scheme)
    if not colon or parser is None:
        raise OptionError(f"unknown migration protocol: {uri}", name="uri", value=uri)
    return parser(rest)


def parse_size(text: str) -> int:
    """A number of bytes as QEMU writes it: decimal with an optional K … E (× 1024ⁿ) or fraction, or 0x hex.

    Raises ValueError for anything else.
    """
    if match := HEX_SIZE.fullmatch(text):
        return int(match[1], 16)
    match = DECIMAL_SIZE.fullmatch(text)
    if match is None:
        raise ValueError(text)
    digits, fraction, suffix = match.groups()
    unit = 1 << SIZE_SUFFIXES[suffix.upper()]
    return int(digits or 0) * unit + int(float(f"0{fraction or '.0'}0") * unit)


HOST_LIMIT = 64  # characters (channels.md §1.1)
PORT_LIMIT = 32


def _parse_tcp(rest: str) -> Address:
    where, *options = rest.split(",")
    host, colon, port = where.rpartition(":")
    if where.startswith("["):
        host, bracket, port = where[1:].partition("]:")
        if not bracket or not host or not port:
            raise OptionError(f"error parsing IPv6 address '{rest}'", name="uri", value=rest)
    elif not colon or not port or ":" in host:
        raise OptionError(f"error parsing address '{rest}'", name="uri", value=rest)
    if len(host) > HOST_LIMIT or len(port) > PORT_LIMIT:
        raise OptionError(f"error parsing address '{rest}'", name="uri", value=rest)
    return InetAddress(host, port, **_inet_options(options))


def _inet_options(options: Sequence[str]) -> dict[str, Any]:
    """The words behind host and port; those that are given twice count as the last says."""
    values: dict[str, Any] = {}
    for option in filter(None, options):
        key, equals, value = option.partition("=")
        if key in INET_NUMBERS:
            values[key.replace("-", "_")] = _number(key, value)
        elif key not in INET_SWITCHES:
            raise OptionError(f"Invalid parameter '{key}'", name=key, value=value)
        elif equals and value not in ("on", "off"):
            raise OptionError(f"Parameter '{key}' expects 'on' or 'off'", name=key, value=value)
        else:
            values[key.replace("-", "_")] = value != "off"
    return values


INET_SWITCHES = ("ipv4", "ipv6", "numeric", "mptcp", "keep-alive")
INET_NUMBERS = {  # and their greatest values
    "to": 0xFFFF,
    "keep-alive-count": 0xFFFFFFFF,
    "keep-alive-idle": 0xFFFFFFFF,
    "keep-alive-interval": 0xFFFFFFFF,
}
C_TYPES = {0xFFFF: "uint16_t", 0xFFFFFFFF: "uint32_t"}


def _number(key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise OptionError(f"Parameter '{key}' expects a number", name=key, value=text)
    return _in_range(key, int(text[:20]))


def _in_range(key: str, value: int) -> int:
    limit = INET_NUMBERS[key]
    if not 0 <= value <= limit:
        raise OptionError(f"Parameter '{key}' expects {C_TYPES[limit]}", name=key, value=value)
    return value


def _parse_unix(rest: str) -> Address:
    return UnixAddress(_unix_path(rest))


def _unix_path(path: str) -> str:
    if not path:
        raise OptionError("invalid Unix socket address", name="uri", value=path)
    return path


def _parse_vsock(rest: str) -> Address:
    cid, colon, port = rest.partition(":")
    if not colon or not cid or not port:
        raise OptionError(f"error parsing address '{rest}'", name="uri", value=rest)
    return VsockAddress(cid, port)


def _parse_fd(rest: str) -> Address:
    if not rest:
        raise OptionError("invalid file descriptor address", name="uri", value=rest)
    return FdAddress(rest)


def _parse_exec(rest: str) -> Address:
    if not rest:
        raise OptionError("exec: needs a command", name="uri", value=rest)
    return ExecAddress(("/bin/sh", "-c", rest))


def _parse_file(rest: str) -> Address:
    path, marker, size = rest.partition(",offset=")
    try:
        offset = parse_size(size) if marker else 0
    except ValueError:
        raise OptionError(f"file URI has bad offset {size}: Invalid argument", name="uri", value=rest) from None
    if not path or offset >= 1 << 63:
        raise OptionError(f"file URI '{rest}' needs a path and an offset below 2^63", name="uri", value=rest)
    return FileAddress(path, offset)


_URI_PARSERS = {
    "tcp": _parse_tcp,
    "unix": _parse_unix,
    "vsock": _parse_vsock,
    "fd": _parse_fd,
    "exec": _parse_exec,
    "file": _parse_file,
}


def parse_channels(channels: Sequence[Mapping[str, Any]], *, incoming: bool) -> Address:
    """The address of the one `main` entry of a channel list; the list's types have been checked already."""
    kinds = [channel["channel-type"] for channel in channels]
    for kind in kinds:
        if kinds.count(kind) > 1 and not incoming:
            raise OptionError(f"Channel list has more than one {kind} entry", name="channels", value=kind)
    if kinds != ["main"]:
        text = "Channel list must have only one entry, for type 'main'"
        raise OptionError(text, name="channels", value=kinds)
    return parse_migration_address(channels[0]["addr"])


def parse_migration_address(addr: Mapping[str, Any]) -> Address:
    """The address that a MigrationAddress names (channels.md §1.2)."""
    transport = _member(addr, "transport", str)
    if transport == "socket":
        return _parse_socket(addr)
    if transport == "exec":
        args = _member(addr, "args", list)
        if not args or not all(isinstance(arg, str) for arg in args):
            raise OptionError("Parameter 'args' expects a list of strings, program first", name="args", value=args)
        return ExecAddress(tuple(args))
    if transport == "file":
        offset = _member(addr, "offset", int)
        if not 0 <= offset < 1 << 63:
            raise OptionError("Parameter 'offset' expects a size below 2^63", name="offset", value=offset)
        return FileAddress(_member(addr, "filename", str), offset)
    raise OptionError(f"Parameter 'transport' does not accept value '{transport}'", name="transport", value=transport)


def _parse_socket(addr: Mapping[str, Any]) -> Address:
    kind = _member(addr, "type", str)
    if kind == "inet":
        host, port = _member(addr, "host", str), _member(addr, "port", str)
        return InetAddress(host, port, **_inet_members(addr))
    if kind == "unix":
        switches = {key: _member(addr, key, bool) for key in ("abstract", "tight") if key in addr}
        return UnixAddress(_unix_path(_member(addr, "path", str)), **switches)
    if kind == "vsock":
        return VsockAddress(_member(addr, "cid", str), _member(addr, "port", str))
    if kind == "fd":
        return FdAddress(_member(addr, "str", str))
    raise OptionError(f"Parameter 'type' does not accept value '{kind}'", name="type", value=kind)


def _inet_members(addr: Mapping[str, Any]) -> dict[str, Any]:
    """The optional ones, by the names of InetAddress."""
    values: dict[str, Any] = {key: _member(addr, key, bool) for key in INET_SWITCHES if key in addr}
    values |= {key: _in_range(key, _member(addr, key, int)) for key in INET_NUMBERS if key in addr}
    return {key.replace("-", "_"): value for key, value in values.items()}


_QAPI_NAMES = {str: "string", int: "integer", list: "array", bool: "boolean"}


def _member(addr: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in addr:
        raise OptionError(f"Parameter 'channels[0].addr.{name}' is missing", name=name)
    value = addr[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        text = f"Invalid parameter type for 'channels[0].addr.{name}', expected: {_QAPI_NAMES[kind]}"
        raise OptionError(text, name=name, value=value)
    return value
