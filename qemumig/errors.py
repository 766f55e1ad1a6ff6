"""The exception tree: what went wrong, where, and whose fault it is.

    MigrationError            everything this package raises on purpose
    ├── OptionError           the caller asked for something impossible or contradictory
    ├── StateError            the right command at the wrong moment
    ├── ChannelError          a connection failed
    ├── StreamError           the peer sent bytes that are refused
    ├── MachineError          the hypervisor said no
    └── MigrationCancelled    somebody changed their mind; not a fault

A message is one sentence: the place, what was found, what was expected.  The attributes carry the parts.
"""

from __future__ import annotations


class MigrationError(Exception):
    """Base of everything this package raises on purpose."""


class OptionError(MigrationError):
    """A capability, parameter or property was refused; *name* and *value* say which."""

    def __init__(self, message: str, *, name: str = "", value: object = None) -> None:
        super().__init__(message)
        self.name = name
        self.value = value


class StateError(MigrationError):
    """A command came in a state that does not allow it; both states are named."""

    def __init__(self, message: str, *, state: object = None, required: object = None) -> None:
        super().__init__(message)
        self.state = state
        self.required = required


class ChannelError(MigrationError):
    """A connection could not be made, or broke; *errno* is the system's number for it, or None."""

    def __init__(self, message: str, *, channel: str = "", errno: int | None = None) -> None:
        super().__init__(message)
        self.channel = channel
        self.errno = errno


class StreamError(MigrationError):
    """The stream holds something that is refused: *offset* in bytes from its start, in *section*."""

    def __init__(self, message: str, *, offset: int | None = None, section: str = "") -> None:
        super().__init__(message)
        self.offset = offset
        self.section = section


class MachineError(MigrationError):
    """The virtual machine or its hypervisor refused; the cause is chained."""


class MigrationCancelled(MigrationError):
    """The migration was cancelled on request."""
