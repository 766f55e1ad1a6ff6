"""Damaged RAM sections are taken or refused with their place, and nothing else happens (support/fuzz_ram.py)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.support.fuzz_ram import fuzz_mapped, fuzz_records


def test_damaged_records_are_taken_or_refused_with_their_place() -> None:
    results = Counter(fuzz_records(seed) for seed in range(400))
    assert set(results) == {"taken", "refused"}
    assert min(results.values()) > 40


def test_damaged_files_of_mapped_ram_are_taken_or_refused_with_their_place(directory: Path) -> None:
    results = Counter(fuzz_mapped(seed, directory / "file") for seed in range(400))
    assert set(results) == {"taken", "refused"}
    assert min(results.values()) > 20
