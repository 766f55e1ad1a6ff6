from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.devices.pit import FREQUENCY_HZ, Pit, counter, next_change, output
from qemumig.savevm.devices.i8254 import I8254, I8254State, PitChannel
from qemumig.savevm.reader import BytesReader
from tests.kvm.devices.lines import ManualDeadlines, RecordedLine

CONTROL = 3
RATE_BOTH, SQUARE_BOTH, TERMINAL_BOTH = 0x34, 0x36, 0x30  # counter 0, both bytes
SECOND = 1_000_000_000


class Bench:
    """A timer whose clock stands where the test puts it."""

    def __init__(self) -> None:
        self.now = 0
        self.line = RecordedLine()
        self.deadlines = ManualDeadlines()
        self.pit = Pit(lambda: self.now, self.line, self.deadlines)
        self.pit.reset()
        self.pit.start()

    def ticks(self, count: int) -> None:
        """Let *count* clocks of the timer pass."""
        self.now += -(-count * SECOND // FREQUENCY_HZ)

    def load(self, control: int, count: int) -> None:
        counter = control >> 6
        self.pit.write(CONTROL, 1, control)
        self.pit.write(counter, 1, count & 0xFF)
        self.pit.write(counter, 1, count >> 8)

    def read(self, counter: int = 0, size: int = 2) -> int:
        return sum(self.pit.read(counter, 1) << 8 * byte for byte in range(size))

    def run(self, nanoseconds: int) -> None:
        """Let time pass, deadline after deadline."""
        end = self.now + nanoseconds
        while 0 <= (change := self.pit.save().next_transition_time) <= end:
            self.now = change
            assert self.deadlines.come()
        self.now = end


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_after_power_on_the_first_counter_is_at_its_longest_and_asks_after_a_whole_period(bench: Bench) -> None:
    state = bench.pit.save()
    assert [(channel.mode, channel.count, channel.gate) for channel in state.channels] == [
        (3, 0x10000, 1),
        (3, 0x10000, 1),
        (3, 0x10000, 0),
    ]
    assert state.next_transition_time in (27462700, 27462701)  # a real one rounds down
    bench.run(54_925_402)
    assert bench.line.moves == [True]
    bench.run(54_925_402)
    assert bench.line.moves == [True, False, True]


def test_a_rate_generator_gives_an_edge_a_period(bench: Bench) -> None:
    bench.load(RATE_BOTH, 11932)
    before = bench.line.edges
    bench.run(SECOND)
    assert bench.line.edges - before in (99, 100)


def test_terminal_count_asks_once(bench: Bench) -> None:
    bench.load(TERMINAL_BOTH, 1000)
    assert not bench.line.level
    before = bench.line.edges
    bench.run(SECOND)
    assert bench.line.edges - before == 1 and bench.line.level
    assert bench.pit.save().next_transition_time == -1


def test_the_count_goes_down_and_is_read_low_byte_first(bench: Bench) -> None:
    bench.load(RATE_BOTH, 0x2211)
    assert bench.read() == 0x2211
    bench.ticks(0x11)
    assert bench.read() == 0x2200
    bench.ticks(0x2200)
    assert bench.read() == 0x2211


def test_a_square_wave_counts_by_two(bench: Bench) -> None:
    bench.load(SQUARE_BOTH, 1000)
    bench.ticks(100)
    assert bench.read() == 800


def test_a_latched_count_stays_until_it_is_read(bench: Bench) -> None:
    bench.load(RATE_BOTH, 0x2211)
    bench.pit.write(CONTROL, 1, 0x00)
    bench.ticks(0x100)
    bench.pit.write(CONTROL, 1, 0x00)  # there is one already
    assert bench.read() == 0x2211
    assert bench.read() == 0x2111


def test_read_back_latches_status_and_count(bench: Bench) -> None:
    bench.load(RATE_BOTH, 0x2211)
    bench.pit.write(CONTROL, 1, 0xC2)
    assert bench.pit.read(0, 1) == 0xB4  # output up, both bytes, mode 2
    assert bench.read() == 0x2211
    bench.load(0x90, 0x2200)  # of counter 2 the low byte only, the second write is another count
    bench.pit.write(CONTROL, 1, 0xE8)  # status of counter 2
    assert bench.pit.read(2, 1) & 0x3F == 0x10


@pytest.mark.parametrize(("access", "count", "read"), [(0x10, 0x34, 0x34), (0x20, 0x1200, 0x12)])
def test_one_byte_of_a_count_may_be_enough(bench: Bench, access: int, count: int, read: int) -> None:
    bench.pit.write(CONTROL, 1, access | 4)
    bench.pit.write(0, 1, read)
    assert bench.pit.save().channels[0].count == count
    assert bench.pit.read(0, 1) == read


def test_a_count_of_zero_is_the_longest(bench: Bench) -> None:
    bench.load(RATE_BOTH, 0)
    assert bench.pit.save().channels[0].count == 0x10000


def test_the_control_register_reads_as_zero(bench: Bench) -> None:
    assert bench.pit.read(CONTROL, 1) == 0


def test_a_late_look_at_the_clock_still_tells_the_edge(bench: Bench) -> None:
    bench.load(RATE_BOTH, 1000)
    before = bench.line.edges
    bench.ticks(1001)  # the output has fallen and risen since
    assert bench.deadlines.come()
    assert bench.line.edges == before + 1


def test_what_has_happened_before_a_stop_is_told_and_nothing_after_it(bench: Bench) -> None:
    bench.load(RATE_BOTH, 1000)
    before = bench.line.edges
    bench.ticks(1001)
    bench.pit.stop()
    assert bench.line.edges == before + 1
    assert not bench.deadlines.come()
    bench.pit.start()
    assert bench.deadlines.come()


def test_the_encodings_in_a_stream_are_those_of_a_real_qemu(bench: Bench) -> None:
    bench.pit.write(CONTROL, 1, RATE_BOTH)
    bench.pit.write(0, 1, 0x11)
    first = bench.pit.save().channels[0]
    assert (first.read_state, first.write_state, first.write_latch, first.rw_mode, first.mode) == (3, 4, 0x11, 3, 2)
    bench.pit.write(0, 1, 0x22)
    bench.pit.write(CONTROL, 1, 0x00)
    bench.pit.read(0, 1)
    first = bench.pit.save().channels[0]
    assert (first.count, first.latched_count, first.count_latched) == (0x2211, 0x2211, 2)


def test_a_timer_counts_on_elsewhere_without_an_edge_of_its_own(bench: Bench) -> None:
    bench.load(RATE_BOTH, 0x2211)
    bench.ticks(0x11)
    bench.pit.stop()
    data, _ = I8254.save(bench.pit.save())
    there = Bench()
    there.now = bench.now
    there.pit.load(I8254.load(BytesReader(data), 3))
    assert there.line.moves == [] and there.line.adopted == [True]
    assert there.read() == 0x2200
    assert there.pit.save() == dataclasses.replace(bench.pit.save(), channels=there.pit.save().channels)


def test_a_stream_cannot_bring_a_count_or_a_mode_that_cannot_be(bench: Bench) -> None:
    for count, mode in ((0, 7), (-5, 6), (1 << 30, 255)):
        bench.pit.load(I8254State(channels=[PitChannel(count=count, mode=mode, count_load_time=1 << 62)] * 3))
        first = bench.pit.save().channels[0]
        assert first.count == 0x10000 and 0 <= first.mode <= 5
        bench.read()
        bench.deadlines.come()


@given(st.integers(0, 5), st.integers(1, 0x10000), st.integers(0, 1 << 40), st.integers(0, 1 << 20))
def test_the_output_changes_at_its_next_change_and_not_before(mode: int, count: int, loaded: int, later: int) -> None:
    channel = PitChannel(mode=mode, count=count, count_load_time=loaded)

    def up(at: int) -> bool:
        return output(channel, (at - loaded) * FREQUENCY_HZ // SECOND)

    now = loaded + later * 1000
    change = next_change(channel, now)
    if change < 0:
        assert up(now) == up(now + SECOND)
        return
    assert change > now
    assert up(change - 1) == up(now)
    assert up(change) is not up(now) or count == 1  # a period of one clock has no room for two levels


@given(st.integers(0, 5), st.integers(1, 0x10000), st.integers(0, 1 << 40))
def test_a_counter_has_sixteen_bits(mode: int, count: int, ticks: int) -> None:
    assert 0 <= counter(PitChannel(mode=mode, count=count), ticks) <= 0xFFFF
