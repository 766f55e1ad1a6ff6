"""Disks as clients of the monitor know them: by the words of the command line that made them (qmp.md §14).

-drive if=none,id=d0,…                 device "d0", a node without a name of its own
-blockdev driver=file,node-name=d0,…   device "", node "d0"
-device virtio-blk-device,drive=d0[,id=…]   the id, or a path below /machine/peripheral-anon
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..block import RawImage
from ..config import DiskConfig
from ..from_text import block_pairs
from ..keyval import split

PAST_THE_CACHE = ("none", "off", "directsync")  # values of -drive cache=
NEVER_FLUSHED = ("unsafe",)

NO_LIMITS = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)


@dataclass(frozen=True)
class Disk:
    """A disk: the *drive* it is on ("" for a -blockdev), its block *node*, its device's id or path."""

    drive: str
    node: str
    device: str
    image: RawImage
    driver: str = "raw"
    writeback: bool = True
    direct: bool = False
    no_flush: bool = False
    model: str = "virtio-blk-device"

    @property
    def path(self) -> str:
        """Where the device is in the tree of objects."""
        return self.device if self.device.startswith("/") else f"/machine/peripheral/{self.device}"


def describe(
    disks: Sequence[DiskConfig], *, drives: Iterable[str], nodes: Iterable[str], devices: Iterable[str]
) -> list[Disk]:
    """*disks* in the words of their -drive, -blockdev and -device options, which have been checked."""
    by_drive = {pairs.get("id"): pairs for pairs in (dict(split(text, "file")) for text in drives)}
    by_node = {pairs.get("node-name"): pairs for pairs in map(block_pairs, nodes)}
    found: list[Disk] = []
    anonymous = 0
    for disk, device in zip(disks, (block_pairs(text, "driver") for text in devices), strict=True):
        name = device.get("id")
        if name is None:
            name = f"/machine/peripheral-anon/device[{anonymous}]"
            anonymous += 1
        if disk.name in by_node:
            node = by_node[disk.name]
            found.append(
                Disk(
                    *("", disk.name, name, disk.image, node.get("driver") or ""),
                    writeback=disk.writeback,
                    model=disk.kind,
                    direct=node.get("cache.direct") in ("on", "yes", "true", "y"),
                    no_flush=node.get("cache.no-flush") in ("on", "yes", "true", "y"),
                )
            )
            continue
        mode = by_drive[disk.name].get("cache", "writeback")
        found.append(
            Disk(
                *(disk.name, f"#block{len(found):03d}", name, disk.image),
                writeback=disk.writeback,
                model=disk.kind,
                direct=mode in PAST_THE_CACHE,
                no_flush=mode in NEVER_FLUSHED or disk.image.forgets,
            )
        )
    return found


def describe_node(disk: Disk, active: bool) -> dict[str, Any]:
    """A block node as `query-named-block-nodes` shows it; *active*: this machine may write to it."""
    image = disk.image
    return {
        **NO_LIMITS,
        "file": image.path,
        "node-name": disk.node,
        "drv": disk.driver,
        "ro": image.read_only,
        "backing_file_depth": 0,
        "encrypted": False,
        "detect_zeroes": "off",
        "write_threshold": 0,
        "active": active,
        "cache": {"writeback": disk.writeback, "direct": disk.direct, "no-flush": disk.no_flush},
        "image": {
            "filename": image.path,
            "format": disk.driver,
            "virtual-size": image.size,
            "dirty-flag": False,
            **_actual_size(image.path),
        },
    }


def _actual_size(path: str) -> dict[str, int]:
    """How many bytes the file takes up; nothing when it has gone."""
    try:
        return {"actual-size": os.stat(path).st_blocks * 512}
    except OSError:
        return {}
