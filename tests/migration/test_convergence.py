"""A guest that writes as fast as it is asked about, whose memory leaves smaller than it is: it moves all the same."""

from __future__ import annotations

import os
import struct
from typing import Any

import pytest

from qemumig.qapi import RunState
from tests.support.fake_machine import PAGE, FakeMachine
from tests.support.links import Links
from tests.support.pair import Pair

pytestmark = pytest.mark.usefixtures("no_leaks")

FIRST = 512  # behind the pages of the guest that checks itself
PAGES = 256  # 1 MiB, written before every look at the log
MIB = 1 << 20


class Writer:
    """Writes to the same pages before every look at the log of *machine* while that runs: no round leaves less behind.

    A page holds the same 512 bytes eight times but for its first word, which is what changes.
    """

    def __init__(self, machine: FakeMachine) -> None:
        self._machine = machine
        for page in range(FIRST, FIRST + PAGES):
            machine.write(machine.ram, page * PAGE, os.urandom(512) * 8)
        self.looks = 0
        self._fetch, machine.log.fetch = machine.log.fetch, self._write_and_fetch  # type: ignore[method-assign]

    def _write_and_fetch(self, block: Any, words: memoryview) -> None:
        if block is self._machine.ram and self._machine.runstate is RunState.RUNNING:
            self.looks += 1
            for page in range(FIRST, FIRST + PAGES):
                self._machine.write(self._machine.ram, page * PAGE, struct.pack("<Q", self.looks))
        self._fetch(block, words)


def looks_until_it_moved(capabilities: dict[str, bool], parameters: dict[str, Any]) -> int:
    """Migrate the guest; how often it was looked at while it ran."""
    with Pair(capabilities=capabilities, parameters=parameters) as pair:
        pair.link.close()
        pair.link = Links(int(pair.incoming.query()["socket-address"][0]["port"]))  # type: ignore[assignment]
        writer = Writer(pair.source)
        pair.migrate()
        assert pair.statuses == ("completed", "completed")
        pair.assert_guest_at("destination")
        here, there = (machine.read(machine.ram, FIRST * PAGE, PAGES * PAGE) for machine in (pair.source, pair.destination))
        assert here == there
        return writer.looks


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_compressed_pages_move_when_they_fit_the_downtime(method: str) -> None:
    """The link takes 0.6 MiB in the time that the guest may stand still, in which more than 1 MiB of it gets through."""
    limits = {"max-bandwidth": 2 * MIB, "downtime-limit": 300}
    assert looks_until_it_moved({"multifd": True}, {"multifd-compression": method, **limits}) < 20


def test_deltas_move_when_they_fit_the_downtime() -> None:
    limits = {"max-bandwidth": 4 * MIB, "downtime-limit": 100}
    assert looks_until_it_moved({"xbzrle": True}, limits) < 2000


def test_pages_that_do_not_get_smaller_have_no_such_luck() -> None:
    """What the link takes in time is less than what the guest writes: only a longer downtime lets it move."""
    limits = {"max-bandwidth": 8 * MIB, "downtime-limit": 100}
    with Pair(parameters=limits) as pair:
        writer = Writer(pair.source)
        pair.start()
        while writer.looks < 4:
            assert pair.migration.is_running
        pair.migration._options.set_parameters({"downtime-limit": 2000})
        pair.wait()
        assert pair.statuses == ("completed", "completed")
        pair.assert_guest_at("destination")
