"""Fixtures and marks that every test may use, and the account of what was skipped.

@pytest.mark.needs("kvm", "qemu")    skipped, with the reason, where the host lacks one of them
directory                            a short-named scratch directory (Unix socket paths end at 107 bytes)
stage                                starts VMMs and ends them after the test; see support/vmm.py
qemu                                 the test runs once with every real QEMU there is
no_leaks                             the test must leave no thread, child or descriptor behind
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis.configuration import set_hypothesis_home_dir

from tests.support import host
from tests.support.vmm import Leaks, Stage

set_hypothesis_home_dir(Path(__file__).parents[1] / ".venv" / "cache" / "hypothesis")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"needs(*names): what the host must have; of {', '.join(host.PROBES)}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for name in mark.args:
            if reason := host.missing(name):
                pytest.skip(reason)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "qemu" in metafunc.fixturenames:
        names = host.qemus() or ("",)
        metafunc.parametrize("qemu", names, ids=[Path(name).name or "no-qemu" for name in names], indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """The very last lines of a run: how many tests were skipped, and what was missing."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or config.option.collectonly:
        return
    skipped = reporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    reporter.write_line(f"skipped: {len(skipped)} tests" + (", missing:" if reasons else ", nothing was missing"))
    for reason, count in reasons.most_common():
        reporter.write_line(f"  {count} tests: {reason}")


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="qmt-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def qemu(request: pytest.FixtureRequest) -> str:
    if reason := host.missing("qemu") or host.missing("kvm"):
        pytest.skip(reason)
    name: str = request.param
    return name


@pytest.fixture
def stage(directory: Path) -> Iterator[Stage]:
    if reason := host.missing("kvm"):
        pytest.skip(reason)
    stage = Stage(directory)
    yield stage
    stage.close()


@pytest.fixture
def no_leaks() -> Iterator[None]:
    leaks = Leaks()
    yield
    leaks.check()
