"""Character devices as the command line writes them (cli.md §5).

    -serial unix:/run/vm.serial,server=on,wait=off      DEV syntax: `from_device`
    -chardev socket,id=c0,path=/run/vm.qmp,server=on    `from_chardev`

CharDevices holds all of a process by label, opens them in the order of the command line, closes them at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .chardev import (
    CharBackend,
    DescriptorBackend,
    FileBackend,
    PipeBackend,
    StdioBackend,
    TcpBackend,
    UnixBackend,
)
from .keyval import UsageError, identifier, integer, split, switch, unique
from .mux import Mux

SOCKET_KEYS = ("server", "wait")
# Known to QEMU, not here: accepted only where they ask for nothing.
MISSING_SOCKET_KEYS = (
    "telnet",
    "websocket",
    "tn3270",
    "reconnect",
    "reconnect-ms",
    "abstract",
    "tls-creds",
    "tls-authz",
)
MISSING_KINDS = ("udp", "pty", "ringbuf", "vc", "telnet", "websocket", "parallel", "tty", "spicevmc", "hub")
CHARDEV_KEYS = {
    "null": (),
    "stdio": ("signal",),
    "file": ("path", "append"),
    "pipe": ("path",),
    "socket": ("path", "host", "port", "fd", "nodelay", *SOCKET_KEYS, *MISSING_SOCKET_KEYS),
}
NO_DRIVER = "is not a valid char driver"
COMMON_KEYS = ("id", "mux", "logfile")

Pairs = list[tuple[str, str | None]]


def from_device(text: str, label: str) -> CharBackend:
    """The back end that DEV *text* asks for; UsageError without the name of the option."""
    kind, colon, rest = text.partition(":")
    if text == "null":
        return CharBackend(label)
    if text == "stdio":
        return StdioBackend(label)
    if colon and kind == "file":
        return FileBackend(label, rest)
    if colon and kind == "pipe":
        return PipeBackend(label, rest)
    if colon and kind == "unix":
        path, *pairs = split(rest, "path") or [("path", "")]
        keys = unique(pairs, (*SOCKET_KEYS, *MISSING_SOCKET_KEYS))
        return _socket(label, {"path": path[1], **keys})
    if colon and kind == "tcp":
        address, *pairs = split(rest, "address") or [("address", "")]
        host, colon, port = (address[1] or "").rpartition(":")
        if not colon or not port:
            raise UsageError(f"'{rest}' names no port: tcp:HOST:PORT is expected")
        keys = unique(pairs, (*SOCKET_KEYS, "nodelay", *MISSING_SOCKET_KEYS))
        return _socket(label, {"host": host.strip("[]"), "port": port, **keys})
    if kind in MISSING_KINDS:
        raise UsageError(f"character device '{kind}' is not available")
    raise UsageError(f"'{text}' {NO_DRIVER}")


def from_chardev(text: str, warn: Callable[[str], None]) -> CharBackend:
    """The back end that `-chardev` *text* asks for, labelled with its id; UsageError without the option's name."""
    pairs = split(text, "backend")
    kind = dict(pairs).get("backend")
    label = dict(pairs).get("id")
    if label is None:
        raise UsageError("chardev: no id specified")
    identifier("id", label)
    if kind is None:
        raise UsageError(f'chardev: "{label}" missing backend')
    if kind in MISSING_KINDS:
        raise UsageError(f"character device '{kind}' is not available")
    if kind not in CHARDEV_KEYS:
        raise UsageError(f"'{kind}' is not a valid char driver name")
    keys = unique(pairs, ("backend", *COMMON_KEYS, *CHARDEV_KEYS[kind]))
    _warn_of_short_forms(pairs, warn)
    if switch("mux", keys.get("mux", "off")) or "logfile" in keys:
        raise UsageError("neither mux nor logfile is available for character devices")
    return _make(kind, label, keys)


def _warn_of_short_forms(pairs: Pairs, warn: Callable[[str], None]) -> None:
    for key, value in pairs:
        if value is None:
            plain = f"{key[2:]}=off" if key.startswith("no") and key != "nodelay" else f"{key}=on"
            warn(f"warning: short-form boolean option '{key}' deprecated; use {plain} instead")


def _make(kind: str, label: str, keys: dict[str, str | None]) -> CharBackend:
    if kind == "null":
        return CharBackend(label)
    if kind == "stdio":
        return StdioBackend(label, signals=switch("signal", keys.get("signal", "on")))
    if kind == "socket":
        return _socket(label, keys)
    path = keys.get("path")
    if not path:
        raise UsageError(f"chardev: {kind}: no filename given")
    if kind == "pipe":
        return PipeBackend(label, path)
    return FileBackend(label, path, append=switch("append", keys.get("append", "off")))


def _socket(label: str, keys: dict[str, str | None]) -> CharBackend:
    for key in MISSING_SOCKET_KEYS:
        if keys.get(key, "off") not in ("off", "0"):
            raise UsageError(f"'{key}' is not available for socket character devices")
    if sum(key in keys for key in ("path", "host", "fd")) > 1:
        raise UsageError("None or one of 'path', 'fd' or 'host' option required.")
    server = switch("server", keys.get("server", "off"))
    if not server and "wait" in keys and "fd" not in keys:
        raise UsageError("'wait' option is incompatible with socket in client connect mode")
    wait = server and switch("wait", keys.get("wait", "on"))
    if "fd" in keys:
        return DescriptorBackend(label, integer("fd", keys["fd"]), switch("wait", keys.get("wait", "on")))
    if "host" in keys or "port" in keys:
        if not keys.get("port"):
            raise UsageError("chardev: socket: no port given")
        return TcpBackend(label, keys.get("host") or "", keys["port"] or "", server, wait)
    if not keys.get("path"):
        raise UsageError("chardev: socket: no path, host or fd given")
    return UnixBackend(label, keys["path"] or "", server, wait)


class CharDevices:
    """The character devices of one process, by label."""

    def __init__(self, say: Callable[[str], None], daemonize: bool = False, end: Callable[[], None] = lambda: None) -> None:
        """*end*: what somebody wants who types Ctrl-A x."""
        self._say = say
        self._daemonize = daemonize
        self._end = end
        self.for_people: list[CharBackend] = []  # monitors that came with "mon:"
        self._devices: dict[str, CharBackend] = {}

    def __iter__(self) -> Iterator[CharBackend]:
        """All of them, in the order in which they were made."""
        return iter(self._devices.values())

    def add_device(self, option: str, text: str, label: str, consequence: str = "") -> CharBackend:
        """Make and open what DEV *text* asks for; *consequence* is a second line for its errors.

        `chardev:ID` is the one that -chardev made.  UsageError names *option*, e.g. "-serial".
        """
        named = f"{option} {text}"
        try:
            if text.startswith("chardev:"):
                return self.claim(text.removeprefix("chardev:"))
            if text.startswith("mon:"):
                return self._share(text.removeprefix("mon:"), label, named)
            backend = self._open(from_device(text, label), named)
            backend.in_use = True
            return backend
        except UsageError as error:
            lines = (*error.messages, consequence) if consequence else error.messages
            raise UsageError(*lines, hints=error.hints).during(named) from error

    def _share(self, text: str, label: str, option: str) -> CharBackend:
        """A back end for a device and a monitor; the device's side of it."""
        mux = Mux(self._open(from_device(text, f"{label}-base"), option), self._end)
        front = self._devices[label] = mux.front(label)
        self.for_people.append(mux.front(f"{label}-monitor"))
        return front

    def add_chardev(self, text: str) -> None:
        """Make and open what `-chardev` *text* asks for."""
        option = f"-chardev {text}"
        try:
            backend = from_chardev(text, lambda warning: self._say(f"{option}: {warning}"))
            if backend.label in self._devices:
                raise UsageError(f"Duplicate ID '{backend.label}' for chardev")
            self._open(backend, option)
        except UsageError as error:
            raise error.during(option) from error

    def _open(self, backend: CharBackend, option: str) -> CharBackend:
        if isinstance(backend, StdioBackend):
            if any(isinstance(other, StdioBackend) for other in self._devices.values()):
                raise UsageError("cannot use stdio by multiple character devices")
            if self._daemonize:
                raise UsageError("cannot use stdio with -daemonize")
        backend.option, backend.report = option, self._say
        self._devices[backend.label] = backend
        backend.open()
        return backend

    def claim(self, label: str) -> CharBackend:
        """The back end of that label, which must be there and free."""
        backend = self._devices.get(label)
        if backend is None:
            raise UsageError(f'chardev "{label}" not found')
        if backend.in_use:
            raise UsageError(f"chardev '{label}' is already in use")
        backend.in_use = True
        return backend

    async def start(self) -> None:
        """Let the running loop watch them all; waits for the first clients of those with wait=on, one by one."""
        for backend in self._devices.values():
            await backend.start()

    def close(self) -> None:
        """Close them all."""
        for backend in self._devices.values():
            backend.close()
