"""The fake machine keeps the contract of `qemumig/machine.py`, traps included."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from qemumig.errors import MachineError
from qemumig.machine import DirtyLog, Machine
from qemumig.qapi import RunState
from qemumig.savevm.reader import BytesReader
from tests.support.fake_machine import PAGE, FakeGuest, FakeMachine, empty_words, pages_in
from tests.support.vmm import wait_until

Make = Callable[..., FakeMachine]


@pytest.fixture
def make() -> Iterator[Make]:
    made = []

    def machine(**options: object) -> FakeMachine:
        made.append(FakeMachine(1 << 20, **options))  # type: ignore[arg-type]
        return made[-1]

    yield machine
    for each in made:
        each.close()


@pytest.fixture(params=[True, False], ids=["manual-clear", "clear-on-fetch"])
def logging_machine(request: pytest.FixtureRequest, make: Make) -> FakeMachine:
    machine = make(manual_clear=request.param)
    machine.dirty_log.start()
    return machine


def fetched(machine: FakeMachine) -> list[int]:
    words = empty_words(machine.ram)
    machine.dirty_log.fetch(machine.ram, words)
    return pages_in(words)


def test_fake_has_the_shape_of_a_machine(make: Make) -> None:
    machine: Machine = make()
    log: DirtyLog = machine.dirty_log
    assert [block.idstr for block in machine.ram_blocks] == ["microvm.ram", "pc.bios"]
    assert log.manual_clear


def test_log_starts_empty(logging_machine: FakeMachine) -> None:
    assert fetched(logging_machine) == []


def test_store_over_a_page_border_marks_both_pages(logging_machine: FakeMachine) -> None:
    logging_machine.write(logging_machine.ram, 3 * PAGE - 1, b"ab")
    assert fetched(logging_machine) == [2, 3]


def test_fetch_leaves_bits_that_are_set(logging_machine: FakeMachine) -> None:
    words = empty_words(logging_machine.ram)
    words[1] = 1
    logging_machine.write(logging_machine.ram, 0, b"a")
    logging_machine.dirty_log.fetch(logging_machine.ram, words)
    assert pages_in(words) == [0, 64]


def test_page_is_reported_until_it_is_cleared(make: Make) -> None:
    machine = make()
    machine.dirty_log.start()
    machine.write(machine.ram, 0, b"a")
    assert fetched(machine) == fetched(machine) == [0]
    machine.dirty_log.clear(machine.ram, 0, 64)
    assert fetched(machine) == []
    machine.write(machine.ram, 0, b"a")
    assert fetched(machine) == [0]


def test_without_manual_clear_a_fetch_reports_a_page_once(make: Make) -> None:
    machine = make(manual_clear=False)
    machine.dirty_log.start()
    machine.write(machine.ram, 0, b"a")
    assert (fetched(machine), fetched(machine)) == ([0], [])


def test_clear_spares_pages_that_the_last_fetch_did_not_report(make: Make) -> None:
    machine = make()
    machine.dirty_log.start()
    machine.write(machine.ram, 0, b"a")
    assert fetched(machine) == [0]
    machine.write(machine.ram, PAGE, b"b")
    machine.dirty_log.clear(machine.ram, 0, 64)
    assert fetched(machine) == [1]


def test_clear_works_once_per_report(make: Make) -> None:
    machine = make()
    machine.dirty_log.start()
    machine.write(machine.ram, 0, b"a")
    assert fetched(machine) == [0]
    machine.dirty_log.clear(machine.ram, 0, 64)
    machine.write(machine.ram, 0, b"b")
    machine.dirty_log.clear(machine.ram, 0, 64)
    assert fetched(machine) == [0]


def test_store_between_fetch_and_clear_leaves_no_mark(make: Make) -> None:
    """The trap: who reads the page before clearing it loses this store."""
    machine = make()
    machine.dirty_log.start()
    machine.write(machine.ram, 0, b"a")
    assert fetched(machine) == [0]
    machine.write(machine.ram, 0, b"b")
    machine.dirty_log.clear(machine.ram, 0, 64)
    assert fetched(machine) == []


def test_no_store_is_lost_to_a_racing_fetch_and_clear(logging_machine: FakeMachine) -> None:
    """Clear, then read: the copy made that way catches up with every store of another thread."""
    machine, pages = logging_machine, 64
    done = threading.Event()

    def store() -> None:
        for count in range(1, 3000):
            machine.write(machine.ram, count % pages * PAGE, count.to_bytes(8, "little"))
        done.set()

    writer = threading.Thread(target=store)
    writer.start()
    copies = [bytes(8)] * pages
    last_round = False
    while not last_round:
        last_round = done.is_set()
        found = fetched(machine)
        machine.dirty_log.clear(machine.ram, 0, 64)
        for page in found:
            copies[page] = machine.read(machine.ram, page * PAGE, 8)
    writer.join()
    assert copies == [machine.read(machine.ram, page * PAGE, 8) for page in range(pages)]


@pytest.mark.parametrize(("first", "count"), [(1, 64), (0, 63), (-64, 64), (192, 128)])
def test_clear_of_no_whole_words_is_refused(make: Make, first: int, count: int) -> None:
    machine = make()
    machine.dirty_log.start()
    with pytest.raises(ValueError, match="no range of whole words"):
        machine.dirty_log.clear(machine.ram, first, count)


def test_log_that_was_not_started_says_so(make: Make) -> None:
    machine = make()
    with pytest.raises(MachineError, match="fetch of a dirty log that was not started"):
        fetched(machine)


def test_guest_goes_on_where_its_memory_arrives(make: Make) -> None:
    here, there = make(), make()
    guest = FakeGuest(here, pages=10)
    guest.step(25)
    there.write(there.ram, 0, here.read(here.ram, 0, 1 << 20))
    arrived = FakeGuest(there, pages=10)
    arrived.step(10)
    assert (arrived.passes, arrived.bad_page) == (3, None)


def test_guest_finds_a_stale_page(make: Make) -> None:
    machine = make()
    guest = FakeGuest(machine, pages=10)
    guest.step(20)
    stale = FakeGuest.FIRST_PAGE + 4
    machine.write(machine.ram, stale * PAGE, bytes(8))
    guest.step(20)
    assert guest.bad_page == stale


def test_guest_runs_while_the_machine_runs(make: Make) -> None:
    machine = make(guest=True)
    assert machine.guest is not None
    machine.start()
    wait_until(lambda: machine.guest is not None and machine.guest.passes > 1, "two passes")
    machine.stop(RunState.PAUSED)
    before = machine.digests()
    assert machine.guest.bad_page is None
    assert machine.digests() == before
    assert machine.history == [RunState.PRELAUNCH, RunState.RUNNING, RunState.PAUSED]


def test_device_state_survives_its_own_wire_form(make: Make) -> None:
    here, there = make(cpus=2), make(cpus=2)
    here.records["cpu", 1].eip = 0x1234
    loaded = []
    for section, record in here.save_device_state():
        data, _ = section.vmstate.save(record)
        loaded.append((section, section.vmstate.load(BytesReader(data), section.vmstate.version_id)))
    there.load_device_state(loaded)
    assert there.records["cpu", 1].eip == 0x1234
    assert there.loads == 1


def test_running_machine_gives_no_device_state(make: Make) -> None:
    machine = make()
    machine.start()
    with pytest.raises(MachineError, match="cannot save the device state of a machine that runs"):
        machine.save_device_state()


def test_discarded_ram_reads_as_zeroes(make: Make) -> None:
    machine = make()
    empty = machine.digests()
    machine.write(machine.ram, 5, b"a")
    machine.discard_ram()
    assert machine.digests() == empty
