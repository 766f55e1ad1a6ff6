from __future__ import annotations

import random
from array import array
from collections.abc import Iterator

import pytest

from kvm.dirty import LoggedSlot, MachineDirtyLog
from kvm.errors import KvmError
from qemumig.errors import MachineError
from qemumig.ram.block import RAMBlock

PAGE = 4096


class SlotLogs:
    """KVM's log of several slots, as dirty_log.DirtyLog shows it: sets of page numbers."""

    def __init__(self, *, manual: bool = True) -> None:
        self.manual = manual
        self.running = True
        self.at_once: list[bool] = []
        self.logged: set[int] = set()
        self.dirty: dict[int, set[int]] = {}
        self.fails: set[str] = set()

    def start(self, *slots: int, at_once: bool = False) -> None:
        self.at_once.append(at_once)
        for slot in slots:
            self._maybe_fail("start")
            self.logged.add(slot)
            self.dirty[slot] = set()

    def stop(self, *slots: int) -> None:
        self._maybe_fail("stop")
        self.logged -= set(slots)

    def write(self, slot: int, page: int) -> None:
        self.dirty[slot].add(page)

    def fetch(self, slot: int, words: memoryview) -> None:
        self._maybe_fail("fetch")
        for index in range(len(words)):
            words[index] = sum(1 << page % 64 for page in self.dirty[slot] if page // 64 == index)
        if not self.manual:
            self.dirty[slot].clear()

    def clear(self, slot: int, words: memoryview | array, first_page: int, page_count: int) -> None:
        self._maybe_fail("clear")
        assert self.manual and first_page % 64 == 0
        for page in range(page_count):
            if words[page // 64] >> page % 64 & 1:
                self.dirty[slot].discard(first_page + page)

    def _maybe_fail(self, what: str) -> None:
        if what in self.fails:
            raise KvmError(22, f"KVM_{what}")


RAM = RAMBlock("microvm.ram", 0, 512 * PAGE)
BIOS = RAMBlock("pc.bios", 0, 48 * PAGE)

# The machine's own layout, but small, and an alias that starts inside a word of its block.
SLOTS = [
    LoggedSlot(0, RAM, 0, 240),
    LoggedSlot(1, BIOS, 16, 32),
    LoggedSlot(2, RAM, 256, 256),
    LoggedSlot(3, BIOS, 0, 48),
]


@pytest.fixture(params=[True, False], ids=["manual", "automatic"])
def slots(request: pytest.FixtureRequest) -> SlotLogs:
    return SlotLogs(manual=request.param)


@pytest.fixture
def log(slots: SlotLogs) -> Iterator[MachineDirtyLog]:
    log = MachineDirtyLog(slots, SLOTS, lambda: slots.running)  # type: ignore[arg-type]
    log.start()
    yield log
    slots.fails.clear()
    log.stop()


def fetched(log: MachineDirtyLog, block: RAMBlock) -> set[int]:
    """The pages that one fetch reports."""
    words = memoryview(array("Q", bytes(8 * ((block.pages + 63) // 64))))
    log.fetch(block, words)
    return {64 * index + bit for index, word in enumerate(words) for bit in range(64) if word >> bit & 1}


def test_bits_of_all_slots_of_a_block_are_merged_where_they_belong(log: MachineDirtyLog, slots: SlotLogs) -> None:
    for slot, page in ((0, 0), (0, 239), (2, 0), (2, 255), (1, 0), (1, 31), (3, 15), (3, 16)):
        slots.write(slot, page)
    assert fetched(log, RAM) == {0, 239, 256, 511}
    assert fetched(log, BIOS) == {15, 16, 47}


def test_bits_that_are_set_already_stay(log: MachineDirtyLog, slots: SlotLogs) -> None:
    words = memoryview(array("Q", [1 << 63] * 8))
    slots.write(0, 1)
    log.fetch(RAM, words)
    assert list(words) == [1 << 63 | 2] + [1 << 63] * 7


def test_a_page_is_reported_until_it_is_cleared_or_only_once(log: MachineDirtyLog, slots: SlotLogs) -> None:
    slots.write(0, 7)
    assert fetched(log, RAM) == {7}
    assert fetched(log, RAM) == ({7} if log.manual_clear else set())
    log.clear(RAM, 0, 64)
    assert fetched(log, RAM) == set()


def test_a_write_after_the_clear_is_reported_again(log: MachineDirtyLog, slots: SlotLogs) -> None:
    slots.write(2, 100)
    assert fetched(log, RAM) == {356}
    log.clear(RAM, 320, 64)
    slots.write(2, 100)
    assert fetched(log, RAM) == {356}


def test_a_page_that_was_not_reported_is_not_cleared(log: MachineDirtyLog, slots: SlotLogs) -> None:
    slots.write(3, 20)
    assert fetched(log, BIOS) == {20}
    slots.write(3, 21)
    log.clear(BIOS, 0, 48)
    assert fetched(log, BIOS) == {21}


def test_a_second_clear_of_a_range_loses_no_write(log: MachineDirtyLog, slots: SlotLogs) -> None:
    for slot, page in ((0, 70), (1, 4)):
        slots.write(slot, page)
    fetched(log, RAM), fetched(log, BIOS)
    for _ in range(2):
        log.clear(RAM, 64, 64)
        log.clear(BIOS, 0, 48)
        slots.write(0, 70)
        slots.write(1, 4)
    assert (fetched(log, RAM), fetched(log, BIOS)) == ({70}, {20})


def test_clearing_reaches_every_slot_of_the_page(log: MachineDirtyLog, slots: SlotLogs) -> None:
    slots.write(1, 2)
    slots.write(3, 18)
    assert fetched(log, BIOS) == {18}
    log.clear(BIOS, 0, 48)
    assert fetched(log, BIOS) == set()


def test_clearing_stays_within_its_range(log: MachineDirtyLog, slots: SlotLogs) -> None:
    for page in (63, 64, 127, 128, 239):
        slots.write(0, page)
    slots.write(2, 0)
    assert fetched(log, RAM) == {63, 64, 127, 128, 239, 256}
    log.clear(RAM, 64, 64)
    left = {63, 128, 239, 256} if log.manual_clear else set()
    assert fetched(log, RAM) == left


def test_random_writes_and_clears_agree_with_sets() -> None:
    generator = random.Random(20)
    slots = SlotLogs()
    log = MachineDirtyLog(slots, SLOTS, lambda: slots.running)  # type: ignore[arg-type]
    log.start()
    dirty: dict[str, set[int]] = {"microvm.ram": set(), "pc.bios": set()}
    for _ in range(400):
        for _ in range(generator.randrange(6)):
            where = generator.choice(SLOTS)
            page = generator.randrange(where.page_count)
            slots.write(where.slot, page)
            dirty[where.block.idstr].add(where.first_page + page)
        block = generator.choice((RAM, BIOS))
        assert fetched(log, block) == dirty[block.idstr]
        first = 64 * generator.randrange((block.pages + 63) // 64)
        count = min(64 * generator.randrange(1, 4), block.pages - first)
        log.clear(block, first, count)
        dirty[block.idstr] -= set(range(first, first + count))


def test_our_own_writes_are_reported_once(log: MachineDirtyLog) -> None:
    log.mark(RAM, 3 * PAGE - 1, 2)
    log.mark(RAM, 250 * PAGE, 0)
    log.mark(BIOS, 47 * PAGE, PAGE)
    assert (fetched(log, RAM), fetched(log, BIOS)) == ({2, 3}, {47})
    assert (fetched(log, RAM), fetched(log, BIOS)) == (set(), set())


def test_marks_count_only_while_logging(slots: SlotLogs) -> None:
    log = MachineDirtyLog(slots, SLOTS, lambda: slots.running)  # type: ignore[arg-type]
    log.mark(RAM, 0, PAGE)
    log.start()
    assert fetched(log, RAM) == set()
    log.mark(RAM, 0, PAGE)
    log.stop()
    log.start()
    assert fetched(log, RAM) == set()
    log.stop()


@pytest.mark.parametrize("slots", [True], indirect=True)
@pytest.mark.parametrize(("first", "count"), [(-64, 64), (448, 128), (512, 64)])
def test_a_clear_outside_of_the_block_is_refused(log: MachineDirtyLog, first: int, count: int) -> None:
    with pytest.raises(ValueError, match="has 512 pages"):
        log.clear(RAM, first, count)


def test_a_refusal_by_kvm_names_the_block(log: MachineDirtyLog, slots: SlotLogs) -> None:
    slots.write(0, 7)
    assert fetched(log, RAM) == {7}
    slots.fails |= {"fetch", "clear"}
    with pytest.raises(MachineError, match=r"'pc.bios'.*KVM_fetch"):
        fetched(log, BIOS)
    if log.manual_clear:
        with pytest.raises(MachineError, match=r"'microvm.ram'.*KVM_clear"):
            log.clear(RAM, 0, 64)


@pytest.mark.parametrize("running", [True, False])
def test_all_is_protected_at_once_where_no_guest_has_to_wait_for_it(slots: SlotLogs, running: bool) -> None:
    slots.running = running
    log = MachineDirtyLog(slots, SLOTS, lambda: slots.running)  # type: ignore[arg-type]
    log.start()
    assert slots.at_once == [not running]


def test_what_was_not_reported_costs_no_call(log: MachineDirtyLog, slots: SlotLogs) -> None:
    slots.write(2, 70)
    assert fetched(log, RAM) == {256 + 70}
    slots.fails.add("clear")
    log.clear(RAM, 0, 256)
    log.clear(RAM, 384, 128)
    if log.manual_clear:
        with pytest.raises(MachineError):
            log.clear(RAM, 256, 128)


def test_a_start_that_fails_leaves_no_slot_logged(slots: SlotLogs) -> None:
    log = MachineDirtyLog(slots, SLOTS, lambda: slots.running)  # type: ignore[arg-type]
    slots.fails.add("start")
    with pytest.raises(MachineError, match="KVM_start"):
        log.start()
    assert slots.logged == set()
