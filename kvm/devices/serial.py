"""A 16550 UART: eight ports, a FIFO each way, one interrupt line.

    +0   RBR / THR, with DLAB the divisor's low half        +4   MCR   modem control, bit 4 loopback
    +1   IER, with DLAB its high half                       +5   LSR   line status
    +2   IIR / FCR                                          +6   MSR   modem status
    +3   LCR, bit 7 is DLAB                                 +7   SCR   scratch

    guest ─▶ THR ─▶ send(bytes)                  at once: the transmitter is empty again when the write returns
    receive(bytes) ─▶ backlog ─▶ FIFO ─▶ RBR     the backlog is ours; the guest sees 16 bytes at most

There is no line and no line speed.  So the divisor is only remembered, and the silence after which a receive
FIFO below its trigger level interrupts has always passed.  A back end that takes nothing loses what it is sent, as
a line does that nobody listens to; the guest never waits for it.

A stream may bring characters that the source's UART could not get rid of: they are sent when the machine starts.

Threads   vCPU threads read and write, the loop thread calls `receive`, a migration saves and loads.
Holds     the interrupt line follows the registers, both change under the lock
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from qemumig.savevm.devices.serial import FIFO_LENGTH, Fifo8, SerialState, Transmitter, Uart

if TYPE_CHECKING:
    from ..chardev import CharBackend

PORTS = 0x3F8, 8
GSI = 4
BACKLOG_LIMIT = 64 << 10  # bytes of input kept for a guest that does not read

_DATA, _IER, _IIR_FCR, _LCR, _MCR, _LSR, _MSR, _SCR = range(8)

_DLAB = 0x80  # in LCR
_LOOPBACK = 0x10  # in MCR

_IER_RECEIVED, _IER_TRANSMITTER, _IER_LINE_STATUS, _IER_MODEM_STATUS = 1, 2, 4, 8

_IIR_ID = 0x0F
_IIR_MODEM_STATUS, _IIR_NONE, _IIR_TRANSMITTER, _IIR_RECEIVED, _IIR_LINE_STATUS, _IIR_TIMEOUT = 0, 1, 2, 4, 6, 12
_IIR_FIFOS = 0xC0

_FCR_ENABLE, _FCR_RESET_RECEIVER, _FCR_RESET_TRANSMITTER, _FCR_KEPT = 1, 2, 4, 0xC9
_TRIGGER_LEVELS = (1, 4, 8, 14)  # bytes, by bits 6 and 7 of FCR

_LSR_DATA_READY, _LSR_OVERRUN, _LSR_BREAK, _LSR_THR_EMPTY, _LSR_EMPTY = 1, 2, 0x10, 0x20, 0x40
_LSR_ERRORS = 0x1E

_MSR_CHANGES = 0x0F


class Serial:
    """The UART; *send* takes its output and says how much it took, *set_line* moves its interrupt line."""

    def __init__(self, send: Callable[[bytes], int], set_line: Callable[[bool], None]) -> None:
        # Set before the guest runs.
        self._send = send
        self._set_line = set_line
        # Under lock.
        self._lock = threading.Lock()
        self._backlog = bytearray()
        self._when_drained: Callable[[], None] | None = None
        self._unsent: tuple[Transmitter | None, bytes] | None = None  # what a source left behind
        self._received: deque[int] = deque()
        self._set_registers(Uart())

    def reset(self) -> None:
        """Registers as after power-on; input that the guest has not seen yet stays."""
        with self._lock:
            self._set_registers(Uart())
            self._update()

    # -- the guest's side

    def read(self, offset: int, size: int) -> int:
        """A byte of the port at *offset*."""
        with self._lock:
            value = self._read(offset)
            self._update()
            drained = self._take_when_drained()
        if drained:
            drained()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a byte to the port at *offset*."""
        with self._lock:
            self._write(offset, value)
            self._update()

    # -- the outside

    def receive(self, data: bytes) -> bool:
        """Input for the guest; False: that is enough, until `when_drained`.  Nothing is dropped."""
        with self._lock:
            self._backlog += data
            self._update()
            return len(self._backlog) < BACKLOG_LIMIT

    def when_drained(self, call: Callable[[], None]) -> None:
        """Call *call* once, when the guest has read the backlog; in the thread that notices."""
        with self._lock:
            self._when_drained = call
            drained = self._take_when_drained()
        if drained:
            drained()

    def start(self) -> None:
        """The machine starts: send the characters that came with a migration."""
        with self._lock:
            if self._unsent is not None:
                self._send(self._unsent_bytes())
                self._unsent = None
                self._transmitter_is_empty()
                self._update()

    def connect(self, backend: CharBackend) -> None:
        """Take *backend*'s input; it pauses while the guest does not read.  Before the backend starts."""

        def received(data: bytes) -> None:  # on the backend's loop
            if not self.receive(data):
                loop = asyncio.get_running_loop()
                backend.pause()
                self.when_drained(lambda: _call_in(loop, backend.resume))

        backend.set_receiver(received)

    # -- registers; under lock

    def _set_registers(self, uart: Uart) -> None:
        self._divider = uart.divider
        self._rbr, self._ier, self._iir, self._lcr = uart.rbr, uart.ier, uart.iir, uart.lcr
        self._mcr, self._lsr, self._msr, self._scr = uart.mcr, uart.lsr, uart.msr, uart.scr
        self._fcr = uart.fcr
        self._thr_pending = uart.iir & _IIR_ID == _IIR_TRANSMITTER
        if uart.thr_ipending is not None:
            self._thr_pending = bool(uart.thr_ipending)
        self._received = deque(uart.recv_fifo.content if uart.recv_fifo else b"")
        self._unsent = None
        if uart.tsr is not None or uart.xmit_fifo is not None:
            self._unsent = (uart.tsr, uart.xmit_fifo.content if uart.xmit_fifo else b"")

    def _read(self, offset: int) -> int:
        if offset == _DATA:
            return self._divider & 0xFF if self._lcr & _DLAB else self._read_data()
        if offset == _IER:
            return self._divider >> 8 if self._lcr & _DLAB else self._ier
        if offset == _IIR_FCR:
            return self._read_cause()
        if offset == _LSR:
            value = self._lsr
            self._lsr &= ~(_LSR_OVERRUN | _LSR_BREAK)
            return value
        if offset == _MSR:
            return self._read_modem_status()
        return {_LCR: self._lcr, _MCR: self._mcr, _SCR: self._scr}[offset]

    def _write(self, offset: int, value: int) -> None:
        if offset == _DATA and self._lcr & _DLAB:
            self._divider = self._divider & 0xFF00 | value
        elif offset == _DATA:
            self._write_data(value)
        elif offset == _IER and self._lcr & _DLAB:
            self._divider = self._divider & 0xFF | value << 8
        elif offset == _IER:
            self._write_enables(value & 0x0F)
        elif offset == _IIR_FCR:
            self._write_fifo_control(value)
        elif offset == _LCR:
            self._lcr = value
        elif offset == _MCR:
            self._mcr = value & 0x1F
        elif offset == _SCR:
            self._scr = value

    def _read_data(self) -> int:
        if not self._fcr & _FCR_ENABLE:
            self._lsr &= ~(_LSR_DATA_READY | _LSR_BREAK)
            return self._rbr
        value = self._received.popleft() if self._received else 0
        if not self._received:
            self._lsr &= ~(_LSR_DATA_READY | _LSR_BREAK)
        return value

    def _write_data(self, value: int) -> None:
        """A character, sent or looped back at once; the line falls in between, so that its edge is seen."""
        self._thr_pending = False
        self._update()
        if self._mcr & _LOOPBACK:
            self._take_character(value)
        else:
            self._send(bytes((value,)))
        self._transmitter_is_empty()

    def _transmitter_is_empty(self) -> None:
        self._lsr |= _LSR_THR_EMPTY | _LSR_EMPTY
        self._thr_pending = True

    def _write_enables(self, value: int) -> None:
        if (self._ier ^ value) & _IER_TRANSMITTER:
            self._thr_pending = bool(value & _IER_TRANSMITTER and self._lsr & _LSR_THR_EMPTY)
        self._ier = value

    def _write_fifo_control(self, value: int) -> None:
        switched = (self._fcr ^ value) & _FCR_ENABLE
        if switched or value & _FCR_RESET_RECEIVER:
            self._received.clear()
            self._lsr &= ~(_LSR_DATA_READY | _LSR_BREAK)
        if switched or value & _FCR_RESET_TRANSMITTER:
            self._transmitter_is_empty()
        self._fcr = value & _FCR_KEPT
        self._iir = self._iir & _IIR_ID | (_IIR_FIFOS if value & _FCR_ENABLE else 0)

    def _read_cause(self) -> int:
        if self._iir & _IIR_ID == _IIR_TRANSMITTER:
            value, self._thr_pending = self._iir, False
            return value
        return self._iir

    def _read_modem_status(self) -> int:
        mcr = self._mcr
        if mcr & _LOOPBACK:  # OUT2, OUT1 as carrier and ring; RTS, DTR as CTS, DSR
            return (mcr & 0x0C) << 4 | (mcr & 0x02) << 3 | (mcr & 0x01) << 5
        value = self._msr
        self._msr &= ~_MSR_CHANGES
        return value

    def _take_character(self, value: int) -> None:
        """A character arrives; without room for it, a FIFO keeps the old ones and the single register the new one."""
        if not self._fcr & _FCR_ENABLE:
            if self._lsr & _LSR_DATA_READY:
                self._lsr |= _LSR_OVERRUN
            self._rbr = value
        elif len(self._received) < FIFO_LENGTH:
            self._received.append(value)
        else:
            self._lsr |= _LSR_OVERRUN
        self._lsr |= _LSR_DATA_READY

    def _has_room(self) -> bool:
        if self._mcr & _LOOPBACK:
            return False  # the outside is cut off
        if self._fcr & _FCR_ENABLE:
            return len(self._received) < FIFO_LENGTH
        return not self._lsr & _LSR_DATA_READY

    def _update(self) -> None:
        """Take what fits from the backlog, then let IIR and the line follow the registers."""
        taken = 0
        while taken < len(self._backlog) and self._has_room():
            self._take_character(self._backlog[taken])
            taken += 1
        del self._backlog[:taken]
        cause = self._cause()
        self._iir = self._iir & ~_IIR_ID | cause
        self._set_line(cause != _IIR_NONE)

    def _cause(self) -> int:
        """The most urgent reason for an interrupt that is enabled."""
        if self._ier & _IER_LINE_STATUS and self._lsr & _LSR_ERRORS:
            return _IIR_LINE_STATUS
        if self._ier & _IER_RECEIVED and self._lsr & _LSR_DATA_READY:
            return _IIR_TIMEOUT if self._below_trigger() else _IIR_RECEIVED
        if self._ier & _IER_TRANSMITTER and self._thr_pending:
            return _IIR_TRANSMITTER
        if self._ier & _IER_MODEM_STATUS and self._msr & _MSR_CHANGES:
            return _IIR_MODEM_STATUS
        return _IIR_NONE

    def _below_trigger(self) -> bool:
        return bool(self._fcr & _FCR_ENABLE) and len(self._received) < _TRIGGER_LEVELS[self._fcr >> 6]

    def _take_when_drained(self) -> Callable[[], None] | None:
        if self._backlog or self._when_drained is None:
            return None
        call, self._when_drained = self._when_drained, None
        return call

    def _unsent_bytes(self) -> bytes:
        """What a source left behind, in the order of the line: shift register, then FIFO or holding register."""
        assert self._unsent is not None
        transmitter, fifo = self._unsent
        data = b""
        if transmitter is not None and transmitter.tsr_retry:
            data = bytes((transmitter.tsr,))
            if not self._fcr & _FCR_ENABLE and not self._lsr & _LSR_THR_EMPTY:
                data += bytes((transmitter.thr,))
        return data + fifo

    # -- migration

    def save(self) -> SerialState:
        """The registers; optional parts only where a real machine would send them."""
        with self._lock:
            uart = Uart(
                self._divider,
                self._rbr,
                self._ier,
                self._iir,
                self._lcr,
                self._mcr,
                self._lsr,
                self._msr,
                self._scr,
                self._fcr,
            )
            shown = self._iir & _IIR_ID == _IIR_TRANSMITTER
            if self._ier & _IER_TRANSMITTER and self._thr_pending is not shown:
                uart.thr_ipending = int(self._thr_pending)
            if self._received:
                uart.recv_fifo = Fifo8.holding(bytes(self._received))
                uart.timeout_ipending = 1 if self._below_trigger() else None
            if self._unsent is not None:
                uart.tsr, fifo = self._unsent
                uart.xmit_fifo = Fifo8.holding(fifo) if fifo else None
            return SerialState(uart)

    def load(self, record: SerialState) -> None:
        """Go on where the source's UART was; its interrupt line, too."""
        with self._lock:
            self._set_registers(record.state)
            self._update()


def _call_in(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Have *loop* make the call; a loop that is closed has nobody left to care."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
