"""Fixtures of more than one file here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .workshop import Workshop


@pytest.fixture
def workshop(directory: Path) -> Iterator[Workshop]:
    workshop = Workshop(directory)
    yield workshop
    workshop.close()
