"""`serial`: a 16550 UART on the ISA bus (machine.md §4); version 3, instance 0.

The section nests one structure `state`, which is the UART itself and owns the subsections.  Rule on load: a
transmitter that is retrying a character (tsr_retry > 0) cannot be empty, and one that is not retrying must be.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..fields import buffer, int32, struct, timer, uint8, uint16, uint32
from ..vmstate import Subsection, VMState, plain_subsection

LSR_TRANSMITTER_EMPTY = 0x40
FIFO_LENGTH = 16


@dataclass
class Fifo8:
    """A ring of 16 bytes: *num* of them from *head* on are in use."""

    data: bytes = bytes(FIFO_LENGTH)
    head: int = 0
    num: int = 0

    @classmethod
    def holding(cls, data: bytes) -> Fifo8:
        """A FIFO with *data*, oldest byte first."""
        return cls(data + bytes(FIFO_LENGTH - len(data)), 0, len(data))

    @property
    def content(self) -> bytes:
        """The bytes in use, oldest first."""
        return bytes(self.data[(self.head + index) % FIFO_LENGTH] for index in range(self.num))


@dataclass
class Transmitter:
    """A character that could not be written to the back end yet."""

    tsr_retry: int = 0
    thr: int = 0
    tsr: int = 0


@dataclass
class Poll:
    """Modem status polling, for back ends that are real lines; the timer in ns."""

    poll_msl: int = 0
    modem_status_poll: int | None = None


@dataclass
class Uart:
    """The registers of the UART."""

    divider: int = 0x0C
    rbr: int = 0
    ier: int = 0
    iir: int = 0x01
    lcr: int = 0
    mcr: int = 0x08
    lsr: int = 0x60
    msr: int = 0xB0
    scr: int = 0
    fcr: int = 0
    thr_ipending: int | None = None
    tsr: Transmitter | None = None
    recv_fifo: Fifo8 | None = None
    xmit_fifo: Fifo8 | None = None
    fifo_timeout_timer: int | None = None  # expiry in ns; None: not armed
    timeout_ipending: int | None = None
    poll: Poll | None = None


@dataclass
class SerialState:
    """A UART behind its ISA address."""

    state: Uart = field(default_factory=Uart)


def _check_fifo(fifo: Fifo8, version_id: int) -> None:
    if fifo.head >= FIFO_LENGTH or fifo.num > FIFO_LENGTH:
        raise ValueError(f"head {fifo.head} and num {fifo.num} found, expected a head below and a num up to {FIFO_LENGTH}")


def _check_transmitter(uart: Uart, version_id: int) -> None:
    retry = uart.tsr.tsr_retry if uart.tsr else 0
    if bool(uart.lsr & LSR_TRANSMITTER_EMPTY) == bool(retry):
        state = "empty" if uart.lsr & LSR_TRANSMITTER_EMPTY else "not empty"
        raise ValueError(f"lsr {uart.lsr:#x} says the transmitter is {state}, but tsr_retry is {retry}")


_FIFO8 = VMState(
    "Fifo8",
    1,
    (buffer("data", FIFO_LENGTH), uint32("head"), uint32("num")),
    post_load=_check_fifo,
    record=Fifo8,
)


def _fifo(attr: str) -> Subsection:
    return plain_subsection(attr, f"serial/{attr}", lambda name, value: struct(name, _FIFO8, value), attr)


_UART = VMState(
    "serial",
    3,
    (
        uint16("divider", version=2),
        uint8("rbr"),
        uint8("ier"),
        uint8("iir"),
        uint8("lcr"),
        uint8("mcr"),
        uint8("lsr"),
        uint8("msr"),
        uint8("scr"),
        uint8("fcr_vmstate", "fcr", version=3),
    ),
    minimum_version_id=2,
    subsections=(
        plain_subsection("thr_ipending", "serial/thr_ipending", int32, "thr_ipending"),
        Subsection(
            "tsr",
            VMState("serial/tsr", 1, (uint32("tsr_retry"), uint8("thr"), uint8("tsr")), record=Transmitter),
        ),
        _fifo("recv_fifo"),
        _fifo("xmit_fifo"),
        plain_subsection("fifo_timeout_timer", "serial/fifo_timeout_timer", timer, "fifo_timeout_timer"),
        plain_subsection("timeout_ipending", "serial/timeout_ipending", int32, "timeout_ipending"),
        Subsection("poll", VMState("serial/poll", 1, (int32("poll_msl"), timer("modem_status_poll")), record=Poll)),
    ),
    post_load=_check_transmitter,
    record=Uart,
)

SERIAL = VMState("serial", 3, (struct("state", _UART),), minimum_version_id=2, record=SerialState)
