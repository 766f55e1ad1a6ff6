"""The vAPIC helper: a section that a real QEMU sends and expects, for a device that nothing here needs.

It lets 32-bit guests be patched where they write their task priority.  A guest that was patched elsewhere goes on, for
the patched code works without the helper; its state is kept for the next migration (machine.md §4).

Threads   A migration saves and loads while the machine is stopped.
"""

from __future__ import annotations

import copy

from qemumig.savevm.devices.kvm_tpr_opt import KvmTprOptState


class Vapic:
    """Keeps the record."""

    def __init__(self) -> None:
        self._record = KvmTprOptState()

    def reset(self) -> None:
        """Nothing is patched."""
        self._record = KvmTprOptState()

    def save(self) -> KvmTprOptState:
        return copy.deepcopy(self._record)

    def load(self, record: KvmTprOptState) -> None:
        self._record = copy.deepcopy(record)
