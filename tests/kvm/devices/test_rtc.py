from __future__ import annotations

import calendar
import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.devices.rtc import Rtc, memory_bytes
from qemumig.savevm.devices.mc146818rtc import MC146818RTC, Mc146818RtcState
from qemumig.savevm.reader import BytesReader
from tests.kvm.devices.lines import ManualDeadlines, RecordedLine
from tests.qemumig.savevm import recorded

GIB, MIB = 1 << 30, 1 << 20
SECOND = 1_000_000_000
A, B, C, D = range(0xA, 0xE)
SET, PERIODIC, ALARM, UPDATE, BINARY, HOURS_24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
INTERRUPT = 0x80
TIME = (0, 2, 4, 6, 7, 8, 9, 0x32)  # seconds, minutes, hours, weekday, day, month, year, century

START = calendar.timegm((2026, 11, 23, 22, 58, 50))  # a Monday


class Bench:
    """A clock in a host whose time stands where the test puts it; its second began when the test did."""

    def __init__(self, start: int = START) -> None:
        self.now = start * SECOND
        self.line = RecordedLine()
        self.deadlines = ManualDeadlines()
        self.rtc = Rtc(memory_bytes(64 * MIB), self.line, self.deadlines, lambda: self.now)
        self.rtc.start()

    def read(self, index: int) -> int:
        self.rtc.write(0, 1, index)
        return self.rtc.read(1, 1)

    def write(self, index: int, value: int) -> None:
        self.rtc.write(0, 1, index)
        self.rtc.write(1, 1, value)

    def time(self) -> list[str]:
        """The time registers as hexadecimal digits."""
        return [f"{self.read(index):02x}" for index in TIME]

    def wait(self, seconds: float) -> None:
        self.now += round(seconds * SECOND)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_it_shows_the_hosts_time_in_utc(bench: Bench) -> None:
    assert bench.time() == ["50", "58", "22", "02", "23", "11", "26", "20"]
    bench.wait(70)
    assert bench.time()[:3] == ["00", "00", "23"]


def test_after_power_on_it_counts_in_bcd_and_asks_for_nothing(bench: Bench) -> None:
    assert [bench.read(index) for index in (A, B, C, D)] == [0x26, 0x02, 0x00, 0x80]
    assert bench.rtc.read(0, 1) == 0xFF
    assert not bench.deadlines.come()


@pytest.mark.parametrize(
    ("hour", "bcd_12", "binary_12"), [(0, 0x12, 12), (1, 0x01, 1), (11, 0x11, 11), (12, 0x92, 0x8C), (23, 0x91, 0x8B)]
)
def test_hours_of_twelve_and_binary_numbers(hour: int, bcd_12: int, binary_12: int) -> None:
    bench = Bench(calendar.timegm((2026, 1, 2, hour, 34, 56)))
    bench.write(B, 0)
    assert (bench.read(4), bench.read(2)) == (bcd_12, 0x34)
    bench.write(B, BINARY)
    assert (bench.read(4), bench.read(2)) == (binary_12, 34)
    bench.write(4, binary_12)
    bench.write(B, BINARY | HOURS_24)
    assert bench.read(4) == hour


def test_a_time_that_is_set_goes_on_from_there_in_the_same_rhythm(bench: Bench) -> None:
    bench.wait(0.3)
    bench.write(B, HOURS_24 | SET)
    for index, value in zip(TIME, (0x58, 0x59, 0x23, 0x04, 0x31, 0x12, 0x25, 0x20), strict=True):
        bench.write(index, value)
    bench.wait(5)
    assert bench.time()[:3] == ["58", "59", "23"]  # held as long as it is being set
    bench.write(B, HOURS_24)
    bench.wait(1.69)
    assert bench.time()[:3] == ["59", "59", "23"]
    bench.wait(0.01)
    assert bench.time() == ["00", "00", "00", "05", "01", "01", "26", "20"]


def test_a_held_divider_holds_the_time_and_its_first_second_is_half_of_one(bench: Bench) -> None:
    bench.write(A, 0x76)
    bench.wait(3)
    assert bench.read(A) == 0x76 and bench.time()[0] == "50"
    bench.write(A, 0x26)
    bench.wait(0.499)
    assert bench.time()[0] == "50"
    bench.wait(0.002)
    assert bench.time()[0] == "51"


def test_the_century_has_two_places(bench: Bench) -> None:
    bench.write(B, HOURS_24 | SET)
    bench.write(0x37, 0x19)
    assert bench.read(0x32) == bench.read(0x37) == 0x19


def test_bit_7_of_a_announces_the_update(bench: Bench) -> None:
    bench.wait(0.9997)
    assert bench.read(A) == 0x26
    bench.wait(0.0001)
    assert bench.read(A) == 0xA6
    bench.wait(0.0002)
    assert bench.read(A) == 0x26


def test_flags_rise_without_an_interrupt_and_go_when_they_are_read(bench: Bench) -> None:
    bench.wait(1)
    assert [bench.read(C), bench.read(C)] == [0x10, 0]
    assert bench.line.moves == []


def test_the_update_interrupt_comes_each_second_until_it_is_not_wanted(bench: Bench) -> None:
    bench.write(B, HOURS_24 | UPDATE)
    for _ in range(3):
        bench.wait(1)
        assert bench.deadlines.come() and bench.line.level
        assert not bench.deadlines.come()  # nothing more until the guest has read the cause
        assert bench.read(C) == INTERRUPT | 0x10 and not bench.line.level
    bench.write(B, HOURS_24)
    bench.wait(1)
    assert not bench.deadlines.come()


def test_the_alarm_comes_at_its_time(bench: Bench) -> None:
    for index, value in ((1, 0x05), (3, 0x59), (5, 0x22)):
        bench.write(index, value)
    bench.write(B, HOURS_24 | ALARM)
    bench.wait(14)
    assert bench.deadlines.come() and not bench.line.level
    bench.wait(1)
    assert bench.deadlines.come() and bench.line.level
    assert bench.read(C) & 0xA0 == 0xA0
    bench.wait(86399)
    assert bench.deadlines.come() and not bench.line.level
    bench.wait(1)
    assert bench.deadlines.come() and bench.line.level


def test_alarm_bytes_may_match_any_time(bench: Bench) -> None:
    for index in (1, 3, 5):
        bench.write(index, 0xFF)
    bench.write(B, HOURS_24 | ALARM)
    for _ in range(3):
        bench.wait(1)
        assert bench.deadlines.come() and bench.read(C) & 0xA0 == 0xA0


def test_an_alarm_at_no_time_of_day_never_comes(bench: Bench) -> None:
    bench.write(1, 0x99)
    bench.write(B, HOURS_24 | ALARM)
    bench.wait(86399)
    assert bench.read(C) & ALARM == 0


@pytest.mark.parametrize(("rate", "hertz"), [(15, 2), (6, 1024), (3, 8192), (2, 128), (1, 256)])
def test_the_periodic_interrupt_has_its_rate(bench: Bench, rate: int, hertz: int) -> None:
    bench.write(A, 0x20 | rate)
    assert not bench.deadlines.come()
    bench.write(B, HOURS_24 | PERIODIC)
    came = []
    for _ in range(4):
        bench.now = bench.rtc.save().periodic_timer or 0
        assert bench.deadlines.come()
        assert bench.read(C) & 0xC0 == 0xC0
        came.append(bench.now)
    gaps = [later - earlier for earlier, later in pairwise(came)]
    assert all(abs(gap - SECOND // hertz) <= 1 for gap in gaps)


def test_the_period_of_a_real_qemu(bench: Bench) -> None:
    bench.write(A, 0x2F)
    bench.write(B, HOURS_24 | PERIODIC)
    assert bench.rtc.save().period == 16384


def test_what_cannot_be_written_stays(bench: Bench) -> None:
    bench.write(C, 0xFF)
    bench.write(D, 0)
    bench.write(A, 0xFF)
    assert (bench.read(C), bench.read(D), bench.read(A)) == (0, 0x80, 0x7F)


def test_cmos_memory_keeps_what_is_written_and_has_128_bytes(bench: Bench) -> None:
    bench.write(0x0F, 0x5A)
    bench.write(0x90, 0x77)
    assert (bench.read(0x0F), bench.read(0x10)) == (0x5A, 0x77)
    bench.rtc.reset()
    assert bench.read(0x0F) == 0x5A


@pytest.mark.parametrize(
    ("ram", "expected"),
    [
        (8 * MIB, {0x15: 0x80, 0x16: 2, 0x18: 0x1C, 0x31: 0x1C}),
        (64 * MIB, {0x15: 0x80, 0x16: 2, 0x18: 0xFC, 0x31: 0xFC, 0x35: 3}),
        (512 * MIB, {0x15: 0x80, 0x16: 2, 0x17: 0xFF, 0x18: 0xFF, 0x30: 0xFF, 0x31: 0xFF, 0x35: 0x1F}),
        (3 * GIB, {0x15: 0x80, 0x16: 2, 0x17: 0xFF, 0x18: 0xFF, 0x30: 0xFF, 0x31: 0xFF, 0x35: 0xBF}),
        (5 * GIB, {0x15: 0x80, 0x16: 2, 0x17: 0xFF, 0x18: 0xFF, 0x30: 0xFF, 0x31: 0xFF, 0x35: 0xBF, 0x5C: 0x80}),
    ],
)
def test_the_cmos_says_of_memory_what_a_real_qemus_does(ram: int, expected: dict[int, int]) -> None:
    assert {index: value for index, value in memory_bytes(ram).items() if value} == expected


def test_a_reset_ends_interrupts_and_keeps_the_time(bench: Bench) -> None:
    bench.write(B, HOURS_24 | UPDATE | SET)
    bench.write(0, 0x11)
    bench.write(B, HOURS_24 | UPDATE)
    bench.wait(1)
    assert bench.deadlines.come() and bench.line.level
    bench.rtc.reset()
    assert not bench.line.level
    assert (bench.read(B), bench.read(C), bench.time()[0]) == (HOURS_24, 0, "12")


def test_the_time_goes_on_while_the_machine_is_stopped_and_what_came_due_is_asked_for(bench: Bench) -> None:
    bench.write(B, HOURS_24 | UPDATE)
    bench.rtc.stop()
    bench.wait(10)
    assert not bench.deadlines.come() and not bench.line.level
    bench.rtc.start()
    assert bench.line.level and bench.time()[0] == "00"


def moved(bench: Bench, there: Bench) -> Mc146818RtcState:
    bench.rtc.stop()
    record = bench.rtc.save()
    data, _ = MC146818RTC.save(record)
    there.now = bench.now
    there.rtc.stop()
    there.rtc.load(MC146818RTC.load(BytesReader(data), 3))
    return record


def test_it_goes_on_elsewhere(bench: Bench) -> None:
    bench.write(A, 0x2A)
    bench.write(B, HOURS_24 | PERIODIC)
    bench.wait(0.4)
    there = Bench(0)
    record = moved(bench, there)
    assert there.rtc.save() == record
    there.wait(0.6)
    there.rtc.start()
    assert there.time()[0] == "51" and there.line.level
    assert there.read(C) == INTERRUPT | 0x50


def test_an_interrupt_that_was_asked_for_is_not_asked_for_again(bench: Bench) -> None:
    bench.write(B, HOURS_24 | UPDATE)
    bench.wait(1)
    bench.deadlines.come()
    there = Bench(0)
    moved(bench, there)
    assert there.line.adopted == [True] and there.line.moves == []
    there.rtc.start()
    assert there.line.moves == []
    assert there.read(C) == INTERRUPT | 0x10 and there.line.moves == [False]


def test_an_alarm_that_passed_on_the_way_is_asked_for(bench: Bench) -> None:
    for index, value in ((1, 0x52), (3, 0xFF), (5, 0xFF)):
        bench.write(index, value)
    bench.write(B, HOURS_24 | ALARM)
    there = Bench(0)
    moved(bench, there)
    there.wait(10)
    there.rtc.start()
    assert there.line.level and there.read(C) & ALARM


@pytest.mark.parametrize("name", [name for name in recorded.names() if "legacy-devices" in name])
def test_a_recorded_clock_shows_the_time_it_was_recorded_with(name: str) -> None:
    record = next(s.record for s in recorded.load(name).devices if isinstance(s.record, Mc146818RtcState))
    bench = Bench(0)
    bench.now = record.last_update
    bench.rtc.load(record)
    assert bytes(bench.read(index) for index in TIME) == bytes(record.cmos_data[index] for index in TIME)


@given(
    st.builds(
        Mc146818RtcState,
        cmos_data=st.binary(min_size=128, max_size=128),
        cmos_index=st.integers(0, 255),
        next_periodic_time=st.integers(-(1 << 63), (1 << 63) - 1),
        period=st.integers(0, (1 << 32) - 1),
        base_rtc=st.integers(0, (1 << 64) - 1),
        last_update=st.integers(0, (1 << 64) - 1),
        offset=st.integers(-(1 << 63), (1 << 63) - 1),
    )
)
def test_no_stream_breaks_it(record: Mc146818RtcState) -> None:
    bench = Bench()
    bench.rtc.stop()
    bench.rtc.load(dataclasses.replace(record))
    bench.rtc.start()
    bench.wait(2)
    bench.deadlines.come()
    for index in range(256):
        bench.read(index)
    bench.rtc.stop()
    MC146818RTC.save(bench.rtc.save())
