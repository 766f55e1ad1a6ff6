"""`serial`: reset bytes, subsections, and the rule that ties lsr to tsr_retry (machine.md §4)."""

from __future__ import annotations

from typing import Any

import pytest

from qemumig.errors import StreamError
from qemumig.savevm.devices.serial import SERIAL, Fifo8, Poll, SerialState, Transmitter, Uart
from qemumig.savevm.reader import BytesReader


def _load(data: bytes) -> Uart:
    return SERIAL.load(BytesReader(data), 3).state


def test_a_uart_after_reset_is_eleven_known_bytes() -> None:
    assert SERIAL.save(SerialState())[0].hex(" ") == "00 0c 00 00 01 00 08 60 b0 00 00"


@pytest.mark.parametrize(
    "changes",
    [
        {"thr_ipending": 1},
        {"tsr": Transmitter(2, 3, 4), "lsr": 0x20},
        {"recv_fifo": Fifo8.holding(b"hello")},
        {"xmit_fifo": Fifo8(b"0123456789abcdef", 14, 4)},
        {"fifo_timeout_timer": 1 << 40},
        {"timeout_ipending": 1},
        {"poll": Poll(1, None)},
    ],
)
def test_subsections_belong_to_the_uart_and_go_there_and_back(changes: dict[str, Any]) -> None:
    uart = Uart(**changes)
    data, description = SERIAL.save(SerialState(uart))
    inner = description["fields"][0]["struct"]["subsections"]
    assert "subsections" not in description
    assert len(inner) == 1
    assert _load(data) == uart


def test_a_fifo_tells_its_content_across_the_end_of_the_ring() -> None:
    assert Fifo8(b"0123456789abcdef", 14, 4).content == b"ef01"
    assert Fifo8.holding(b"hello").content == b"hello"


@pytest.mark.parametrize(
    ("lsr", "retry", "fine"),
    [(0x60, None, True), (0x60, 0, True), (0x20, 1, True), (0x60, 1, False), (0x20, None, False), (0x00, 0, False)],
)
def test_an_empty_transmitter_and_a_retry_exclude_each_other(lsr: int, retry: int | None, fine: bool) -> None:
    uart = Uart(lsr=lsr, tsr=None if retry is None else Transmitter(retry))
    data, _ = SERIAL.save(SerialState(uart))
    if fine:
        assert _load(data) == uart
    else:
        with pytest.raises(StreamError, match=rf"field state .*lsr {lsr:#x} says the transmitter is .* tsr_retry is"):
            _load(data)


@pytest.mark.parametrize(("head", "num"), [(16, 0), (0, 17), (0xFFFFFFFF, 1)])
def test_a_fifo_that_points_outside_of_itself_is_refused(head: int, num: int) -> None:
    data, _ = SERIAL.save(SerialState(Uart(recv_fifo=Fifo8(head=head, num=num))))
    with pytest.raises(StreamError, match=rf"<serial/recv_fifo>.recv_fifo .*head {head} and num {num} found"):
        _load(data)
