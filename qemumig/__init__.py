"""qemumig: QEMU's live migration, in QEMU's wire format, for any virtual machine that fulfils `qemumig.machine`.

    Migration            the side that has the guest: start, cancel, query
    IncomingMigration    the side that gets it: listen, query

        SOURCE       guest RAM ─▶ dirty log ─▶ ram/dirty ─▶ ram/search ─▶ ram/save ─▶ channels ═══╗
                                                                                                  ║ wire/
        DESTINATION  guest RAM ◀─ ram/load ◀────────────────────────────────────────  channels ◀══╝

`kvm/` is the hypervisor that embeds it; nothing here imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .destination.incoming import IncomingMigration
    from .source.migration import Migration

__version__ = "0.1.0"
__all__ = ["IncomingMigration", "Migration", "__version__"]

_ROOMS = {"IncomingMigration": "qemumig.destination.incoming", "Migration": "qemumig.source.migration"}


def __getattr__(name: str) -> Any:
    """The two doors, opened when they are first used: a tool that only needs a name need not load them."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'qemumig' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_ROOMS[name]), name)
