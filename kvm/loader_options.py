"""-device loader: bytes that are in guest memory after each reset, and where a vCPU begins (cli.md §3).

    loader,file=F,addr=A[,force-raw=on][,cpu-num=N]       the file as it is; an ELF file where that says (elf.py)
    loader,addr=A,data=V,data-len=N[,data-be=on]          a number
    loader,addr=A,cpu-num=N                               only the instruction pointer of a vCPU

No block of memory and no section comes with it.  On a machine that waits for a migration nothing is put anywhere until it
is reset: the stream brings the memory.
"""

from __future__ import annotations

from . import elf
from .chardev import reason
from .config import Blob, MachineConfig
from .from_text import block_pairs
from .keyval import UsageError, integer, size, switch

DEVICE = "loader"
LARGEST_FILE = 1 << 30
_KEYS = ("driver", "id", "file", "addr", "data", "data-len", "data-be", "force-raw", "cpu-num")
_LARGEST_NUMBER = 8  # bytes


def is_loader(text: str) -> bool:
    """Whether this -device is one."""
    return block_pairs(text, "driver").get("driver") == DEVICE


def add_loader(text: str, config: MachineConfig) -> None:
    """Let *config* have what this -device says."""
    pairs = block_pairs(text, "driver")
    for key in pairs:
        if key not in _KEYS:
            raise UsageError(f"Property '{DEVICE}.{key}' not found")
    address = size("addr", pairs.get("addr", "0"))
    if "data" in pairs or "data-len" in pairs:
        config.blobs.append(Blob(address, _number(pairs)))
    elif "file" in pairs:
        address = _add_file(address, pairs, config)
        if "cpu-num" in pairs:
            _start_at(address, pairs, config)
    elif "addr" in pairs and "cpu-num" in pairs:
        _start_at(address, pairs, config)
    else:
        raise UsageError("please include valid arguments")


def _number(pairs: dict[str, str | None]) -> bytes:
    if "file" in pairs:
        raise UsageError("Specifying a file is not supported when loading memory values")
    if "cpu-num" in pairs:
        raise UsageError("Specifying a cpu-num is not supported when loading memory values")
    length = integer("data-len", pairs.get("data-len", "0"))
    if not ("data" in pairs and length):
        raise UsageError("Both data and data-len must be specified")
    if not 0 < length <= _LARGEST_NUMBER:
        raise UsageError(f"data-len cannot be greater then {_LARGEST_NUMBER} bytes")
    order = "big" if switch("data-be", pairs.get("data-be", "off")) else "little"
    value = size("data", pairs["data"]) & (1 << 8 * length) - 1
    return value.to_bytes(length, order)  # type: ignore[arg-type]


def _add_file(address: int, pairs: dict[str, str | None], config: MachineConfig) -> int:
    """Where a vCPU that starts with the file does."""
    data = _read_file(pairs["file"] or "")
    raw = switch("force-raw", pairs.get("force-raw", "off"))
    try:
        found = None if raw else elf.take_apart(data)
    except elf.ElfError as error:
        raise UsageError(f"Cannot load specified image {pairs['file']}: {error}; force-raw=on loads it as it is") from error
    if found is None:
        config.blobs.append(Blob(address, data))
        return address
    config.blobs += [Blob(segment.address, segment.data) for segment in found.segments]
    return found.entry


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UsageError(f"Cannot load specified image {path}: {reason(error)}") from error
    if len(data) > LARGEST_FILE:
        raise UsageError(f"Cannot load specified image {path}: it is longer than {LARGEST_FILE} bytes")
    return data


def _start_at(address: int, pairs: dict[str, str | None], config: MachineConfig) -> None:
    cpu = integer("cpu-num", pairs["cpu-num"])
    if not 0 <= cpu < config.cpus:
        raise UsageError(f"Specified boot CPU#{cpu} is nonexistent")
    config.entry_points[cpu] = address
