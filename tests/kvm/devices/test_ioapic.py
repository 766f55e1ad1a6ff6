from __future__ import annotations

import pytest

from kvm.devices.ioapic import Ioapic
from qemumig.savevm.devices.ioapic import IOAPIC_PINS, IoapicState

SELECT, WINDOW, END_OF_INTERRUPT = 0x00, 0x10, 0x40
LOGICAL, DELIVERY_STATUS, REMOTE_IRR, LEVEL, MASKED = 1 << 11, 1 << 12, 1 << 14, 1 << 15, 1 << 16
PIN, VECTOR = 5, 0x41


class Messages(list[tuple[int, int]]):
    """What was sent: (address, data)."""

    def send(self, address: int, data: int) -> None:
        self.append((address, data))


@pytest.fixture
def sent() -> Messages:
    return Messages()


@pytest.fixture
def ioapic(sent: Messages) -> Ioapic:
    return Ioapic(sent.send)


def register(ioapic: Ioapic, number: int) -> int:
    ioapic.write(SELECT, 4, number)
    return ioapic.read(WINDOW, 4)


def set_register(ioapic: Ioapic, number: int, value: int) -> None:
    ioapic.write(SELECT, 4, number)
    ioapic.write(WINDOW, 4, value)


def open_pin(ioapic: Ioapic, entry: int, pin: int = PIN) -> None:
    set_register(ioapic, 0x11 + 2 * pin, entry >> 32)
    set_register(ioapic, 0x10 + 2 * pin, entry & 0xFFFFFFFF)


def test_a_fresh_one_is_masked_and_says_what_it_is(ioapic: Ioapic) -> None:
    assert ioapic.save() == IoapicState()
    assert register(ioapic, 1) == 0x170020
    assert [register(ioapic, 0x10 + number) for number in range(2 * IOAPIC_PINS)] == [MASKED, 0] * IOAPIC_PINS
    assert register(ioapic, 0x40) == register(ioapic, 3) == 0


def test_its_id_has_four_bits_and_is_its_arbitration_id_too(ioapic: Ioapic) -> None:
    set_register(ioapic, 0, 0xF7FFFFFF)
    assert register(ioapic, 0) == register(ioapic, 2) == 0x07000000


def test_what_the_chip_itself_sets_cannot_be_written(ioapic: Ioapic) -> None:
    open_pin(ioapic, MASKED | LEVEL | REMOTE_IRR | DELIVERY_STATUS | VECTOR)
    assert register(ioapic, 0x10 + 2 * PIN) == MASKED | LEVEL | VECTOR


def test_only_whole_words_are_written_and_nothing_behind_the_last_pin(ioapic: Ioapic) -> None:
    ioapic.write(SELECT, 4, 0x10)
    ioapic.write(WINDOW, 1, VECTOR)
    set_register(ioapic, 0x10 + 2 * IOAPIC_PINS, VECTOR)
    set_register(ioapic, 1, 0)
    assert ioapic.save().ioredtbl == IoapicState().ioredtbl
    assert ioapic.read(0x20, 4) == 0


def test_a_narrow_read_sees_the_low_part(ioapic: Ioapic) -> None:
    ioapic.write(SELECT, 1, 1)
    assert ioapic.read(SELECT, 1) == 1
    assert ioapic.read(WINDOW, 1) == 0x20


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (VECTOR, (0xFEE00000, 0x4000 | VECTOR)),
        (VECTOR | 3 << 56, (0xFEE03000, 0x4000 | VECTOR)),
        (VECTOR | LOGICAL | 0x81 << 56, (0xFEE81004, 0x4000 | VECTOR)),
        (VECTOR | LEVEL, (0xFEE00000, 0xC000 | VECTOR)),
        (VECTOR | 1 << 8 | LOGICAL | 0xFF << 56, (0xFEEFF004, 0x4100 | VECTOR)),  # to whoever has least to do
        (4 << 8, (0xFEE00000, 0x4400)),  # NMI
    ],
)
def test_an_entry_becomes_its_message(ioapic: Ioapic, sent: Messages, entry: int, message: tuple[int, int]) -> None:
    open_pin(ioapic, entry)
    ioapic.set_line(PIN, True)
    assert sent == [message]


def test_an_edge_is_sent_once_however_long_the_line_stays_up(ioapic: Ioapic, sent: Messages) -> None:
    open_pin(ioapic, VECTOR)
    for level in (True, True, False, True):
        ioapic.set_line(PIN, level)
    assert len(sent) == 2
    assert ioapic.save().irr == 0


def test_an_edge_waits_while_its_pin_is_masked(ioapic: Ioapic, sent: Messages) -> None:
    ioapic.set_line(PIN, True)
    ioapic.set_line(PIN, False)
    assert sent == [] and ioapic.save().irr == 1 << PIN
    open_pin(ioapic, VECTOR)
    assert len(sent) == 1 and ioapic.save().irr == 0


def test_a_level_that_fell_while_masked_is_forgotten(ioapic: Ioapic, sent: Messages) -> None:
    open_pin(ioapic, MASKED | LEVEL | VECTOR)
    ioapic.set_line(PIN, True)
    ioapic.set_line(PIN, False)
    open_pin(ioapic, LEVEL | VECTOR)
    assert sent == []


def test_a_level_is_in_service_until_the_line_falls(ioapic: Ioapic, sent: Messages) -> None:
    open_pin(ioapic, LEVEL | VECTOR)
    ioapic.set_line(PIN, True)
    ioapic.set_line(PIN, True)
    assert len(sent) == 1 and register(ioapic, 0x10 + 2 * PIN) & REMOTE_IRR
    ioapic.set_line(PIN, False)
    assert not register(ioapic, 0x10 + 2 * PIN) & REMOTE_IRR
    ioapic.set_line(PIN, True)
    assert len(sent) == 2


def test_a_level_that_is_still_up_at_its_end_is_sent_again(ioapic: Ioapic, sent: Messages) -> None:
    open_pin(ioapic, LEVEL | VECTOR)
    ioapic.set_line(PIN, True)
    ioapic.write(END_OF_INTERRUPT, 4, VECTOR + 1)
    assert len(sent) == 1
    ioapic.write(END_OF_INTERRUPT, 4, VECTOR)
    assert len(sent) == 2


def test_a_pin_that_becomes_edge_triggered_is_not_in_service(ioapic: Ioapic, sent: Messages) -> None:
    open_pin(ioapic, LEVEL | VECTOR)
    ioapic.set_line(PIN, True)
    open_pin(ioapic, VECTOR)
    assert not register(ioapic, 0x10 + 2 * PIN) & REMOTE_IRR


def test_every_register_comes_out_as_it_went_in(ioapic: Ioapic, sent: Messages) -> None:
    record = IoapicState(3, 0x21, 1 << 7, [pin << 56 | MASKED | 0x30 + pin for pin in range(IOAPIC_PINS)])
    ioapic.load(record)
    assert ioapic.save() == record
    ioapic.reset()
    assert ioapic.save() == IoapicState()
    assert sent == []


def test_an_edge_that_waited_at_the_source_is_sent_here(ioapic: Ioapic, sent: Messages) -> None:
    table = [MASKED] * IOAPIC_PINS
    table[PIN] = VECTOR
    ioapic.load(IoapicState(irr=1 << PIN, ioredtbl=table))
    assert len(sent) == 1


@pytest.mark.parametrize("device_first", [False, True])
def test_a_level_in_service_reaches_the_guest_whatever_is_loaded_first(
    ioapic: Ioapic, sent: Messages, device_first: bool
) -> None:
    table = [MASKED] * IOAPIC_PINS
    table[PIN] = LEVEL | REMOTE_IRR | VECTOR
    if device_first:
        ioapic.set_line(PIN, True)
    ioapic.load(IoapicState(irr=1 << PIN, ioredtbl=table))
    ioapic.set_line(PIN, True)
    ioapic.set_line(PIN, False)
    sent.clear()
    ioapic.set_line(PIN, True)
    assert len(sent) == 1


def test_a_level_whose_line_is_down_here_does_not_stay_asked_for(ioapic: Ioapic, sent: Messages) -> None:
    table = [MASKED] * IOAPIC_PINS
    table[PIN] = LEVEL | VECTOR
    ioapic.load(IoapicState(irr=1 << PIN, ioredtbl=table))
    assert sent == [] and ioapic.save().irr == 0
