"""Disks as the command line writes them (cli.md §3).

    -blockdev driver=file,node-name=d0,filename=F[,…]     a node; driver=raw,node-name=r0,file=d0 a second name for it
    -drive if=none,id=d0,file=F,format=raw[,…]            a drive
    -device virtio-blk-device,drive=d0[,bus=…]            what uses one of them; on a PC -device ide-hd,drive=d0
    -drive file=F[,if=ide][,index=N]                      on a PC a drive and its disk at once
    -drive …,snapshot=on                                  what is written is forgotten at the end (block_snapshot.py)

All nodes and drives are there before the first device is looked at, whatever the order of the options.  Messages are
QEMU's; whoever calls puts the option's name in front of those that want it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from .block import BlockError, RawImage
from .config import VIRTIO_MMIO_SLOTS, DiskConfig
from .from_text import block_pairs
from .keyval import IDENTIFIER, UsageError, choice, identifier, integer, split, switch

Pairs = dict[str, str | None]

VIRTIO, IDE = "virtio-blk-device", "ide-hd"
_COMMON_KEYS = ("driver", "drive", "bus", "id", "werror", "rerror", "serial", "write-cache", "share-rw")
_DEVICE_KEYS = {
    VIRTIO: _COMMON_KEYS,
    # Geometry and the like is for the guest's drivers, and there is no controller for them: it is taken and not used.
    IDE: (*_COMMON_KEYS, "unit", "bootindex", "secs", "cyls", "heads", "bios-chs-trans", "model", "ver", "wwn"),
}
IDE_PLACES = 4
_ERROR_ACTIONS = ("report", "ignore", "enospc", "stop", "auto")
_SWITCHES = ("on", "off", "auto")
_CACHE_MODES = {  # of -drive: direct, flushes, writeback
    "none": (True, True, True),
    "off": (True, True, True),
    "writeback": (False, True, True),
    "unsafe": (False, False, True),
    "writethrough": (False, True, False),
    "directsync": (True, True, False),
}
_FILE_KEYS = ("filename", "locking", "aio")
_NODE_KEYS = ("node-name", "read-only", "discard", "cache.direct", "cache.no-flush", "detect-zeroes", "auto-read-only")
_DRIVE_KEYS = (
    *("if", "id", "file", "format", "readonly", "read-only", "cache", "discard", "werror", "rerror"),
    *("index", "media", "aio", "copy-on-read", "detect-zeroes", "snapshot"),
)
_BUS = {VIRTIO: re.compile(r"virtio-mmio-bus\.([0-9]+)"), IDE: re.compile(r"ide\.([0-9])")}


@dataclass(frozen=True)
class Drive:
    """An opened image and what its option says about errors and writing back."""

    name: str
    image: RawImage
    is_node: bool  # from -blockdev
    on_read_error: str = "auto"
    on_write_error: str = "auto"
    writeback: bool = True


class Disks:
    """All nodes, drives and disks of a command line, in its order; `close` closes every image.

    The machine has *slots* places for disks of the one *kind* that it takes.  *snapshot*: what is written to a -drive is
    forgotten at the end unless that says otherwise.
    """

    def __init__(
        self,
        warn: Callable[[str], None],
        slots: int = VIRTIO_MMIO_SLOTS,
        kind: str = VIRTIO,
        *,
        snapshot: bool = False,
    ) -> None:
        self._warn = warn
        self._snapshot = snapshot
        self._slots = slots
        self._kind = kind
        self._drives: dict[str, Drive] = {}
        self._images: list[RawImage] = []
        self._users: dict[int, str] = {}  # id of an image's object → the device on it
        self._device_ids: set[str] = set()
        self.disks: list[DiskConfig] = []
        # For who describes them: a -drive with an id for each drive, a -device for each disk, in the order of `disks`.
        self.drive_texts: list[str] = []
        self.device_texts: list[str] = []

    def close(self) -> None:
        """Close the images; no machine uses them any more."""
        for image in self._images:
            image.close()

    # -- nodes

    def add_node(self, pairs: Pairs) -> None:
        """`-blockdev`."""
        driver = _required("driver", pairs)
        choice("driver", driver, ("file", "raw"))
        name = pairs.get("node-name")
        if name is None:
            raise UsageError("'node-name' must be specified for the root node")
        if not IDENTIFIER.fullmatch(name) or len(name) > 31:
            raise UsageError(f"Invalid node-name: '{name}'")
        below = {key.removeprefix("file."): value for key, value in pairs.items() if key.startswith("file.")}
        if driver == "raw" and not below:
            self._add_alias(name, pairs)
            return
        if driver == "raw":
            choice("driver", _required("driver", below), ("file",))
            own = {key: value for key, value in pairs.items() if not key.startswith("file.")}
            _only_known(own, ("driver", *_NODE_KEYS))
            pairs = {**below, **own}
        _only_known(pairs, ("driver", *_NODE_KEYS, *_FILE_KEYS))
        options = _file_options(pairs)
        path = _required("filename", pairs)
        self._require_new_node(name)
        self._drives[name] = Drive(name, self._open(path, **options), True)

    def _add_alias(self, name: str, pairs: Pairs) -> None:
        """A raw node on top of a node that has a name of its own."""
        _only_known(pairs, ("driver", "file", *_NODE_KEYS))
        below = _required("file", pairs)
        if below not in self._drives:
            raise UsageError(f"Cannot find device='{below}' nor node-name='{below}'")
        self._require_new_node(name)
        self._drives[name] = replace(self._drives[below], name=name, is_node=True)

    def _require_new_node(self, name: str) -> None:
        if name in self._drives:
            raise UsageError(f"Duplicate nodes with node-name='{name}'")

    # -- drives

    def add_drive(self, text: str) -> None:
        """`-drive`."""
        pairs: Pairs = dict(split(text, "file"))
        interface = self._interface(pairs)
        name = self._drive_name(pairs, interface)
        self._drives[name] = self._open_drive(name, pairs)
        self.drive_texts.append(text if "id" in pairs else f"{text},id={name}")
        if interface == "none":
            return
        if (interface, self._kind) != ("ide", IDE):
            raise UsageError(f"machine type does not support if={interface},bus=0,unit=0")
        self._attach(IDE, self._drives[name], self._ide_place(pairs), {"driver": IDE, "drive": name})
        self.device_texts.append(f"{IDE},drive={name}")

    def _open_drive(self, name: str, pairs: Pairs) -> Drive:
        format_ = pairs.get("format")
        if format_ not in (None, "raw"):
            raise UsageError(f"Unknown driver '{format_}'")
        path = pairs.get("file") or pairs.get("file.filename")
        if not path:
            raise UsageError('A block device must be specified for "file"')
        for key in pairs:
            if key.startswith("file.") and key.removeprefix("file.") not in ("driver", *_FILE_KEYS):
                raise UsageError(f"Block protocol 'file' doesn't support the option '{key.removeprefix('file.')}'")
            if not key.startswith("file.") and key not in _DRIVE_KEYS:
                raise UsageError(f"Block format 'raw' does not support the option '{key}'")
        choice("media", pairs.get("media", "disk"), ("disk",))
        mode = pairs.get("cache", "writeback")
        if mode not in _CACHE_MODES:
            raise UsageError("invalid cache option")
        direct, flushes, writeback = _CACHE_MODES[mode]
        options: Pairs = {"read-only": pairs.get("readonly", pairs.get("read-only", "off"))}
        options |= {key: value for key, value in pairs.items() if key in ("discard", "aio", "detect-zeroes")}
        options |= {key.removeprefix("file."): value for key, value in pairs.items() if key.startswith("file.")}
        on_read_error = _drive_action("read", pairs.get("rerror"))
        on_write_error = _drive_action("write", pairs.get("werror"))
        known = {**_file_options(options), "direct": direct, "flushes": flushes}
        snapshot = switch("snapshot", pairs["snapshot"]) if "snapshot" in pairs else self._snapshot
        image = self._open_snapshot(path, known) if snapshot else self._open(path, **known)
        if format_ is None:
            self._warn(f"WARNING: no format was given for '{path}', it is taken as raw; format=raw says so")
        return Drive(name, image, False, on_read_error, on_write_error, writeback)

    def _interface(self, pairs: Pairs) -> str:
        """What a drive hangs on by itself: "ide", or "none" when a -device is to use it."""
        interface = pairs.get("if", "ide" if self._kind == IDE else "none") or ""
        if interface not in ("none", "ide", "scsi", "virtio", "floppy", "pflash", "mtd", "sd", "xen"):
            raise UsageError(f"unsupported bus type '{interface}'")
        return interface

    def _ide_place(self, pairs: Pairs) -> int:
        """Where a drive that is a disk at once goes: by its index, or the first free place."""
        taken = {disk.slot for disk in self.disks}
        if "index" not in pairs:
            free = set(range(self._slots)) - taken
            if not free:
                raise UsageError(f"machine type does not support if=ide,bus={self._slots // 2},unit=0")
            return min(free)
        index = integer("index", pairs["index"])
        if not 0 <= index < self._slots:
            raise UsageError(f"machine type does not support if=ide,bus={index // 2},unit={index % 2}")
        if index in taken:
            raise UsageError(f"drive with bus={index // 2}, unit={index % 2} (index={index}) exists")
        return index

    def _drive_name(self, pairs: Pairs, interface: str) -> str:
        """The drive's id, or the name that one without gets."""
        if "id" in pairs:
            name = identifier("id", pairs["id"])
        else:
            free = (f"{interface}{number}" for number in range(len(self._drives) + 1))
            name = next(one for one in free if one not in self._drives)
        if name in self._drives:
            raise UsageError(f"Duplicate ID '{name}' for drive")
        return name

    def _open(self, path: str, **options: bool) -> RawImage:
        return self._keep(partial(RawImage, path, **options))

    def _open_snapshot(self, path: str, options: dict[str, bool]) -> RawImage:
        from .block_snapshot import TemporarySnapshot

        known = {key: options[key] for key in ("read_only", "direct", "locks")}  # the others are about what lasts
        return self._keep(partial(TemporarySnapshot, path, **known))

    def _keep(self, make: Callable[[], RawImage]) -> RawImage:
        try:
            image = make()
        except BlockError as error:
            raise UsageError(str(error), hints=error.hints) from error
        self._images.append(image)
        return image

    # -- devices

    def add_device(self, text: str) -> None:
        """`-device` with a disk."""
        pairs = block_pairs(text, "driver")
        kind = pairs.get("driver")
        if not kind:
            raise UsageError("Parameter 'driver' is missing")
        if kind not in _DEVICE_KEYS:
            raise UsageError(f"'{kind}' is not a valid device model name")
        if kind != self._kind:
            raise UsageError(f"No '{'IDE' if kind == IDE else 'virtio-bus'}' bus found for device '{kind}'")
        if "id" in pairs:
            self._take_id(identifier("id", pairs["id"]))
        slot = self._slot(kind, pairs)
        for key in pairs:
            if key not in _DEVICE_KEYS[kind]:
                raise UsageError(f"Property '{kind}.{key}' not found")
        if "drive" not in pairs:
            raise UsageError("No drive specified" if kind == IDE else "drive property not set")
        drive = self._drives.get(pairs["drive"] or "")
        if drive is None:
            raise UsageError(f"Property '{kind}.drive' can't find value '{pairs['drive'] or ''}'")
        if kind == IDE and drive.image.read_only:
            raise UsageError("Block node is read-only")
        self._attach(kind, drive, slot, pairs)
        self.device_texts.append(text)

    def _attach(self, kind: str, drive: Drive, slot: int, pairs: Pairs) -> None:
        self._take_image(drive)
        self.disks.append(
            DiskConfig(
                drive.name,
                drive.image,
                slot,
                _device_action("rerror", pairs, drive.on_read_error, "report"),
                _device_action("werror", pairs, drive.on_write_error, "enospc"),
                _device_switch("write-cache", pairs, drive.writeback),
                pairs.get("serial") or "",
                kind,
                _boot_index(pairs),
            )
        )
        _device_switch("share-rw", pairs, False)

    def _take_id(self, name: str) -> None:
        if name in self._device_ids:
            raise UsageError(f"Duplicate ID '{name}' for device")
        self._device_ids.add(name)

    def _slot(self, kind: str, pairs: Pairs) -> int:
        """The slot that `bus` names, or a free one: of virtio-mmio the last, as in QEMU, of IDE the first."""
        bus, taken = pairs.get("bus"), {disk.slot for disk in self.disks}
        if bus is None:
            free = set(range(self._slots)) - taken
            if not free:
                raise UsageError(f"No '{'IDE' if kind == IDE else 'virtio-bus'}' bus found for device '{kind}'")
            return min(free) if kind == IDE else max(free)
        match = _BUS[kind].fullmatch(bus)
        if match is None or int(match[1]) >= self._slots:
            raise UsageError(f"Bus '{bus}' not found")
        if int(match[1]) in taken:
            raise UsageError(f"Bus '{bus}' is full")
        return int(match[1])

    def _take_image(self, drive: Drive) -> None:
        if id(drive.image) in self._users:
            if drive.is_node:
                user = f"the disk on '{self._users[id(drive.image)]}'"
                raise UsageError(f"Permission conflict on node '{drive.name}': {user} writes to it already")
            raise UsageError(f"Drive '{drive.name}' is already in use by another device")
        self._users[id(drive.image)] = drive.name


def _required(key: str, pairs: Pairs) -> str:
    value = pairs.get(key)
    if value is None:
        raise UsageError(f"Parameter '{key}' is missing")
    return value


def _only_known(pairs: Pairs, known: tuple[str, ...]) -> None:
    for key in pairs:
        if key not in known:
            raise UsageError(f"Parameter '{key}' is unexpected")


def _file_options(pairs: Pairs) -> dict[str, bool]:
    """What RawImage is to be opened with."""
    choice("detect-zeroes", pairs.get("detect-zeroes", "off"), ("off",))
    choice("aio", pairs.get("aio", "threads"), ("threads",))
    switch("auto-read-only", pairs.get("auto-read-only", "off"))
    return {
        "read_only": switch("read-only", pairs.get("read-only", "off")),
        "direct": switch("cache.direct", pairs.get("cache.direct", "off")),
        "flushes": not switch("cache.no-flush", pairs.get("cache.no-flush", "off")),
        "unmaps": choice("discard", pairs.get("discard", "ignore"), ("ignore", "off", "unmap", "on")) in ("unmap", "on"),
        "locks": choice("locking", pairs.get("locking", "auto"), _SWITCHES) != "off",
    }


def _drive_action(kind: str, value: str | None) -> str:
    """An error action of -drive; a full disk is no matter for reads."""
    allowed = ("report", "ignore", "stop") + (("enospc",) if kind == "write" else ())
    if value is not None and value not in allowed:
        raise UsageError(f"'{value}' invalid {kind} error action")
    return value or "auto"


def _device_action(key: str, pairs: Pairs, of_drive: str, default: str) -> str:
    action = choice(key, pairs.get(key, "auto"), _ERROR_ACTIONS)
    if action == "auto":
        action = of_drive
    return default if action == "auto" else action


def _boot_index(pairs: Pairs) -> int | None:
    if "bootindex" not in pairs:
        return None
    index = integer("bootindex", pairs["bootindex"])
    if index < 0:
        raise UsageError("The bootindex must be at least 0")
    return index


def _device_switch(key: str, pairs: Pairs, default: bool) -> bool:
    value = choice(key, pairs.get(key, "auto"), _SWITCHES)
    return default if value == "auto" else value == "on"
