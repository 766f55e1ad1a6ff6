"""The UART: expectations marked "real" were read from a real machine's UART by a guest program."""

from __future__ import annotations

import asyncio

import pytest

from kvm.devices.serial import BACKLOG_LIMIT, Serial
from qemumig.savevm.devices.serial import SERIAL, Fifo8, SerialState, Transmitter, Uart
from qemumig.savevm.reader import BytesReader

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
LOOPBACK = 0x10


class Port(Serial):
    """A UART with its outside: what it sent, and every movement of its interrupt line."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.line: list[bool] = []
        super().__init__(self._take, self._move)

    def _take(self, data: bytes) -> int:
        self.sent += data
        return len(data)

    def _move(self, level: bool) -> None:
        if not self.line or self.line[-1] is not level:
            self.line.append(level)

    def run(self, *steps: tuple[int, int] | int) -> list[int]:
        """Writes are (port, value), reads are ports; the values that were read."""
        values = []
        for step in steps:
            if isinstance(step, tuple):
                self.write(step[0], 1, step[1])
            else:
                values.append(self.read(step, 1))
        return values


@pytest.fixture
def port() -> Port:
    return Port()


def test_reset_values_are_real(port: Port) -> None:
    assert port.run(*range(8)) == [0, 0, 1, 0, 8, 0x60, 0xB0, 0]


REAL = [
    # transmitter interrupt, acknowledged by reading its cause
    ([(IER, 2), IIR, IIR, LSR], [2, 1, 0x60]),
    ([(IER, 2), IIR, (DATA, 0x41), IIR, IIR, (IER, 0), (IER, 2), IIR], [2, 2, 1, 2]),
    # FIFO control
    ([(FCR, 7), IIR, (FCR, 0xFF), IIR, (FCR, 0), IIR], [0xC1, 0xC1, 1]),
    # divisor latch
    ([(LCR, 0x80), DATA, IER, (DATA, 3), (IER, 1), DATA, IER, (LCR, 3), IER, LCR], [0x0C, 0, 3, 1, 0, 3]),
    # loopback: modem status, a character, an overrun of the single register
    ([(MCR, 0xFF), MCR, MSR, (MCR, 0x10), MSR, (DATA, 0x41), LSR, DATA, LSR], [0x1F, 0xF0, 0, 0x61, 0x41, 0x60]),
    ([(MCR, 0x1F), MSR, MSR, (MCR, 8), MSR, MSR], [0xF0, 0xF0, 0xB0, 0xB0]),
    ([(MCR, 0x10), (DATA, 0x41), (DATA, 0x42), LSR, LSR, DATA, LSR], [0x63, 0x61, 0x42, 0x60]),
    # scratch, read-only registers
    ([(SCR, 0x5A), SCR, (IER, 0xFF), IER, (MSR, 0xFF), MSR, (LSR, 0), LSR], [0x5A, 0x0F, 0xB0, 0x60]),
    # receive FIFO, and its overrun: the old characters stay
    ([(FCR, 1), (MCR, 0x10), (DATA, 0x41), (DATA, 0x42), LSR, DATA, LSR, DATA, LSR, DATA],
     [0x61, 0x41, 0x61, 0x42, 0x60, 0]),
    ([(FCR, 1), (MCR, 0x10), *((DATA, i) for i in range(20)), LSR, LSR, *[DATA] * 18, LSR],
     [0x63, 0x61, *range(16), 0, 0, 0x60]),
    ([(FCR, 1), (MCR, 0x10), (DATA, 0x41), (DATA, 0x42), (FCR, 3), LSR, DATA], [0x60, 0]),
    # order of causes
    ([(IER, 0xF), (MCR, 0x10), IIR, (DATA, 0x41), IIR, DATA, IIR, IIR], [2, 4, 0x41, 2, 1]),
    ([(IER, 5), (MCR, 0x10), (DATA, 0x41), (DATA, 0x42), IIR, LSR, IIR, DATA, IIR], [6, 0x63, 4, 0x42, 1]),
    # trigger level 4, then 1; switching the FIFO off empties it
    ([(FCR, 0x41), (IER, 1), (MCR, 0x10), *((DATA, 0x41) for _ in range(4)), IIR, (FCR, 1), IIR, LSR, (FCR, 0), LSR, IIR],
     [0xC4, 0xC4, 0x61, 0x60, 1]),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "values"), REAL)
def test_registers_answer_as_the_real_ones(port: Port, steps: list, values: list[int]) -> None:
    assert port.run(*steps) == values


def test_a_character_is_sent_at_once_and_the_line_shows_an_edge_for_each(port: Port) -> None:
    port.run((IER, 2), (DATA, 0x41), (DATA, 0x42))
    assert port.sent == b"AB"
    assert port.line == [True, False, True, False, True]


def test_looped_back_characters_do_not_leave(port: Port) -> None:
    port.run((MCR, LOOPBACK), (DATA, 0x41))
    assert port.sent == b""


def test_input_below_the_trigger_level_interrupts_as_a_timeout(port: Port) -> None:
    port.run((FCR, 0x41), (IER, 1))
    port.receive(b"a")
    assert port.run(IIR, DATA, IIR) == [0xCC, ord("a"), 0xC1]
    assert port.line[-2:] == [True, False]


def test_input_reaches_the_guest_whole_and_in_order(port: Port) -> None:
    text = bytes(range(256)) * 3
    port.receive(text)
    assert bytes(port.run(*[DATA] * len(text))) == text
    port.run((FCR, 1))
    port.receive(text)
    assert bytes(port.run(*[DATA] * len(text))) == text
    assert port.run(LSR) == [0x60]


def test_input_waits_outside_while_the_uart_talks_to_itself(port: Port) -> None:
    port.run((MCR, LOOPBACK))
    port.receive(b"x")
    assert port.run(LSR, (MCR, 8), LSR, DATA) == [0x60, 0x61, ord("x")]


def test_too_much_input_asks_for_a_pause_and_the_end_of_it_is_told_once(port: Port) -> None:
    told = []
    assert port.receive(b"x" * (BACKLOG_LIMIT - 1))
    assert not port.receive(b"yz")
    port.when_drained(lambda: told.append(True))
    port.run(*[DATA] * BACKLOG_LIMIT)
    assert told == [True]
    port.run(DATA)
    assert told == [True]


def test_drained_is_told_at_once_when_it_already_is(port: Port) -> None:
    told = []
    port.when_drained(lambda: told.append(True))
    assert told == [True]


def test_a_back_end_is_paused_and_resumed_on_its_loop(port: Port) -> None:
    async def scenario() -> list[str]:
        calls, resumed = [], asyncio.Event()

        class Backend:
            def set_receiver(self, receive: object) -> None:
                self.receive = receive

            def pause(self) -> None:
                calls.append("pause")

            def resume(self) -> None:
                calls.append("resume")
                resumed.set()

        backend = Backend()
        port.connect(backend)  # type: ignore[arg-type]
        backend.receive(b"x" * (BACKLOG_LIMIT + 1))  # type: ignore[operator]
        await asyncio.to_thread(port.run, *[DATA] * (BACKLOG_LIMIT + 1))
        await asyncio.wait_for(resumed.wait(), 10)
        return calls

    assert asyncio.run(scenario()) == ["pause", "resume"]


def moved(source: Port, destination: Port) -> bytes:
    """Carry the state over the wire; the bytes of a second save at the destination."""
    wire, _ = SERIAL.save(source.save())
    destination.load(SERIAL.load(BytesReader(wire), 3))
    again, _ = SERIAL.save(destination.save())
    assert again == wire
    return wire


def test_state_in_use_comes_out_byte_identical_and_goes_on(port: Port) -> None:
    port.run((LCR, 0x83), (DATA, 1), (IER, 2), (LCR, 3), (FCR, 0x81), (IER, 3), (SCR, 0x77), (MCR, 0x0B))
    port.receive(b"hello")
    destination = Port()
    moved(port, destination)
    assert destination.line[-1] is True
    assert bytes(destination.run(*[DATA] * 5)) == b"hello"
    assert destination.run(LCR, SCR, MCR, (LCR, 0x80), DATA, IER) == [3, 0x77, 0x0B, 1, 2]


def test_a_pending_transmitter_interrupt_hidden_by_another_survives(port: Port) -> None:
    port.run((IER, 3), (DATA, 0x41))
    port.receive(b"a")
    assert port.save().state.thr_ipending == 1
    destination = Port()
    moved(port, destination)
    assert destination.run(IIR, DATA, IIR, IIR) == [4, ord("a"), 2, 1]


def test_the_idle_uart_needs_eleven_bytes(port: Port) -> None:
    wire = moved(port, Port())
    assert wire.hex() == "000c000001000860b00000"


def test_characters_the_source_could_not_send_are_sent_when_the_machine_starts(port: Port) -> None:
    record = Uart(fcr=1, iir=0xC1, lsr=0x00, tsr=Transmitter(2, 0, ord("a")), xmit_fifo=Fifo8.holding(b"bc"))
    port.load(SerialState(record))
    again = port.save().state
    assert (again.tsr, again.xmit_fifo, again.lsr, port.sent) == (record.tsr, record.xmit_fifo, 0, b"")
    port.start()
    assert (bytes(port.sent), port.run(LSR), port.save().state.tsr) == (b"abc", [0x60], None)


def test_the_holding_register_of_a_uart_without_fifos_is_sent_too(port: Port) -> None:
    port.load(SerialState(Uart(lsr=0x00, tsr=Transmitter(1, ord("b"), ord("a")))))
    port.start()
    assert port.sent == b"ab"


def test_reset_forgets_registers_but_not_what_the_guest_has_yet_to_read(port: Port) -> None:
    port.run((IER, 1), (FCR, 1), (SCR, 9))
    port.receive(b"x" * 20)
    port.reset()
    assert port.run(IER, IIR, SCR) == [0, 1, 0]
    assert bytes(port.run(*[DATA] * 4)) == b"xxxx"
