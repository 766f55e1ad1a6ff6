"""What fuzzing begins with and what it kept, in the ordinary build: all is taken or refused, and nothing else happens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz.folding import fold, unfold
from tests.fuzz.oracle import REFUSED, TAKEN, Guarded
from tests.fuzz.targets import NAMES, target

CORPUS = Path(__file__).parent / "corpus"
TARGETS = {name: target(name) for name in NAMES}  # what they keep for all runs is there before leaks are looked for


NEEDED = {"placements": ["userfaultfd"], "stream": ["userfaultfd"]}


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.needs(*NEEDED.get(name, []))) for name in NAMES])
def test_every_input_to_begin_with_and_every_one_kept_is_taken_or_refused(name: str) -> None:
    kept = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    results = Counter(TARGETS[name].run(data) for data in (*TARGETS[name].seeds(), *kept))
    assert set(results) == {TAKEN, REFUSED}
    assert min(results.values()) >= 5


def test_what_is_folded_unfolds_again() -> None:
    for data in (b"", b"\xf7", b"\0" * 63, b"\0" * 64, b"ab" + b"\xf7" * 130, b"\1" * 20000 + b"\2"):
        assert unfold(fold(data), 1 << 20) == data
    assert len(fold(bytes(4096))) == 3
    assert unfold(b"\xf7\xff\0" * 9, 5000) == bytes(5000)
    assert unfold(b"a\xf7\1", 9) == b"a"  # half a mark at the end means nothing


def test_a_write_beside_the_memory_is_seen() -> None:
    memory = Guarded(1)
    memory.check()
    memory._map[0] = 0
    with pytest.raises(Exception, match="beside the block"):
        memory.check()
