"""What a vCPU's exit asks of the buses, and how one that nobody can serve is told.

Threads   the vCPU's.
"""

from __future__ import annotations

from .devices.bus import Bus
from .vcpu import Exit, FailEntryExit, InternalErrorExit, IoExit, MmioExit


def access_ports(ports: Bus, exit: IoExit) -> None:
    """One port instruction, which may move several items (INS and OUTS)."""
    size, data = exit.size, exit.data
    for start in range(0, size * exit.count, size):
        item = data[start : start + size]
        if exit.is_write:
            ports.write(exit.port, size, int.from_bytes(item, "little"))
        else:
            item[:] = ports.read(exit.port, size).to_bytes(size, "little")


def access_memory(mmio: Bus, exit: MmioExit) -> None:
    if exit.is_write:
        mmio.write(exit.address, exit.size, int.from_bytes(exit.data, "little"))
    else:
        exit.data[:] = mmio.read(exit.address, exit.size).to_bytes(exit.size, "little")


def describe(exit: Exit) -> str:
    if isinstance(exit, FailEntryExit):
        return f"the processor refused to enter the guest (hardware reason {exit.reason:#x})"
    if isinstance(exit, InternalErrorExit):
        data = " ".join(f"{word:#x}" for word in exit.data)
        return f"KVM internal error, suberror {exit.suberror}, data [{data}]"
    return f"unexpected exit {exit}"
