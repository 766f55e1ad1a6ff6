"""Whether this host, and this memory, can take part in postcopy."""

from __future__ import annotations

import pytest

from qemumig.destination.support import check_block, page_size_summary
from qemumig.errors import MachineError
from qemumig.postcopy import uffd
from qemumig.postcopy.blocktime import FaultTimes
from qemumig.ram.block import RAMBlock


def test_nobody_has_waited_yet() -> None:
    times = FaultTimes([1, 2])
    assert times.vcpu_blocked_ns() == times.vcpu_latency_ns() == [0, 0]
    assert (times.all_blocked_ns(), times.count(), times.percentile_us(0.5)) == (0, 0, 0.0)
    assert times.distribution() == [0] * 24


@pytest.mark.needs("userfaultfd")
def test_memory_that_cannot_be_missing_is_named() -> None:
    descriptor = uffd.Userfaultfd(uffd.THREAD_ID)
    try:
        with pytest.raises(MachineError, match=r"'code': userfaultfd does not take its memory .*expected anonymous memory"):
            descriptor.register_missing(0x1001, 4096, "code")
    finally:
        descriptor.close()


def test_a_private_file_that_holds_data_is_refused_for_postcopy() -> None:
    block = RAMBlock("ram", 0x10000, 0x1000)
    check_block(block, True)
    with pytest.raises(MachineError, match=r"private mapping of a file that holds data.*share=on"):
        check_block(block, False)
    with pytest.raises(MachineError, match="expected whole host pages of 0x200000"):
        check_block(RAMBlock("ram", 0x10000, 0x1000, page_size=2 << 20), True)
    assert page_size_summary([block, RAMBlock("x", 0, 2 << 20, page_size=2 << 20)]) == 0x201000
