"""`globalstate`: both layouts, every run state, and names that are none (stream.md §5.2)."""

from __future__ import annotations

import pytest

from qemumig.errors import StreamError
from qemumig.qapi import RunState
from qemumig.savevm.devices.globalstate import GLOBALSTATE, GlobalState
from qemumig.savevm.reader import BytesReader


def _load(data: bytes) -> GlobalState:
    reader = BytesReader(data)
    record = GLOBALSTATE.load(reader, 1)
    assert reader.remaining == 0
    return record


@pytest.mark.parametrize("state", RunState)
def test_every_run_state_goes_there_and_back_in_104_bytes(state: RunState) -> None:
    data, _ = GLOBALSTATE.save(GlobalState.of(state))
    assert len(data) == 104
    assert _load(data).state is state


def test_the_layout_is_that_of_9_0() -> None:
    data, _ = GLOBALSTATE.save(GlobalState.of(RunState.SUSPENDED, vm_was_suspended=True))
    assert data == b"\0\0\0\x0a" + b"suspended".ljust(32, b"\0") + b"\x01\x01" + bytes(66)


def test_the_layout_of_7_2_is_read_too_and_its_size_is_not_looked_at() -> None:
    record = _load(b"\xff\xff\xff\xff" + b"paused".ljust(100, b"\0"))
    assert (record.state, record.vm_was_suspended) == (RunState.PAUSED, 0)


@pytest.mark.parametrize("name", [b"", b"dancing", b"Running", b"\xff\xfe", b"running " + b"x" * 24, b"running" * 5])
def test_a_name_that_is_no_run_state_is_refused(name: bytes) -> None:
    with pytest.raises(StreamError, match=r"section 'globalstate' instance 0 at offset 0x68: run state .* found"):
        _load(b"\0\0\0\x08" + name.ljust(100, b"\0"))
