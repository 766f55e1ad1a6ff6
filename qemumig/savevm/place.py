"""Where a load or a save is: the section, and the path of fields down to the value in hand.

Both walk the same description.  The path is kept as plain tuples and becomes text only when something is refused,
so that a walk without faults pays next to nothing for its good messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from ..errors import StreamError
from .reader import Reader


class Place:
    """A section and a path of (field name, element number or None)."""

    def __init__(self, section: str, instance_id: int) -> None:
        self.section = section
        self.instance_id = instance_id
        self.path: list[tuple[str, int | None]] = []

    def __str__(self) -> str:
        text = f"section {self.section!r} instance {self.instance_id}"
        steps = [name if index is None else f"{name}[{index}]" for name, index in self.path]
        return f"{text}, field {'.'.join(steps)}" if steps else text


class Loading(Place):
    """One walk over the bytes of a peer.  The path stays where it was when an error is raised."""

    def __init__(self, reader: Reader, section: str, instance_id: int) -> None:
        super().__init__(section, instance_id)
        self.reader = reader

    def refuse(self, finding: str, offset: int | None = None, remedy: object = "") -> NoReturn:
        """Raise StreamError: *finding* says what was found and what was expected, *remedy* what would help."""
        where = self.reader.offset if offset is None else offset
        raise StreamError(f"{self} at offset {where:#x}: {finding}", offset=where, section=self.section, remedy=remedy)


class Saving(Place):
    """One walk over our own records; a value that does not fit its field is our fault: ValueError."""

    def __init__(self, section: str, instance_id: int) -> None:
        super().__init__(section, instance_id)
        self.out = bytearray()
        self.describes = True

    @contextmanager
    def bytes_only(self) -> Iterator[None]:
        """Inside, nobody wants descriptions: those of an array's first element stand for all."""
        before, self.describes = self.describes, False
        yield
        self.describes = before

    def refuse(self, finding: str) -> NoReturn:
        """Raise ValueError: *finding* says what the record holds and what was expected."""
        raise ValueError(f"{self}: {finding}")
