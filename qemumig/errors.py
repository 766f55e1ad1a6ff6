"""The exception tree: what went wrong, where, and whose fault it is.

    MigrationError            everything this package raises on purpose
    ├── OptionError           the caller asked for something impossible or contradictory
    ├── StateError            the right command at the wrong moment
    ├── ChannelError          a connection failed
    ├── StreamError           the peer sent bytes that are refused
    ├── MachineError          the hypervisor said no
    └── MigrationCancelled    somebody changed their mind; not a fault

A message is one sentence: the place, what was found, what was expected, and what would help where something would.  The
attributes carry the parts.
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
    """The stream holds something that is refused: *offset* in bytes from its start, in *section*.

    *remedy* is what would help, as the end of the sentence; "" when nothing is known to.
    """

    def __init__(self, message: str, *, offset: int | None = None, section: str = "", remedy: object = "") -> None:
        self.remedy = str(remedy)
        super().__init__(f"{message}; {self.remedy}" if self.remedy else message)
        self.offset = offset
        self.section = section


class MachineError(MigrationError):
    """The virtual machine or its hypervisor refused; the cause is chained.

    *section* and *instance_id*: whose state it could not take, when it is a load that failed.
    """

    def __init__(self, message: str, *, section: str = "", instance_id: int = 0) -> None:
        super().__init__(message)
        self.section = section
        self.instance_id = instance_id


class MigrationCancelled(MigrationError):
    """The migration was cancelled on request."""
