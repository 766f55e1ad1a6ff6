"""Two recordings compared: configuration, RAM blocks, commands, sections field by field, memory page by page.

Neither memory is held: both scans know where their pages lie, and only pages that came at all are looked at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

from .model import CommandElement, Section, Stream
from .values import command_text, printable, shown, thousands

_BATCH_PAGES = 16384
_KEPT_RUNS = 1024
_SHOWN_RUNS = 16
_ABSENT = "absent"


@dataclass(frozen=True)
class Difference:
    """Something that is not the same; "absent" on the side that lacks it."""

    place: str
    left: str
    right: str


@dataclass
class PageDifference:
    """The pages of a block that differ: how many, and the first runs of them as (first page, count)."""

    block: str
    page_size: int
    pages: int = 0
    runs: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Comparison:
    """All differences between two streams."""

    differences: list[Difference] = field(default_factory=list)
    pages: list[PageDifference] = field(default_factory=list)

    @property
    def same(self) -> bool:
        return not self.differences and not self.pages

    def as_json(self) -> dict[str, Any]:
        return {"same": self.same, **asdict(self)}

    def lines(self) -> Iterator[str]:
        """The differences, for people."""
        for one in self.differences:
            yield f"{printable(one.place)}: {one.left} | {one.right}"
        for block in self.pages:
            yield f"RAM block {printable(block.block)}: {thousands(block.pages)} pages differ"
            for first, count in block.runs[:_SHOWN_RUNS]:
                start, end = first * block.page_size, (first + count) * block.page_size
                yield f"    {start:#x} to {end - 1:#x}  ({thousands(count)} pages)"
            if len(block.runs) > _SHOWN_RUNS:
                yield "    …"
        if self.same:
            yield "no difference: the same machine, the same device state, the same memory"


def compare(left: Stream, right: Stream, look_round: Callable[[int, int | None], None]) -> Comparison:
    """Everything in which the two differ; both were read with *keep_pages*."""
    result = Comparison()
    found = result.differences
    _compare_values(found, "machine", left.machine_type, right.machine_type)
    for what in ("enabled_capabilities", "uuid", "target_page_bits"):
        sides = (getattr(one.configuration, what, None) for one in (left, right))
        _compare_values(found, f"configuration {what}", *sides)
    _compare_commands(found, left, right)
    _compare_sections(found, left, right)
    _compare_memory(result, left, right, look_round)
    return result


def _compare_values(found: list[Difference], place: str, left: object, right: object) -> None:
    if left != right:
        found.append(Difference(place, *(_ABSENT if one is None else printable(str(one)) for one in (left, right))))


def _compare_commands(found: list[Difference], left: Stream, right: Stream) -> None:
    sides = [
        [command_text(one.command) for one in stream.elements if isinstance(one, CommandElement)]
        for stream in (left, right)
    ]
    for number, (here, there) in enumerate(zip_longest(*sides)):
        _compare_values(found, f"command {number}", here, there)


def _compare_sections(found: list[Difference], left: Stream, right: Stream) -> None:
    here, there = _devices(left), _devices(right)
    for identity in [*here, *(one for one in there if one not in here)]:
        name = f"section {identity[0]} instance {identity[1]}"
        for mine, theirs in zip_longest(here.get(identity, ()), there.get(identity, ())):
            if mine is None or theirs is None:
                found.append(Difference(name, *("absent" if one is None else "present" for one in (mine, theirs))))
                continue
            _compare_values(found, f"{name} version", mine.version_id, theirs.version_id)
            _compare_fields(found, name, mine, theirs)


def _devices(stream: Stream) -> dict[tuple[str, int], list[Section]]:
    """The sections that are no live ones, by identity."""
    result = defaultdict(list)
    for section in stream.sections:
        if section.split_by != "records":
            result[section.identity].append(section)
    return result


def _compare_fields(found: list[Difference], name: str, mine: Section, theirs: Section) -> None:
    if not mine.fields or not theirs.fields:
        _compare_values(found, f"{name} bytes", mine.payload_length, theirs.payload_length)
        return
    here, there = ({one.path: one for one in section.fields} for section in (mine, theirs))
    for path in [*here, *(one for one in there if one not in here)]:
        a, b = here.get(path), there.get(path)
        if a is None or b is None or a.data != b.data:
            found.append(Difference(f"{name} {path}", *(_ABSENT if one is None else shown(one) for one in (a, b))))


def _compare_memory(result: Comparison, left: Stream, right: Stream, look_round: Callable[[int, int | None], None]) -> None:
    _compare_values(result.differences, "page size", left.page_size, right.page_size)
    names = [one.name for one in left.blocks] + [one.name for one in right.blocks if left.block(one.name) is None]
    for name in names:
        here, there = left.block(name), right.block(name)
        lengths = [one.length if one else None for one in (here, there)]
        _compare_values(result.differences, f"RAM block {name} length", *lengths)
        if None not in lengths and left.page_size == right.page_size:
            pages = _compare_block(left, right, name, look_round)
            if pages.pages:
                result.pages.append(pages)


def _compare_block(left: Stream, right: Stream, name: str, look_round: Callable[[int, int | None], None]) -> PageDifference:
    here, there = left.block(name), right.block(name)
    assert here is not None and there is not None and left.scan is not None and right.scan is not None
    end = max(left.scan.end(here.index), right.scan.end(there.index))
    result = PageDifference(name, left.page_size)
    for start in range(0, end, _BATCH_PAGES):
        limit = min(start + _BATCH_PAGES, end)
        first = start
        while first < limit:
            begin, stop = left.pages.next_difference(here.index, right.pages, there.index, first, limit)
            if begin < limit:
                _add_run(result, begin, stop - begin)
            first = max(stop, begin)
        look_round(limit, end)
    return result


def _add_run(result: PageDifference, first: int, count: int) -> None:
    result.pages += count
    if result.runs and sum(result.runs[-1]) == first:
        result.runs[-1] = result.runs[-1][0], result.runs[-1][1] + count
    elif len(result.runs) < _KEPT_RUNS:
        result.runs.append((first, count))
