"""The real-time clock, an MC146818: time of day, alarm, interrupts, and 128 bytes of CMOS memory.

    port 0x70   select a byte; reads as ones          port 0x71   the byte

    0, 2, 4      seconds, minutes, hours              0xA   bit 7 about to change, 4-6 divider (7, 6: held), 0-3 rate
    1, 3, 5      the same for the alarm; 0xC0: any    0xB   bit 7 set, 6-4 which interrupts, 2 binary, 1 24 hours
    6 … 9        weekday, day, month, year            0xC   bit 7 interrupt, 6 periodic, 5 alarm, 4 update; read: all go
    0x32, 0x37   century, one byte under two numbers  0xD   bit 7 valid

The time is that of the host, moved by what the guest sets:

    time in nanoseconds = base_rtc × 10⁹ + (host's clock - last_update) + offset

It goes on while the machine is stopped.  Flags follow from the time when somebody looks, or when an interrupt is due.

Threads   vCPU threads read and write, `vm/timers` raises interrupts; whoever holds the machine's transition lock
          starts, stops, resets, saves and loads.
Holds     the interrupt line is bit 7 of register C, both change under the lock
"""

from __future__ import annotations

import calendar
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

from qemumig.savevm.devices.mc146818rtc import Mc146818RtcState

from .deadlines import NANOSECONDS, Deadlines
from .memory import HOLE_START
from .pit import InterruptLine

PORTS = 0x70, 2
GSI = 8

_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR = 0, 2, 4, 6, 7, 8, 9
_ALARM_SECONDS, _ALARM_MINUTES, _ALARM_HOURS = 1, 3, 5
_A, _B, _C, _D = range(0xA, 0xE)
_CENTURY, _CENTURY_TOO = 0x32, 0x37
_TIME = frozenset({_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR, _CENTURY})

_A_UPDATING, _A_DIVIDER, _A_HELD, _A_RATE = 0x80, 0x70, 0x60, 0x0F
_A_RESET, _B_RESET, _D_VALID = 0x26, 0x02, 0x80  # 32768 Hz, 1024 Hz; 24 hours in BCD
_B_SET, _B_PERIODIC, _B_ALARM, _B_UPDATE, _B_BINARY, _B_24_HOURS = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
_C_INTERRUPT, _C_PERIODIC, _C_ALARM, _C_UPDATE = 0x80, 0x40, 0x20, 0x10
_ANY = 0xC0  # an alarm byte with both bits matches any
_PM = 0x80

_CRYSTAL_HZ = 32768
_UPDATE_TAKES = 244_000  # nanoseconds before each new second during which bit 7 of A is up
_HALF_SECOND = NANOSECONDS // 2  # until the first update after the divider was held
_DAY_SECONDS = 86400
_LAST_YEAR = 9999
_LAST_SECOND = calendar.timegm((_LAST_YEAR, 12, 31, 23, 59, 59))
_LAST_HOST_TIME = (1 << 63) - 1
_SHORTEST_WAIT = 100_000  # nanoseconds between two looks at the clock


class Rtc:
    """The clock; *memory* is what the CMOS says of RAM, *host_clock* gives nanoseconds since 1970 in UTC."""

    def __init__(
        self,
        memory: dict[int, int],
        line: InterruptLine,
        deadlines: Deadlines,
        host_clock: Callable[[], int] = time.time_ns,
    ) -> None:
        # Set before the guest runs.
        self._line = line
        self._deadline = deadlines.new(self._time_has_come)
        self._host_clock = host_clock
        # Under lock.
        self._lock = threading.Lock()
        self._running = False
        self._cmos = bytearray(128)
        for index, value in {**memory, _A: _A_RESET, _B: _B_RESET, _D: _D_VALID}.items():
            self._cmos[index] = value
        self._state = Mc146818RtcState()
        self._set_time(*divmod(host_clock(), NANOSECONDS))

    def reset(self) -> None:
        """No interrupts, nothing asked for; the time and the memory stay."""
        with self._lock:
            self._cmos[_B] &= ~(_B_PERIODIC | _B_ALARM | _B_UPDATE)
            self._cmos[_C] = 0
            self._state.period = self._state.next_periodic_time = 0
            self._follow()

    def start(self) -> None:
        """The machine runs: what has become due meanwhile is asked for."""
        with self._lock:
            self._running = True
            self._catch_up()

    def stop(self) -> None:
        """The machine is about to stop."""
        with self._lock:
            self._catch_up()
            self._running = False
            self._deadline.set(None)

    # -- the guest's side

    def read(self, offset: int, size: int) -> int:
        """The selected byte; the selector reads as ones."""
        if offset == 0:
            return 0xFF
        with self._lock:
            self._catch_up()
            index = self._state.cmos_index
            if index in _TIME and self._goes:
                self._show_time()
            value = self._cmos[index]
            if index == _A and self._goes and self._phase >= NANOSECONDS - _UPDATE_TAKES:
                value |= _A_UPDATING
            if index == _C:
                self._cmos[_C] = 0
                self._follow()
            return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Select a byte, or write the selected one."""
        with self._lock:
            if offset == 0:
                selected = value & 0x7F
                self._state.cmos_index = _CENTURY if selected == _CENTURY_TOO else selected
                return
            self._catch_up()
            self._write(self._state.cmos_index, value)
            self._follow()

    def _write(self, index: int, value: int) -> None:
        if index in _TIME:
            self._write_time(index, value)
        elif index == _A:
            self._write_divider(value & ~_A_UPDATING)
        elif index == _B:
            self._write_mode(value)
        elif index not in (_C, _D):
            self._cmos[index] = value

    def _write_time(self, index: int, value: int) -> None:
        """Set a part of the time; a clock that goes goes on from there."""
        if self._goes:
            self._show_time()
            self._cmos[index] = value
            self._set_time(self._shown_time(), self._phase)
        else:
            self._cmos[index] = value

    def _write_divider(self, value: int) -> None:
        """Hold the clock, or let it go: then the next second begins in half of one."""
        went, phase = self._goes, self._phase
        if went:
            self._show_time()
        held = self._cmos[_A] & _A_HELD == _A_HELD
        self._cmos[_A] = value
        if self._goes and not went:
            self._set_time(self._shown_time(), _HALF_SECOND if held else phase)
        self._restart_period()

    def _write_mode(self, value: int) -> None:
        went, phase = self._goes, self._phase
        if went:
            self._show_time()
        if value & _B_SET:
            value &= ~_B_UPDATE
        self._cmos[_B] = value
        if self._goes and not went:
            self._set_time(self._shown_time(), phase)
        self._restart_period()

    # -- time; under lock

    @property
    def _goes(self) -> bool:
        """False while the guest sets it, or holds its divider."""
        return not self._cmos[_B] & _B_SET and self._cmos[_A] & _A_HELD != _A_HELD

    def _nanoseconds(self) -> int:
        state = self._state
        return state.base_rtc * NANOSECONDS + self._host_clock() - state.last_update + state.offset

    @property
    def _seconds(self) -> int:
        """Since 1970, as far as there are years of four digits."""
        return min(max(self._nanoseconds() // NANOSECONDS, 0), _LAST_SECOND)

    @property
    def _phase(self) -> int:
        """Nanoseconds since the second began; of a held clock, too, whose divider may go on."""
        return self._nanoseconds() % NANOSECONDS

    def _set_time(self, seconds: int, phase: int) -> None:
        """It is *phase* nanoseconds past *seconds* since 1970."""
        state = self._state
        state.base_rtc, state.last_update, state.offset = seconds, self._host_clock(), phase
        self._looked_at = seconds

    def _show_time(self) -> None:
        """Write the time into its bytes."""
        now = time.gmtime(self._seconds)
        if self._cmos[_B] & _B_24_HOURS:
            self._cmos[_HOURS] = self._digits(now.tm_hour)
        else:
            self._cmos[_HOURS] = self._digits((now.tm_hour + 11) % 12 + 1) | (_PM if now.tm_hour >= 12 else 0)
        weekday = (now.tm_wday + 1) % 7 + 1  # Sunday is 1
        parts = {_SECONDS: now.tm_sec, _MINUTES: now.tm_min, _WEEKDAY: weekday, _DAY: now.tm_mday}
        parts |= {_MONTH: now.tm_mon, _YEAR: now.tm_year % 100, _CENTURY: now.tm_year // 100}
        for index, value in parts.items():
            self._cmos[index] = self._digits(value)
        self._cmos[_CENTURY_TOO] = self._cmos[_CENTURY]

    def _shown_time(self) -> int:
        """Seconds since 1970 of what the bytes say; fields that cannot be carry over into the next."""
        hour = self._hour(self._cmos[_HOURS])
        year = 100 * self._number(self._cmos[_CENTURY]) + self._number(self._cmos[_YEAR])
        month, day = self._number(self._cmos[_MONTH]), self._number(self._cmos[_DAY])
        minute, second = self._number(self._cmos[_MINUTES]), self._number(self._cmos[_SECONDS])
        year = min(max(year + (month - 1) // 12, 1970), _LAST_YEAR)
        first = calendar.timegm((year, (month - 1) % 12 + 1, 1, 0, 0, 0))
        return min(max(first + (day - 1) * _DAY_SECONDS + hour * 3600 + minute * 60 + second, 0), _LAST_SECOND)

    def _hour(self, value: int) -> int:
        if self._cmos[_B] & _B_24_HOURS:
            return self._number(value)
        return self._number(value & ~_PM) % 12 + (12 if value & _PM else 0)

    def _digits(self, value: int) -> int:
        return value if self._cmos[_B] & _B_BINARY else value // 10 << 4 | value % 10

    def _number(self, value: int) -> int:
        return value if self._cmos[_B] & _B_BINARY else (value >> 4) * 10 + (value & 0x0F)

    # -- flags and interrupts; under lock

    def _catch_up(self) -> None:
        """Raise the flags of what has come since the last look, and the line if the guest wants that."""
        if self._goes:
            seconds = self._seconds
            if seconds > self._looked_at:
                self._cmos[_C] |= _C_UPDATE
                if self._next_alarm(self._looked_at) <= seconds:
                    self._cmos[_C] |= _C_ALARM
            self._looked_at = seconds
        state, now = self._state, self._host_clock()
        if state.period and state.next_periodic_time <= now:
            self._cmos[_C] |= _C_PERIODIC
            length = state.period * NANOSECONDS // _CRYSTAL_HZ
            state.next_periodic_time += ((now - state.next_periodic_time) // length + 1) * length
        self._follow()

    def _follow(self) -> None:
        """Bit 7 of C, the line, and the next deadline."""
        if self._cmos[_C] & self._cmos[_B] & (_C_PERIODIC | _C_ALARM | _C_UPDATE):
            self._cmos[_C] |= _C_INTERRUPT
        self._line(bool(self._cmos[_C] & _C_INTERRUPT))
        self._set_deadline()

    def _set_deadline(self) -> None:
        if not self._running or self._cmos[_C] & _C_INTERRUPT:
            self._deadline.set(None)
            return
        due = [when for when in self._due() if when is not None]
        wait = max(min(due) - self._host_clock(), _SHORTEST_WAIT) if due else None
        self._deadline.set(None if wait is None else time.monotonic_ns() + wait)

    def _due(self) -> tuple[int | None, int | None]:
        """Host times of the next interrupts: of the whole seconds, and the periodic one."""
        second: int | None = None
        if self._goes and self._cmos[_B] & _B_UPDATE:
            second = self._host_time_of(self._looked_at + 1)
        elif self._goes and self._cmos[_B] & _B_ALARM:
            second = self._host_time_of(self._next_alarm(self._looked_at))
        return second, self._state.next_periodic_time if self._state.period else None

    def _host_time_of(self, seconds: int) -> int:
        """The host's clock then, as far as a stream has room for it."""
        state = self._state
        exact = (seconds - state.base_rtc) * NANOSECONDS + state.last_update - state.offset
        return min(max(exact, 0), _LAST_HOST_TIME)

    def _next_alarm(self, after: int) -> int:
        """The first second after *after* that the alarm bytes match; a day later when none does."""
        hour, minute, second = self._alarm()
        first = (after + 1) // 3600
        hours = [number for number in range(first, first + 25) if hour in (None, number % 24)]
        minutes = range(60) if minute is None else (minute,)
        seconds = range(60) if second is None else (second,)
        matches = (3600 * h + 60 * m + s for h, m, s in product(hours, minutes, seconds) if m < 60 and s < 60)
        return next((found for found in matches if found > after), after + _DAY_SECONDS)

    def _alarm(self) -> Iterator[int | None]:
        """Hour, minute and second of the alarm, None for any."""
        for index in (_ALARM_HOURS, _ALARM_MINUTES, _ALARM_SECONDS):
            value = self._cmos[index]
            number = self._hour(value) if index == _ALARM_HOURS else self._number(value)
            yield None if value & _ANY == _ANY else number

    def _restart_period(self) -> None:
        """The periodic interrupt as registers A and B want it, on the crystal's raster."""
        rate, divider = self._cmos[_A] & _A_RATE, self._cmos[_A] & _A_DIVIDER
        wanted = self._cmos[_B] & _B_PERIODIC and rate and divider < _A_HELD
        period = 1 << (rate - 1 if rate > 2 else rate + 6) if wanted else 0  # rates 1 and 2 are those of 8 and 9
        state = self._state
        if period != state.period:
            state.period = period
            now = self._host_clock() * _CRYSTAL_HZ // NANOSECONDS
            state.next_periodic_time = (now // period + 1) * period * NANOSECONDS // _CRYSTAL_HZ if period else 0

    def _time_has_come(self) -> None:
        with self._lock:
            if self._running:
                self._catch_up()

    # -- migration

    def save(self) -> Mc146818RtcState:
        """Everything, the time shown in its bytes; host times are nanoseconds since 1970."""
        with self._lock:
            state = self._state
            if self._goes:
                self._show_time()
            update = self._host_time_of(self._looked_at + 1) if self._goes else None
            return replace(
                state,
                cmos_data=bytes(self._cmos),
                periodic_timer=state.next_periodic_time if state.period else None,
                update_timer=update,
                next_alarm_time=self._host_time_of(self._next_alarm(self._looked_at)) if self._goes else 0,
            )

    def load(self, record: Mc146818RtcState) -> None:
        """Go on; the interrupt controllers know where the line is, from the same source."""
        with self._lock:
            self._cmos = bytearray(record.cmos_data)
            self._state = replace(record, cmos_index=record.cmos_index & 0x7F)
            self._state.next_periodic_time = max(record.next_periodic_time, 0)
            if not 0 < record.period <= _CRYSTAL_HZ:
                self._state.period = self._state.next_periodic_time = 0
            self._looked_at = min(self._seconds, self._shown_time()) if self._goes else 0
            self._line.adopt(bool(self._cmos[_C] & _C_INTERRUPT))


def memory_bytes(ram_size: int) -> dict[int, int]:
    """What the CMOS says of *ram_size* bytes of RAM, by the bytes' numbers."""
    below = min(ram_size, HOLE_START)
    extended = min(max(below - (1 << 20), 0) >> 10, 0xFFFF)  # KiB above 1 MiB
    more = min(max(below - (16 << 20), 0) >> 16, 0xFFFF)  # 64 KiB above 16 MiB
    high = max(ram_size - HOLE_START, 0) >> 16  # 64 KiB above 4 GiB
    words = {0x15: min(ram_size >> 10, 640), 0x17: extended, 0x30: extended, 0x34: more}
    found = {start + index: word >> 8 * index & 0xFF for start, word in words.items() for index in (0, 1)}
    return found | {0x5B + index: high >> 8 * index & 0xFF for index in range(3)}
