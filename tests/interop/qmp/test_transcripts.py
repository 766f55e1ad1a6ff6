"""The same script, spoken to a real QEMU and to qemumig-system: the transcripts are the same (qmp.md).

Where a QEMU of another version has other words, the step says so and is left out with it: the dialect spoken here is
that of QEMU 10.0.

Differences that are meant, and have no step: capability `return-path` is on by default here; what is not built yet says
so; writing memory to a full disk is an error here; a `migrate-incoming` that failed may be tried again here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.support.host import qemumig_system
from tests.support.vmm import MIB, GuestParameters, Stage

from .scripts import SCRIPTS
from .speaker import Speaker, version_of
from .steps import Step, shape

pytestmark = pytest.mark.usefixtures("no_leaks")


def agree(step: Step, ours: list[Any], theirs: list[Any]) -> bool:
    if not step.part:
        return ours == theirs
    return [entry for entry in ours[-1]["return"] if entry not in theirs[-1]["return"]] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_script_has_the_same_transcript(stage: Stage, qemu: str, script: str) -> None:
    version = version_of(qemu)
    incoming = script == "migration to here"
    differences = []
    with (
        Speaker(stage, "qemu", qemu, incoming=incoming) as peer,
        Speaker(stage, "ours", qemumig_system(), incoming=incoming) as here,
    ):
        assert shape(here.greeting) == shape(peer.greeting)
        assert here.greeting["QMP"]["capabilities"] == peer.greeting["QMP"]["capabilities"]
        for speaker in (here, peer):
            if script != "negotiation":
                speaker.negotiate()
        for step in SCRIPTS[script]:
            if step.concerns(version):
                theirs, ours = peer.answer(step), here.answer(step)
                if not agree(step, ours, theirs):
                    request = step.request(Path("DIR")).decode()
                    differences.append(f"{request}\n    QEMU says {theirs}\n    we say    {ours}")
    assert not differences, "\n".join(["the transcripts differ:", *differences])


EXECUTED = re.compile(rb'"exec(?:ute|-oob)": "([^"]+)"')


def commands_of(script: Iterable[Step]) -> set[str]:
    names = set()
    for step in script:
        names.add(step.command)
        names |= {name.decode() for name in EXECUTED.findall(step.raw)}
    return names


QUIT = {"quit"}  # has a test of its own: it ends the script


def test_every_command_that_both_have_is_in_a_script(stage: Stage, qemu: str) -> None:
    names = []
    for name, system in (("qemu", qemu), ("ours", qemumig_system())):
        vmm = stage.vmm(name, system, guest=GuestParameters(), memory=32 * MIB)
        names.append({entry["name"] for entry in vmm.command("query-commands")})
    theirs, ours = names
    version = version_of(qemu)
    spoken = set().union(*(commands_of(s for s in script if s.concerns(version)) for script in SCRIPTS.values()))
    assert (ours & theirs) - spoken - QUIT == set()
    only_some_have = {"query-migrationthreads"}
    assert ours - theirs <= only_some_have
