"""`globalstate`: what the machine was doing before it was stopped for the switchover (stream.md §5.2); version 1.

    until 8.2   be32 size   name, NUL padded to 100 bytes
    since 9.0   be32 size   name, NUL padded to 32 bytes   u8 has_vm_was_suspended   u8 vm_was_suspended   66 zeroes

Both are 104 bytes and every name fits 32, so the newer layout reads either; *size* is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...qapi import RunState
from ..fields import buffer, uint8, uint32
from ..vmstate import VMState

_NAME_SIZE = 32
_UNUSED_SIZE = 66


@dataclass
class GlobalState:
    """The run state by its QAPI name, and whether the guest was asleep before it was stopped."""

    size: int = len("running") + 1
    runstate: bytes = b"running".ljust(_NAME_SIZE, b"\0")
    has_vm_was_suspended: int = 1
    vm_was_suspended: int = 0
    unused: bytes = bytes(_UNUSED_SIZE)

    @classmethod
    def of(cls, state: RunState, *, vm_was_suspended: bool = False) -> GlobalState:
        """The record that announces *state*."""
        name = state.value.encode()
        return cls(len(name) + 1, name.ljust(_NAME_SIZE, b"\0"), 1, int(vm_was_suspended))

    @property
    def name(self) -> bytes:
        """The text before the first NUL; the last byte of the field always counts as one."""
        return self.runstate[: _NAME_SIZE - 1].partition(b"\0")[0]

    @property
    def state(self) -> RunState:
        """The run state; ValueError when it is none."""
        return RunState(self.name.decode(errors="replace"))


def _check_name(record: GlobalState, version_id: int) -> None:
    try:
        _ = record.state
    except ValueError:
        raise ValueError(f"run state {record.name!r} found, expected one of QEMU's run states") from None


GLOBALSTATE = VMState(
    "globalstate",
    1,
    (
        uint32("size"),
        buffer("runstate", _NAME_SIZE),
        uint8("has_vm_was_suspended"),
        uint8("vm_was_suspended"),
        buffer("unused", _UNUSED_SIZE),
    ),
    post_load=_check_name,
    record=GlobalState,
)
