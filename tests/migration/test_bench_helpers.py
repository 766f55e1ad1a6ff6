"""What the bench is made of measures what it says; speed itself is no test."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from qemumig.cli.guest import FILL_RANDOM, GuestParameters
from qemumig.cli.interrupts import Interrupts
from tests.support.host import qemumig_system, qemus
from tests.support.vmm import MIB, Stage, wait_until
from tools.benchlib import __main__ as bench
from tools.benchlib import barefile, baresocket, faults, toucher
from tools.benchlib.measure import Bench, Contestant, Run, summary
from tools.benchlib.plot import svg
from tools.benchlib.process import cpu_seconds, forget_peak, guest_resident, peak_overhead
from tools.benchlib.report import BARE_SOCKET, ratios, table
from tools.benchlib.workloads import WORKLOADS, Workload

MEASURED = [each for each in WORKLOADS if each.name in ("dirtying", "multifd-zstd")]


def test_summary_has_median_and_extremes_of_what_was_measured() -> None:
    figures = summary([Run(rate=3.0), Run(rate=1.0, total_ms=5.0), Run(rate=2.0)])
    assert figures["rate"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert figures["total_ms"]["median"] == 5.0
    assert "downtime_ms" not in figures
    assert len(figures["runs"]) == 3


def test_ratios_are_against_the_best_qemu_and_the_bare_socket() -> None:
    rates = {"qemumig": 900.0, "QEMU 1": 400.0, "QEMU 2": 600.0, BARE_SOCKET: 1000.0}
    results = {name: summary([Run(rate=rate)]) for name, rate in rates.items()}
    ratios(results, "qemumig")
    assert results["qemumig"]["ratio_to_best_qemu"] == 1.5
    assert results["QEMU 2"]["share_of_bare"] == 0.6
    assert results[BARE_SOCKET]["ratio_to_best_qemu"] is None
    assert "1.50" in table("title", results)


def test_the_longest_touches_are_the_waits() -> None:
    """16 buckets an octave from 1024 cycles on: bucket 16 begins at 2048, bucket 32 at 4096."""
    buckets = [0] * toucher.BUCKETS
    buckets[2], buckets[16], buckets[32] = 1000, 60, 40
    waits = toucher.longest(buckets, 90)
    assert (waits[2], waits[16], waits[32]) == (0, 50, 40)
    assert 2048 <= toucher.percentile(waits, 0.5) < 2048 * 17 / 16
    assert 4096 <= toucher.percentile(waits, 0.99) < 4096 * 17 / 16


@pytest.mark.needs("kvm", "userfaultfd")
def test_page_faults_are_measured_and_no_touch_is_lost() -> None:
    with Interrupts() as interrupts:
        results = faults.measure([Contestant("qemumig", qemumig_system())], 32 * MIB, 1, interrupts)
    (run,) = results["qemumig"]["runs"]
    assert run["requests"] == 0 or 0 < run["median_us"] <= run["p99_us"]
    assert run["all_there_ms"] > 0
    assert "qemumig" in faults.table(results, "qemumig")


def found() -> dict[str, Any]:
    """A run of two contestants, as --json has it."""
    runs = {"qemumig": (900.0, 1000.0), "QEMU <1>": (500.0, 500.0)}
    results = {name: summary([Run(rate=one, total_ms=7.0) for one in rates]) for name, rates in runs.items()}
    ratios(results, "qemumig")
    return {"host": bench.host(), "memory": 1 << 30, "repeat": 2, "workloads": {"dirtying": results}}


def test_picture_has_a_bar_for_each_figure_that_was_measured_and_whiskers_where_runs_differ() -> None:
    picture = ElementTree.fromstring(svg(found()))
    space = "{http://www.w3.org/2000/svg}"
    bars = [
        float(bar.attrib["width"]) for bar in picture.iter(f"{space}rect") if "fill" in bar.attrib and "x" in bar.attrib
    ]
    assert bars == [104.5, 55.0, 110.0, 110.0]  # rates against the highest of 1000, then total times
    assert len(list(picture.iter(f"{space}path"))) == 1
    texts = [text.text for text in picture.iter(f"{space}text")]
    assert {"QEMU <1>", "qemumig", "950", "500", "7", "dirtying, 1024 MiB, 2 runs each"} <= set(texts)


def test_former_run_is_shown_and_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(found()))
    argv = ["bench", "--from", str(tmp_path / "run.json"), "--plot", str(tmp_path / "run.svg")]
    monkeypatch.setattr("sys.argv", argv)
    assert bench.main() == 0
    assert (tmp_path / "run.svg").read_text() == svg(found())
    assert "950 (900..1000)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"workloads": {"x": {"y": {}}}, "memory": 1}'])
def test_what_is_no_former_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "run.json").write_text(text)
    monkeypatch.setattr("sys.argv", ["bench", "--from", str(tmp_path / "run.json")])
    assert bench.main() == 1
    assert "is nothing that --json wrote" in capsys.readouterr().err


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
@pytest.mark.parametrize("cpus", [1, 4])
def test_guest_of_a_workload_stays_inside_memory(workload: Workload, cpus: int) -> None:
    guest = workload.guest(256 * MIB, cpus)
    assert guest.dirty_base + guest.dirty_pages * 4096 <= guest.fill_base
    assert guest.fill_base + guest.fill_pages * 4096 <= 256 * MIB
    assert guest.print_every >= 1


@pytest.mark.usefixtures("no_leaks")
def test_bare_socket_carries_everything() -> None:
    for sockets in (1, 2):
        run = baresocket.measure(8 * MIB + 5, sockets)
        assert run.seconds > 0
        assert run.cpu >= 0


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("half", ["save", "restore"])
def test_bare_file_takes_everything(directory: Path, half: str) -> None:
    run = barefile.measure(5 * MIB + 4096, directory / "bare", half, 2)
    assert run.seconds > 0
    assert (directory / "bare").stat().st_size == 5 * MIB + 4096


def test_resident_guest_memory_is_what_the_guest_has_touched(stage: Stage, qemu: str) -> None:
    vmm = stage.vmm("source", qemu, guest=GuestParameters(fill_pages=16 * MIB // 4096, fill_mode=FILL_RANDOM))
    assert 16 * MIB <= guest_resident(vmm) <= 48 * MIB
    forget_peak(vmm)
    assert 0 < peak_overhead(vmm) < 256 * MIB


def test_vcpu_time_is_left_out(stage: Stage, qemu: str) -> None:
    """The guest spins without pause; half a second of it must not show."""
    vmm = stage.vmm("source", qemu)
    passes, spent = vmm.guest_status()[0].passes, cpu_seconds(vmm)
    until = time.monotonic() + 0.5
    wait_until(lambda: time.monotonic() > until and vmm.guest_status()[0].passes > passes, "the guest runs")
    assert cpu_seconds(vmm) - spent < 0.4


@pytest.mark.parametrize("workload", MEASURED, ids=lambda workload: workload.name)
@pytest.mark.usefixtures("no_leaks")
def test_one_migration_gives_every_figure(workload: Workload, qemu: str) -> None:
    with Interrupts() as interrupts:
        run = Bench(96 * MIB, 1, 300, 60, interrupts).migrate(Contestant("x", qemu), workload)
    assert run.rate > 0
    assert run.total_ms is not None
    assert run.cpu_source is not None
    assert (run.silence_ms is not None) == workload.running


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.needs("kvm")
def test_a_half_of_a_way_through_a_file_has_the_cost_of_its_end(directory: Path) -> None:
    workload = next(each for each in WORKLOADS if each.file == "restore")
    with Interrupts() as interrupts:
        run = Bench(96 * MIB, 1, 300, 60, interrupts, directory).migrate(Contestant("x", qemumig_system()), workload)
    assert run.rate > 0
    assert run.cpu_source is None and run.cpu_destination is not None
    assert not list(directory.iterdir())


@pytest.mark.usefixtures("no_leaks")
def test_who_lacks_what_a_workload_asks_for_is_left_out(qemu: str, capsys: pytest.CaptureFixture[str]) -> None:
    strange = replace(WORKLOADS[0], name="strange", capabilities=("thought-transfer",), data_bound=False)
    with Interrupts() as interrupts:
        results = bench.measure_workload(Bench(96 * MIB, 1, 300, 60, interrupts), strange, [Contestant("x", qemu)], 2)
    assert results == {}
    assert capsys.readouterr().err == "strange: x is left out: it has no thought-transfer\n"


def test_version_is_read_from_the_program(qemu: str) -> None:
    assert bench.version(qemu)[0].isdigit()
    assert qemu in qemus()
