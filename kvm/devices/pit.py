"""The interval timer, an i8254: three counters of 16 bits that count down at 1.193182 MHz of the virtual clock.

    +0, +1, +2   counter 0, 1, 2        +3   control: which counter, how its count is read and written, its mode

    counter 0's output ─▶ GSI 0         the outputs of the others lead nowhere; the gate of counter 2 is low for good

A counter is the time at which its count was loaded and the mode; what it counts now and what its output is now follow
from the clock.  Nothing is done but at the moments when counter 0's output changes.  Counts in BCD are taken as binary.

    mode   count now                output, t clocks after the count was loaded
    0, 1   count - t                up from t = count on
    2      count - t mod count      down for the last clock of each period
    3      in steps of 2            up for the first half of each period, rounded up
    4, 5   count - t                down for the clock t = count

Threads   vCPU threads read and write, `vm/timers` moves the line; whoever holds the machine's transition lock
          starts, stops, resets, saves and loads.
Holds     the interrupt line follows counter 0's output, both change under the lock
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from qemumig.savevm.devices.i8254 import I8254State, PitChannel

from .deadlines import NANOSECONDS, Deadlines

PORTS = 0x40, 4
GSI = 0
FREQUENCY_HZ = 1193182

_CONTROL = 3
_READ_BACK = 3  # in the place of a counter's number
_LATCH, _LOW_BYTE, _HIGH_BYTE, _BOTH_BYTES = range(4)  # access modes; the last takes the low byte first
_SECOND = 4  # the high byte of _BOTH_BYTES is next
_LONGEST = 0x10000
_CHANNELS = range(3)
_RATE, _SQUARE, _SOFT_STROBE = 2, 3, 4
_SHORTEST_WAIT = 100_000  # nanoseconds between two looks at the clock, whatever the guest has loaded


class InterruptLine(Protocol):
    """What the timer needs of its line (kvm/devices/irqchip.py)."""

    def __call__(self, level: bool) -> None: ...

    def adopt(self, level: bool) -> None: ...


class Pit:
    """The timer; *clock* says the virtual time in nanoseconds."""

    def __init__(self, clock: Callable[[], int], line: InterruptLine, deadlines: Deadlines) -> None:
        # Set before the guest runs.
        self._clock = clock
        self._line = line
        self._deadlines = deadlines
        self._deadline = deadlines.new(self._time_has_come)
        # Under lock.
        self._lock = threading.Lock()
        self._running = False
        self._state = _after_reset(0)

    def reset(self) -> None:
        """As after power-on: all counters at their longest, in mode 3; the first interrupt comes after a whole period."""
        with self._lock:
            self._state = _after_reset(self._clock())
            self._line(False)
            self._set_deadline()

    def start(self) -> None:
        """The virtual clock runs."""
        with self._lock:
            self._running = True
            self._set_deadline()

    def stop(self) -> None:
        """The virtual clock is about to stop."""
        with self._lock:
            self._catch_up()
            self._running = False
            self._deadline.set(None)

    # -- the guest's side

    def read(self, offset: int, size: int) -> int:
        """A byte of a counter; the control register reads as zero."""
        with self._lock:
            return 0 if offset == _CONTROL else _read(self._state.channels[offset], self._clock())

    def write(self, offset: int, size: int, value: int) -> None:
        """A byte of a count, or a control word."""
        with self._lock:
            if offset == _CONTROL:
                self._control(value)
                self._set_deadline()
            else:
                _write(self._state.channels[offset], value, self._clock())
                self._follow()

    def _control(self, value: int) -> None:
        number, now = value >> 6, self._clock()
        if number == _READ_BACK:
            for index in _CHANNELS:
                if value & 2 << index:
                    channel = self._state.channels[index]
                    if not value & 0x20:
                        _latch_count(channel, now)
                    if not value & 0x10:
                        _latch_status(channel, now)
            return
        channel = self._state.channels[number]
        access = value >> 4 & 3
        if access == _LATCH:
            _latch_count(channel, now)
            return
        channel.rw_mode = channel.read_state = channel.write_state = access
        channel.mode = _mode(value >> 1)
        channel.bcd = value & 1

    # -- the line; under lock

    def _follow(self) -> None:
        """The line is counter 0's output; be called when that changes."""
        self._line(_output_at(self._state.channels[0], self._clock()))
        self._set_deadline()

    def _set_deadline(self) -> None:
        now = self._clock()
        change = next_change(self._state.channels[0], now)
        self._state.channels[0].next_transition_time = self._state.next_transition_time = change
        wait = max(change - now, _SHORTEST_WAIT)
        self._deadline.set(self._deadlines.now() + wait if self._running and change >= 0 else None)

    def _catch_up(self) -> None:
        """If the output has changed: the line goes where it went then, and on to where it is now."""
        first, change = self._state.channels[0], self._state.next_transition_time
        if 0 <= change <= self._clock():
            self._line(_output_at(first, change))
            self._follow()

    def _time_has_come(self) -> None:
        with self._lock:
            if self._running:
                self._catch_up()
                self._set_deadline()

    # -- migration

    def save(self) -> I8254State:
        """The counters; times are those of the virtual clock."""
        with self._lock:
            return replace(self._state, channels=[replace(channel) for channel in self._state.channels])

    def load(self, record: I8254State) -> None:
        """Count on; the interrupt controllers know where the line is, from the same source."""
        with self._lock:
            self._state = replace(record, channels=[replace(channel) for channel in record.channels])
            for channel in self._state.channels:
                channel.count = channel.count if 0 < channel.count <= _LONGEST else _LONGEST
                channel.mode = _mode(channel.mode)
            self._line.adopt(_output_at(self._state.channels[0], self._clock()))
            self._set_deadline()


def _after_reset(now: int) -> I8254State:
    """Gates of counters 0 and 1 are up for good."""
    return I8254State(channels=[PitChannel(gate=int(index < 2), count_load_time=now) for index in _CHANNELS])


def _mode(bits: int) -> int:
    """0 to 5: the highest of the three bits does not count in modes 2 and 3."""
    mode = bits & 7
    return mode - 4 if mode > 5 else mode


def _ticks_since_load(channel: PitChannel, now: int) -> int:
    return max(now - channel.count_load_time, 0) * FREQUENCY_HZ // NANOSECONDS


def _output_at(channel: PitChannel, now: int) -> bool:
    return output(channel, _ticks_since_load(channel, now))


def _time_of(channel: PitChannel, ticks: int) -> int:
    """The first nanosecond at which *ticks* have passed."""
    return channel.count_load_time - -ticks * NANOSECONDS // FREQUENCY_HZ


def counter(channel: PitChannel, ticks: int) -> int:
    """What the counter holds, 16 bits, *ticks* after its count was loaded."""
    if channel.mode == _SQUARE:
        return channel.count - 2 * ticks % channel.count & 0xFFFF
    if channel.mode == _RATE:
        return channel.count - ticks % channel.count & 0xFFFF
    return channel.count - ticks & 0xFFFF


def output(channel: PitChannel, ticks: int) -> bool:
    """Whether the output is up *ticks* after the count was loaded."""
    if channel.mode == _SQUARE:
        return ticks % channel.count < (channel.count + 1) // 2
    if channel.mode == _RATE:
        return ticks % channel.count != channel.count - 1
    if channel.mode >= _SOFT_STROBE:
        return ticks != channel.count
    return ticks >= channel.count


def next_change(channel: PitChannel, now: int) -> int:
    """The virtual time, in nanoseconds, of the output's next change; -1: never."""
    ticks = _ticks_since_load(channel, now)
    done, into = divmod(ticks, channel.count)
    if channel.mode in (_RATE, _SQUARE):
        falls = (channel.count + 1) // 2 if channel.mode == _SQUARE else channel.count - 1
        return _time_of(channel, done * channel.count + (falls if into < falls else channel.count))
    if ticks < channel.count:
        return _time_of(channel, channel.count)
    if channel.mode >= _SOFT_STROBE and ticks == channel.count:
        return _time_of(channel, channel.count + 1)
    return -1


# -- bytes of a counter


def _latch_count(channel: PitChannel, now: int) -> None:
    if not channel.count_latched:
        channel.latched_count = counter(channel, _ticks_since_load(channel, now))
        channel.count_latched = channel.rw_mode


def _latch_status(channel: PitChannel, now: int) -> None:
    if not channel.status_latched:
        channel.status = _output_at(channel, now) << 7 | channel.rw_mode << 4 | channel.mode << 1 | channel.bcd
        channel.status_latched = 1


def _read(channel: PitChannel, now: int) -> int:
    if channel.status_latched:
        channel.status_latched = 0
        return channel.status
    if channel.count_latched:
        return _read_latched(channel)
    value = counter(channel, _ticks_since_load(channel, now))
    if channel.read_state == _BOTH_BYTES:
        channel.read_state = _SECOND
        return value & 0xFF
    if channel.read_state == _SECOND:
        channel.read_state = _BOTH_BYTES
        return value >> 8
    return value >> 8 if channel.read_state == _HIGH_BYTE else value & 0xFF


def _read_latched(channel: PitChannel) -> int:
    """The latch goes with its last byte."""
    if channel.count_latched == _BOTH_BYTES:
        channel.count_latched = _HIGH_BYTE
        return channel.latched_count & 0xFF
    high = channel.count_latched == _HIGH_BYTE
    channel.count_latched = 0
    return channel.latched_count >> 8 if high else channel.latched_count & 0xFF


def _write(channel: PitChannel, value: int, now: int) -> None:
    if channel.write_state == _BOTH_BYTES:
        channel.write_latch = value
        channel.write_state = _SECOND
    elif channel.write_state == _SECOND:
        channel.write_state = _BOTH_BYTES
        _load_count(channel, channel.write_latch | value << 8, now)
    else:
        _load_count(channel, value << 8 if channel.write_state == _HIGH_BYTE else value, now)


def _load_count(channel: PitChannel, value: int, now: int) -> None:
    channel.count = value or _LONGEST
    channel.count_load_time = now
