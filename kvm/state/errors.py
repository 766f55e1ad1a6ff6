"""Refusals of state: by us, because there is no place for it, or by KVM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qemumig.errors import MachineError

from ..errors import KvmError


class UnsupportedStateError(ValueError):
    """The guest uses a register that this machine does not have."""


@contextmanager
def refusals(index: int, doing: str) -> Iterator[None]:
    """Turn what goes wrong inside into a MachineError that names vCPU *index* and what was tried."""
    try:
        yield
    except (KvmError, UnsupportedStateError) as error:
        raise MachineError(f"vCPU {index}: {doing}: {error}") from error
