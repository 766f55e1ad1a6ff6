"""Guest memory out of a recording: the newest content of every page of a block, as a sparse file or as a digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator

from .model import Block, Stream
from .recording import Recording

_BATCH_PAGES = 4096


class ExtractError(Exception):
    """The memory cannot be given; one sentence says why."""


def find_block(stream: Stream, name: str) -> Block:
    """The block *name*, whose length is known; ExtractError when there is none."""
    block = stream.block(name)
    names = ", ".join(repr(one.name) for one in stream.blocks) or "none"
    if block is None:
        raise ExtractError(f"{stream.name} has no RAM block {name!r}; it has {names}")
    if block.length is None or stream.scan is None:
        raise ExtractError(
            f"{stream.name} is a {stream.kind}: it has no list of blocks, so the length of {name!r} is not known"
        )
    return block


def extract(
    stream: Stream, recording: Recording, name: str, path: str, look_round: Callable[[int, int | None], None]
) -> tuple[int, int]:
    """Write the memory of block *name* into the file *path*; returns (bytes of the block, pages written).

    Pages that are zero or never came are holes.  Raises ExtractError, and OSError from the file.
    """
    block = find_block(stream, name)
    assert stream.scan is not None
    assert block.length is not None
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.path.samestat(os.fstat(fd), recording.status):
            raise ExtractError(f"{path} is the recording itself; -o names the file that the memory goes to")
        os.ftruncate(fd, 0)
        os.ftruncate(fd, block.length)
        written = 0
        for first, count in _batches(stream.scan.end(block.index)):
            written += stream.pages.export(block.index, fd, first, count)
            recording.let_go()
            look_round((first + count) * stream.page_size, block.length)
        os.ftruncate(fd, block.length)  # the last page may reach behind a block that is no multiple of a page
    finally:
        os.close(fd)
    return block.length, written


def digest(stream: Stream, recording: Recording, block: Block, look_round: Callable[[int, int | None], None]) -> str | None:
    """SHA-256 of the memory of *block*; None when its length is not known."""
    if block.length is None or stream.scan is None:
        return None
    result = hashlib.sha256()
    pages = -(-block.length // stream.page_size)
    for first, count in _batches(pages):
        data = stream.pages.read(block.index, first, count)
        result.update(memoryview(data)[: block.length - first * stream.page_size])
        recording.let_go()
        look_round((first + count) * stream.page_size, block.length)
    return result.hexdigest()


def _batches(pages: int) -> Iterator[tuple[int, int]]:
    for first in range(0, pages, _BATCH_PAGES):
        yield first, min(_BATCH_PAGES, pages - first)
