"""The demonstration: it proves what it says with every VMM, and cleans up whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qemumig.cli import main
from tests.support.host import qemumig_system
from tests.support.vmm import children

SMALL = ["demo", "--memory", "96M", "--dirty", "8M", "--timeout", "60"]
COMMAND = [sys.executable, "-c", "import sys; from qemumig.cli import main; sys.exit(main())"]


def check_proof(output: str) -> None:
    result = json.loads(output)
    assert result["ok"]
    assert len(result["checks"]) == 3
    for hop in (result["there"], result["back"]):
        assert hop["pages"]["normal"] >= (8 << 20) // 4096
        assert hop["rounds"]
        assert sum(done["sent"] for done in hop["rounds"]) <= hop["transferred_bytes"]
    there = result["there"]
    assert 0 < there["cadence_ms"] < there["longest_silence_ms"]
    assert there["silence_ms"] <= there["longest_silence_ms"]


@pytest.mark.usefixtures("no_leaks")
def test_demo_proves_a_migration_between_real_qemus(
    qemu: str, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    assert main([*SMALL, "--system", qemu, "--json"]) == 0
    check_proof(capsys.readouterr().out)
    assert list(directory.iterdir()) == []


@pytest.mark.needs("kvm")
@pytest.mark.usefixtures("no_leaks")
def test_demo_proves_a_migration_between_our_own(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    assert main([*SMALL, "--system", qemumig_system(), "--json"]) == 0
    check_proof(capsys.readouterr().out)
    assert list(directory.iterdir()) == []


@pytest.mark.needs("kvm", "userfaultfd")
@pytest.mark.usefixtures("no_leaks")
def test_demo_of_postcopy_tells_what_the_guest_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--postcopy", "--json"]) == 0
    output = capsys.readouterr().out
    check_proof(output)
    for hop in ("there", "back"):
        facts = json.loads(output)[hop]["postcopy"]
        assert facts["seconds"] > 0
        assert facts["waits"] >= 0 and facts["blocked_ms"] is not None


def test_plain_output_tells_rounds_figures_and_proof(qemu: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--system", qemu]) == 0
    text = capsys.readouterr().out
    for words in ("source → destination", "destination → return", "guest dirties", "the guest was silent for"):
        assert words in text
    assert text.count("✓") == 3


def interrupt_during_migration(system: str, directory: Path) -> None:
    """Start a demo of its own, send it SIGINT when its first migration begins, and look for what it left."""
    demo = subprocess.Popen(
        [*COMMAND, *SMALL, "--system", system],
        env={**os.environ, "TMPDIR": str(directory), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert demo.stdout is not None
    for line in demo.stdout:
        if "source → destination" in line:
            break
    vmms = children(demo.pid)
    demo.send_signal(signal.SIGINT)
    _, errors = demo.communicate(timeout=30)
    assert len(vmms) == 2
    assert demo.returncode == 128 + signal.SIGINT
    assert errors == "qemumig demo: interrupted by SIGINT\n"
    assert list(directory.iterdir()) == []
    assert [pid for pid in vmms if Path(f"/proc/{pid}").exists()] == []


@pytest.mark.usefixtures("no_leaks")
def test_interrupted_demo_of_real_qemus_leaves_nothing_behind(qemu: str, directory: Path) -> None:
    interrupt_during_migration(qemu, directory)


@pytest.mark.needs("kvm")
@pytest.mark.usefixtures("no_leaks")
def test_interrupted_demo_of_our_own_leaves_nothing_behind(directory: Path) -> None:
    interrupt_during_migration(qemumig_system(), directory)


@pytest.mark.usefixtures("no_leaks")
def test_failure_of_a_vmm_ends_the_demo_with_a_sentence(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    assert main([*SMALL, "--system", "/bin/false"]) == 1
    assert capsys.readouterr().err == "qemumig demo: source did not start, it ended with status 1\n"
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory", "16M"], "--dirty 33554432 bytes: at least a page per vCPU, and at most 0 bytes fit"),
        (["--cpus", "17"], "--cpus 17: 1 to 16 are possible"),
        (["--timeout", "0"], "--timeout must be above 0"),
    ],
)
def test_impossible_figures_are_refused(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *options]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "0", "1T", "M", "1.5G", "-1"])
def test_size_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["demo", f"--memory={text}"])
    assert caught.value.code == 2
    assert "is no size" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "demo" in capsys.readouterr().out
