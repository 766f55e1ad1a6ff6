"""Addresses: QEMU's URIs and QMP's MigrationAddress, both into the same small records (channels.md §1).

tcp:HOST:PORT[,to=N][,ipv4[=on|off]][,ipv6[=on|off]][,keep-alive[=on|off]]
unix:PATH      fd:NAME      exec:COMMAND      file:PATH[,offset=SIZE]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError

SIZE_SUFFIXES = {"K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}


@dataclass(frozen=True)
class InetAddress:
    """A TCP end point; *to* is the last port to try when listening, None for just one."""

    host: str
    port: str
    to: int | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool = False

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class UnixAddress:
    """A unix socket by its path."""

    path: str

    def __str__(self) -> str:
        return self.path


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


Address = InetAddress | UnixAddress | FdAddress | ExecAddress | FileAddress


def parse_uri(uri: str) -> Address:
    """The address that a URI of `migrate` or `-incoming` names; OptionError says what is wrong with it."""
    scheme, colon, rest = uri.partition(":")
    parser = _URI_PARSERS.get(scheme)
    if not colon or parser is None:
        raise OptionError(f"unknown migration protocol: {uri}", name="uri", value=uri)
    return parser(rest)


def parse_size(text: str) -> int:
    """A number of bytes as QEMU writes it: decimal with an optional K … E (× 1024ⁿ) or fraction, or 0x hex."""
    if text[:2].lower() == "0x":
        return int(text, 16)
    shift = SIZE_SUFFIXES.get(text[-1:].upper(), 0)
    digits = text[:-1] if shift or text[-1:].upper() == "B" else text
    if not digits or not set(digits) <= set("0123456789.") or digits.count(".") > 1 or digits == ".":
        raise ValueError(text)
    return int(float(digits) * (1 << shift)) if "." in digits else int(digits) << shift


def _parse_tcp(rest: str) -> Address:
    where, *options = rest.split(",")
    host, colon, port = where.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not port or len(port) > 32 or len(host) > 64 or (":" in host and not bracketed):
        raise OptionError(f"error parsing address '{rest}'", name="uri", value=rest)
    return InetAddress(host[1:-1] if bracketed else host, port, **_inet_options(rest, options))


def _inet_options(rest: str, options: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if key == "to" and value.isdigit() and int(value) <= 65535:
            values["to"] = int(value)
        elif key in ("ipv4", "ipv6", "keep-alive", "mptcp") and (not equals or value in ("on", "off")):
            if key != "mptcp":
                values[key.replace("-", "_")] = value != "off"
            elif value != "off":
                raise OptionError("multipath TCP is not built in this version", name="mptcp", value=value)
        else:
            raise OptionError(f"error parsing '{option}' of address '{rest}'", name="uri", value=rest)
    return values


def _parse_unix(rest: str) -> Address:
    if not rest:
        raise OptionError("invalid Unix socket address", name="uri", value=rest)
    return UnixAddress(rest)


def _parse_fd(rest: str) -> Address:
    if not rest:
        raise OptionError("fd: needs the name of a file descriptor", name="uri", value=rest)
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
        return FileAddress(_member(addr, "filename", str), _member(addr, "offset", int))
    raise OptionError(f"Parameter 'transport' does not accept value '{transport}'", name="transport", value=transport)


def _parse_socket(addr: Mapping[str, Any]) -> Address:
    kind = _member(addr, "type", str)
    if kind == "inet":
        to = addr.get("to")
        if to is not None and not (isinstance(to, int) and 0 <= to <= 65535):
            raise OptionError("Parameter 'to' expects uint16_t", name="to", value=to)
        return InetAddress(
            _member(addr, "host", str),
            _member(addr, "port", str),
            to=to,
            ipv4=addr.get("ipv4"),
            ipv6=addr.get("ipv6"),
            keep_alive=bool(addr.get("keep-alive", False)),
        )
    if kind == "unix":
        return UnixAddress(_member(addr, "path", str))
    if kind == "fd":
        return FdAddress(_member(addr, "str", str))
    raise OptionError(f"Parameter 'type' does not accept value '{kind}'", name="type", value=kind)


_QAPI_NAMES = {str: "string", int: "integer", list: "array"}


def _member(addr: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in addr:
        raise OptionError(f"Parameter 'channels[0].addr.{name}' is missing", name=name)
    value = addr[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        text = f"Invalid parameter type for 'channels[0].addr.{name}', expected: {_QAPI_NAMES[kind]}"
        raise OptionError(text, name=name, value=value)
    if isinstance(value, int) and not 0 <= value < 1 << 63:
        raise OptionError(f"Parameter 'channels[0].addr.{name}' expects uint64", name=name, value=value)
    return value
