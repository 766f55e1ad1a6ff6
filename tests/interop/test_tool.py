"""What tools/interop is made of does what it says; the migrations themselves are in test_precopy.py."""

from __future__ import annotations

import json

import pytest

from tests.support.host import qemumig_system
from tests.support.vmm import MIB
from tools.interoplib import __main__ as tool
from tools.interoplib.guests import BASE, CHECKING, DIRTY, DIRTYING, guest
from tools.interoplib.journey import random_trial
from tools.interoplib.matrix import Cell, Column, Row, columns, rows
from tools.interoplib.peers import Peer, options, ours, real
from tools.interoplib.report import as_json, footnotes, markdown, table

OURS = Peer("qemumig", "none")
OLD, NEW = Peer("7.2", "none", (7, 2)), Peer("10.0", "none", (10, 0))


def test_option_for_an_old_destination_is_given_to_a_new_source_only() -> None:
    assert "send-switchover-start=off" in options(NEW, OLD).source
    for pair in ((NEW, NEW), (OLD, NEW), (OLD, OLD), (NEW, OURS), (OURS, OLD)):
        assert options(*pair).source == options(*pair).destination == ""


def test_file_transport_came_with_8_2() -> None:
    assert not OLD.has("file")
    assert NEW.has("file") and OURS.has("file") and Peer("8.2.0", "none", (8, 2, 0)).has("file")
    assert OLD.has("tcp")


@pytest.mark.parametrize("row", rows(quick=False), ids=str)
def test_guest_of_every_row_fits_into_its_memory(row: Row) -> None:
    parameters = guest(row.kind, row.memory, row.cpus)
    low, high = min(row.memory, 3 << 30), max(0, row.memory - (3 << 30))
    end = parameters.dirty_base + parameters.dirty_pages * 4096
    assert end <= low or (4 << 30) < end <= (4 << 30) + high
    assert parameters.fill_base >= BASE and parameters.fill_base + parameters.fill_pages * 4096 <= low
    assert parameters.fill_base >= end or parameters.dirty_base >= 4 << 30
    assert end <= parameters.map_gib << 30


def test_large_memory_is_rewritten_above_four_gib() -> None:
    assert guest(CHECKING, 4 << 30, 1).dirty_base > 4 << 30
    assert guest(DIRTYING, 512 * MIB, 1).dirty_pages * 4096 == DIRTY[DIRTYING]


@pytest.mark.parametrize("seed", range(200))
def test_random_migration_is_made_of_its_seed_and_its_guest_fits(seed: int) -> None:
    made = random_trial(seed, OURS, [OLD, NEW])
    assert str(made) == str(random_trial(seed, OURS, [OLD, NEW]))
    trial = made.trial
    assert (trial.destination if seed % 2 else trial.source) is OURS
    assert trial.source.has(trial.transport) and trial.destination.has(trial.transport)
    assert trial.guest.fill_base + trial.guest.fill_pages * 4096 <= trial.memory
    assert trial.guest.dirty_pages >= trial.guest.cpus


@pytest.mark.parametrize("seed", range(200))
def test_random_multifd_asks_no_version_for_what_it_lacks(seed: int) -> None:
    made = random_trial(seed, OURS, [OLD, NEW], multifd=True)
    assert str(made) == str(random_trial(seed, OURS, [OLD, NEW], multifd=True))
    trial, multifd = made.trial, made.trial.multifd
    assert multifd is not None and trial.transport in ("tcp", "unix")
    assert 1 <= multifd.channels <= 16
    if trial.source is OLD:
        assert not multifd.detection and not multifd.each_section
    if trial.destination is OLD:
        assert multifd.each_section and multifd.detection != "multifd"
    ends = ((trial.source, True), (trial.destination, False))
    told = {peer.name for peer, is_source in ends if multifd.options(peer, is_source=is_source)}
    knows_both = {"10.0", *(("qemumig",) if trial.source is OURS else ())} & {trial.source.name, trial.destination.name}
    assert told == (knows_both if multifd.each_section else set())
    assert not multifd.zero_copy or (multifd.method == "none" and trial.transport == "tcp")


def cells() -> list[Cell]:
    to_old, to_new = Column(OURS, OLD), Column(OURS, NEW)
    return [
        Cell(Row("tcp", 1, 64 * MIB), to_old, "ok", total_ms=31, downtime_ms=3),
        Cell(Row("tcp", 1, 64 * MIB), to_new, "failed", "the guest found a fault"),
        Cell(Row("file", 1, 64 * MIB), to_old, "lacking", "QEMU 7.2 has no file:"),
        Cell(Row("file", 1, 64 * MIB), to_new, "ok", total_ms=5, downtime_ms=1),
    ]


def test_tables_show_what_failed_and_what_is_not_there() -> None:
    plain = table(cells())
    assert "ok 31/3 ms" in plain and plain.count("FAILED") == 1 and plain.count("–") == 1
    counted = markdown(cells())
    assert "| `tcp` | checking | 1 | 64M | 1 of 1 | 0 of 1 |" in counted
    assert "| `file` | checking | 1 | 64M | – | 1 of 1 |" in counted
    assert footnotes(cells()) == [
        "– QEMU 7.2 has no file:",
        "FAILED tcp, 1 vCPU, 64M, checking, qemumig → 10.0: the guest found a fault",
    ]
    assert as_json(cells())[1]["cells"]["qemumig → 7.2"] == {"result": "lacking", "error": "QEMU 7.2 has no file:"}


def test_control_adds_every_qemu_to_every_qemu() -> None:
    assert [str(column) for column in columns(OURS, [OLD])] == ["qemumig → 7.2", "7.2 → qemumig"]
    assert str(columns(OURS, [OLD, NEW], control=True)[-2]) == "10.0 → 7.2"


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["tools/interop", *arguments])
    return tool.main()


@pytest.mark.usefixtures("no_leaks")
def test_matrix_of_one_row_comes_out_as_json(
    qemu: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = ("--quick", "--transport", "unix", "--memory", "64", "--json")
    assert run_tool(monkeypatch, "--system", qemumig_system(), "--qemu", qemu, *choice) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    name = real(qemu).name
    assert found["ok"] and found["qemus"] == {name: qemu}
    assert {column: cell["result"] for column, cell in found["rows"][0]["cells"].items()} == {
        f"qemumig → {name}": "ok",
        f"{name} → qemumig": "ok",
    }
    assert "2/2 unix, 2 vCPUs, 64M, checking" in shown.err


@pytest.mark.usefixtures("no_leaks")
def test_cell_that_fails_is_told_and_makes_exit_status_1(
    qemu: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = f"{qemu} -M accel=none-such"
    choice = ("--quick", "--transport", "tcp", "--memory", "64")
    assert run_tool(monkeypatch, "--system", broken, "--qemu", qemu, *choice) == 1
    assert "FAILED tcp, 2 vCPUs, 64M, checking, qemumig → " in capsys.readouterr().out


def test_without_a_row_or_a_qemu_it_says_so(
    qemu: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, "--qemu", qemu, "--memory", "7") == 1
    assert "no row of the matrix" in capsys.readouterr().err
    assert run_tool(monkeypatch, "--qemu", "/nonexistent/qemu") == 1
    assert "/nonexistent/qemu does not tell its version" in capsys.readouterr().err


def test_our_own_vmm_has_no_version_to_mind() -> None:
    system = ours("some-command")
    assert not system.is_since(1) and not system.is_before(99)
