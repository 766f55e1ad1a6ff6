import ctypes
from collections.abc import Iterator

import pytest

from kvm import Kvm, KvmError
from kvm.dirty_log import DirtyLog
from kvm.ioctls import Cap
from kvm.vcpu import HaltExit, IoExit

from .machines import CODE, Program, TinyGuest, needs_kvm

pytestmark = needs_kvm

PAGES = 70  # of RAM: the bitmap's last word is not full
# mov byte [0x3000],1; mov byte [0x5fff],1; out 0x10,al; mov byte [0x5000],2; out 0x10,al; hlt
WRITER = "c606003001 c606ff5f01 e610 c606005002 e610 f4"
FIRST = {3, 5}
SECOND = {5}


def offered_flags() -> int:
    with Kvm() as kvm:
        return kvm.check_extension(Cap.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)


def dirty_pages(words: memoryview) -> set[int]:
    return {64 * at + bit for at, word in enumerate(words) for bit in range(64) if word >> bit & 1}


def bitmap(pages: int) -> memoryview:
    return memoryview(bytearray((pages + 63) // 64 * 8)).cast("Q")


def fetch(log: DirtyLog, slot: int = 0) -> set[int]:
    words = bitmap(log.vm.slots[slot].pages)
    words[0] = 0xDEAD  # what was there before must not shine through
    log.fetch(slot, words)
    return dirty_pages(words)


def clear(log: DirtyLog, pages: set[int], slot: int = 0) -> None:
    words = bitmap(log.vm.slots[slot].pages)
    for page in pages:
        words[page // 64] |= 1 << page % 64
    log.clear(slot, words, 0, log.vm.slots[slot].pages)


@pytest.fixture
def program() -> Iterator[Program]:
    with Program(WRITER, PAGES * 4096) as made:
        yield made


@pytest.fixture
def manual(program: Program) -> DirtyLog:
    if not offered_flags() & 1:
        pytest.skip("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is missing")
    log = DirtyLog(program.vm)
    log.start(0)
    clear(log, set(range(PAGES)))
    return log


def run_to_exit(program: Program) -> None:
    assert isinstance(program.vcpu.run_once(), IoExit)


def test_mode_is_manual_where_it_is_offered_and_wished(program: Program) -> None:
    flags = offered_flags()
    log = DirtyLog(program.vm)
    assert (log.manual, log.initially_set) == (bool(flags & 1), flags & 3 == 3)


def test_mode_is_automatic_on_request(program: Program) -> None:
    log = DirtyLog(program.vm, manual=False)
    assert (log.manual, log.initially_set) == (False, False)


# -- automatic ------------------------------------------------------------------------------------------------


def test_automatic_fetch_reports_and_forgets(program: Program) -> None:
    log = DirtyLog(program.vm, manual=False)
    log.start(0)
    assert fetch(log) == set()
    run_to_exit(program)
    assert fetch(log) == FIRST
    assert fetch(log) == set()
    run_to_exit(program)
    assert fetch(log) == SECOND
    assert fetch(log) == set()


def test_automatic_log_has_nothing_to_clear(program: Program) -> None:
    log = DirtyLog(program.vm, manual=False)
    log.start(0)
    with pytest.raises(KvmError, match="this log clears itself"):
        log.clear(0, bitmap(PAGES), 0, 64)


# -- manual ---------------------------------------------------------------------------------------------------


def test_manual_log_starts_with_every_page_where_the_kernel_says_so(program: Program) -> None:
    log = DirtyLog(program.vm)
    log.start(0)
    assert fetch(log) == (set(range(PAGES)) if log.initially_set else set())


def test_a_log_that_protects_at_once_starts_with_no_page_and_misses_none(program: Program) -> None:
    """It is the caller's choice at each start."""
    log = DirtyLog(program.vm)
    for at_once in (True, False, True):
        log.start(0, at_once=at_once)
        assert fetch(log) == (set(range(PAGES)) if log.initially_set and not at_once else set())
        if at_once:
            run_to_exit(program)
            assert fetch(log) in (FIRST, SECOND)
        log.stop(0)


def test_manual_fetch_repeats_until_the_page_is_cleared(manual: DirtyLog, program: Program) -> None:
    assert fetch(manual) == set()
    run_to_exit(program)
    assert fetch(manual) == FIRST
    assert fetch(manual) == FIRST
    clear(manual, {3})
    assert fetch(manual) == FIRST - {3}
    clear(manual, {5})
    assert fetch(manual) == set()


def test_write_after_the_clear_is_reported_again(manual: DirtyLog, program: Program) -> None:
    run_to_exit(program)
    assert fetch(manual) == FIRST
    clear(manual, FIRST)
    run_to_exit(program)
    assert fetch(manual) == SECOND


def test_write_between_fetch_and_clear_is_seen_by_a_reader_after_the_clear(manual: DirtyLog, program: Program) -> None:
    run_to_exit(program)
    assert fetch(manual) == FIRST
    run_to_exit(program)  # page 5 once more
    clear(manual, FIRST)
    assert fetch(manual) == set()
    assert program.ram.read(0x5000, 1) == b"\x02"  # so its bytes, read now, are the newest


def test_clear_takes_a_part_of_the_slot(manual: DirtyLog, program: Program) -> None:
    run_to_exit(program)
    words = bitmap(64)
    words[0] = (1 << 64) - 1
    manual.clear(0, words, 64, PAGES - 64)  # the unaligned end; pages 3 and 5 are not in it
    assert fetch(manual) == FIRST
    manual.clear(0, words, 0, 64)
    assert fetch(manual) == set()


@pytest.mark.parametrize(
    ("first", "count", "finding"),
    [
        (1, 64, "expected multiples of 64"),
        (0, 63, "expected multiples of 64"),
        (64, 5, "expected multiples of 64"),
        (64, 64, "the slot has 70 pages"),
        (128, 64, "the slot has 70 pages"),
        (-64, 64, "the slot has 70 pages"),
        (0, 0, "the slot has 70 pages"),
        (0, 1 << 32, "the slot has 70 pages"),
    ],
)
def test_crooked_clear_is_refused(manual: DirtyLog, first: int, count: int, finding: str) -> None:
    with pytest.raises(KvmError, match=rf"KVM_CLEAR_DIRTY_LOG \(slot 0, {count} pages from {first}: {finding}"):
        manual.clear(0, bitmap(PAGES), first, count)


def test_clear_needs_a_bit_for_every_page(manual: DirtyLog) -> None:
    with pytest.raises(KvmError, match="a bitmap of 8 bytes for 70 pages, expected 16 bytes or more"):
        manual.clear(0, bitmap(64), 0, PAGES)


# -- both -----------------------------------------------------------------------------------------------------


def test_fetch_needs_a_bit_for_every_page(program: Program) -> None:
    log = DirtyLog(program.vm)
    log.start(0)
    with pytest.raises(KvmError, match=r"KVM_GET_DIRTY_LOG \(slot 0: a bitmap of 8 bytes for 70 pages"):
        log.fetch(0, bitmap(64))


def test_fetch_writes_nothing_behind_the_slots_last_word(program: Program) -> None:
    log = DirtyLog(program.vm)
    log.start(0)
    words = bitmap(4 * 64)
    words[2] = 0x1234
    log.fetch(0, words)
    assert words[2] == 0x1234


def test_fetch_takes_a_ctypes_array(program: Program) -> None:
    log = DirtyLog(program.vm, manual=False)
    log.start(0)
    run_to_exit(program)
    words = (ctypes.c_uint64 * 2)()
    log.fetch(0, words)
    assert list(words) == [1 << 3 | 1 << 5, 0]


def test_buffer_that_cannot_be_written_is_refused(program: Program) -> None:
    log = DirtyLog(program.vm)
    log.start(0)
    with pytest.raises(TypeError, match="not writable"):
        log.fetch(0, bytes(16))


def test_slot_without_a_log_cannot_be_fetched(program: Program) -> None:
    log = DirtyLog(program.vm)
    with pytest.raises(KvmError, match=r"\[Errno 2\] KVM_GET_DIRTY_LOG \(slot 0\): No such file"):
        fetch(log)
    log.start(0)
    fetch(log)
    log.stop(0)
    with pytest.raises(KvmError, match=r"KVM_GET_DIRTY_LOG \(slot 0\)"):
        fetch(log)


def test_unknown_slot_is_refused(program: Program) -> None:
    log = DirtyLog(program.vm)
    for use in (log.start, log.stop):
        with pytest.raises(KvmError, match=r"slot 7, known are \[0\]"):
            use(7)
    with pytest.raises(KvmError, match=r"KVM_GET_DIRTY_LOG \(slot 7, known are \[0\]\)"):
        log.fetch(7, bitmap(64))


def test_starting_twice_keeps_what_was_logged(program: Program) -> None:
    log = DirtyLog(program.vm, manual=False)
    log.start(0)
    run_to_exit(program)
    log.start(0)
    assert fetch(log) == FIRST


def test_stopped_log_lets_the_guest_write_on(program: Program) -> None:
    log = DirtyLog(program.vm, manual=False)
    log.start(0)
    run_to_exit(program)
    log.stop(0)
    run_to_exit(program)
    assert isinstance(program.vcpu.run_once(), HaltExit)
    assert program.ram.read(0x5000, 1) == b"\x02"


def test_writes_of_the_host_are_not_logged(program: Program) -> None:
    log = DirtyLog(program.vm, manual=False)
    log.start(0)
    program.ram.write(CODE, b"\xf4")
    assert fetch(log) == set()


@pytest.mark.parametrize("request_name", ["KVM_GET_DIRTY_LOG", "KVM_CLEAR_DIRTY_LOG"])
def test_dead_descriptor_names_the_request(manual: DirtyLog, request_name: str) -> None:
    fd, manual.vm.fd = manual.vm.fd, -1
    words = bitmap(PAGES)
    with pytest.raises(KvmError, match=rf"\[Errno 9\] {request_name} \(slot 0.*\): Bad file descriptor"):
        if request_name == "KVM_GET_DIRTY_LOG":
            manual.fetch(0, words)
        else:
            manual.clear(0, words, 0, PAGES)
    manual.vm.fd = fd


@pytest.mark.parametrize("wish", [False, True])
def test_log_holds_exactly_the_pages_that_the_tiny_guest_writes(wish: bool) -> None:
    """At full speed, page by page: the 64 pages of its walk, from 16 MiB on, in the slot that starts at 1 MiB."""
    with TinyGuest(pages=64) as guest:
        vcpu = guest.vcpus[0]

        def run_until_printed(count: int) -> None:
            while len(guest.output) < count:
                guest.handle_exit(vcpu.run_once())

        run_until_printed(2)
        log = DirtyLog(guest.vm, manual=wish)
        log.start(0, 1, 2, 3)
        if log.manual:
            for slot in range(4):
                clear(log, set(range(guest.vm.slots[slot].pages)), slot)
        run_until_printed(4)
        walk = (16 - 1) * 256
        assert fetch(log, 2) == set(range(walk, walk + 64))
        assert fetch(log, 1) == fetch(log, 3) == set()
        assert 1 in fetch(log, 0)  # its status block
        log.stop(0, 1, 2, 3)
        assert guest.status()[1] == 0
