"""The targets: each module loads one input (`run`, which says what came of it) and knows some to begin with (`seeds`)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Protocol

NAMES = ("records", "deltas", "packets", "mapped", "requests", "placements", "stream")


class Target(Protocol):
    def run(self, data: bytes) -> str:
        """Load *data*: TAKEN or REFUSED; all else is raised."""

    def seeds(self) -> Iterator[bytes]:
        """Inputs to begin with."""


def target(name: str) -> Target:
    """The module of that name."""
    module: Target = import_module(f"{__name__}.{name}")  # type: ignore[assignment]
    return module
