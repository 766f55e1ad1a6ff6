"""The source in postcopy: requests first, each page once, and what a destination may not ask for or claim."""

from __future__ import annotations

import mmap
import struct

import pytest

from qemumig.errors import StreamError
from qemumig.postcopy.requests import RequestReader
from qemumig.postcopy.serve import PageServer
from qemumig.ram.dirty import DirtyPages
from qemumig.wire.stream import InputStream, OutputStream
from tests.support.memory import Memory, QuietLog, channel_pair

PAGE = 4096
PAGES = 32


class Source:
    """A server of 32 pages, all dirty, page n full of n; and both ends of its channels."""

    def __init__(self, main: object, back: object, urgent: object = None) -> None:
        self.memory = Memory("ram", PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(1, PAGES):
            self.memory.write(page * PAGE, bytes([page]) * PAGE)
        self.server = PageServer(DirtyPages([self.memory.block], QuietLog()))
        self.server.connect(OutputStream(main), OutputStream(urgent) if urgent else None)
        self.requests = RequestReader(self.server, InputStream(back))


def request(start: int, length: int = PAGE, name: str | None = "ram") -> bytes:
    if name is None:
        return struct.pack(">HHQI", 4, 12, start, length)
    return struct.pack(">HHQIB", 3, 13 + len(name), start, length, len(name)) + name.encode()


def pages_in(data: bytes) -> list[int]:
    """The pages of a run of records, in their order."""
    found, at = [], 0
    while at < len(data):
        head = int.from_bytes(data[at : at + 8], "big")
        at += 8 + (0 if head & 0x20 else 1 + data[at + 8])
        at += PAGE if head & 0x8 else 1
        found.append(head // PAGE)
    return found


def drain(channel: object) -> bytes:
    data = b""
    while True:
        try:
            data += channel._socket.recv(1 << 20)
        except BlockingIOError:
            return data


def test_what_is_asked_for_goes_first_and_the_walk_goes_on_from_there() -> None:
    with channel_pair() as (main, far), channel_pair() as (back, asker):
        source = Source(main, back)
        asker._socket.sendall(
            request(20 * PAGE) + request(7 * PAGE, name=None) + request(20 * PAGE, name=None) + b"\0\2\0\4"
        )
        source.requests.read()
        assert source.server.requests == 3
        source.server.serve(4 * PAGE, 100)
        assert pages_in(drain(far))[:4] == [20, 7, 8, 9]
        assert source.server.serve(1 << 30, 1 << 20)
        assert source.server.dirty.remaining == 0


def test_every_page_leaves_once_whatever_is_asked_for() -> None:
    with channel_pair() as (main, far), channel_pair() as (back, asker), channel_pair() as (urgent, urgent_far):
        source = Source(main, back, urgent)
        asker._socket.sendall(request(3 * PAGE, 2 * PAGE) + request(3 * PAGE) + b"\0\2\0\4")
        source.requests.read()
        urgent_pages = pages_in(drain(urgent_far))
        assert urgent_pages == [3, 4]
        assert source.server.serve(1 << 30, 1 << 20)
        assert sorted(urgent_pages + pages_in(drain(far))) == list(range(PAGES))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (request(0, name=None), "it means the block of the request before, there is none"),
        (request(0, name="rom"), "of a block that does not exist here, this machine has 'ram'"),
        (request(1), "0x1000 bytes at 0x1 of block 'ram', expected whole host pages of 0x1000 bytes below 0x20000"),
        (request(0, 0), "0x0 bytes at 0x0"),
        (request(0, 100), "0x64 bytes at 0x0"),
        (request(PAGES * PAGE), "0x1000 bytes at 0x20000"),
        (request((1 << 64) - PAGE, 0xFFFFF000), "bytes at 0xfffffffffffff000"),
    ],
)
def test_a_request_for_what_is_not_there_is_refused(message: bytes, text: str) -> None:
    with channel_pair() as (main, _), channel_pair() as (back, asker):
        source = Source(main, back)
        asker._socket.sendall(message)
        with pytest.raises(StreamError, match=text):
            source.requests.read()
        assert source.server.dirty.remaining == PAGES


FIRST = [(0, 7 * PAGE + 5), (0, 3 * PAGE), (0, 9 * PAGE), (0, 7 * PAGE)]  # of which page 9 is there already


def test_what_is_touched_first_leaves_at_once_by_the_urgent_channel() -> None:
    with channel_pair() as (main, far), channel_pair() as (back, _), channel_pair() as (urgent, urgent_far):
        source = Source(main, back, urgent)
        source.server.dirty.bitmaps[0].clear(9)
        source.server.make_uniform()
        source.server.send_first(FIRST)
        assert pages_in(drain(urgent_far)) == [7, 3]
        assert source.server.serve(1 << 30, 1 << 20)
        assert sorted(pages_in(drain(far))) == [page for page in range(PAGES) if page not in (3, 7, 9)]
        assert source.server.requests == 0


def test_what_is_touched_first_is_what_the_main_channel_begins_with() -> None:
    with channel_pair() as (main, far), channel_pair() as (back, _):
        source = Source(main, back)
        source.server.dirty.bitmaps[0].clear(9)
        source.server.make_uniform()
        source.server.send_first(FIRST)
        assert source.server.serve(1 << 30, 1 << 20)
        found = pages_in(drain(far))
        assert found[:2] == [7, 3] and sorted(found) == [page for page in range(PAGES) if page != 9]


@pytest.mark.parametrize("place", [(1, 0), (-1, 0), (0, PAGES * PAGE), (0, -1)])
def test_what_is_no_memory_is_not_sent(place: tuple[int, int]) -> None:
    with channel_pair() as (main, far), channel_pair() as (back, _):
        source = Source(main, back)
        with pytest.raises(ValueError, match="offset"):
            source.server.send_first([place])
        assert drain(far) == b""


def test_discards_name_all_that_is_dirty_twelve_ranges_at_a_time() -> None:
    with channel_pair() as (main, far), channel_pair() as (back, _):
        source = Source(main, back)
        bitmap = source.server.dirty.bitmaps[0]
        for page in range(0, PAGES, 2):
            bitmap.clear(page)
        source.server.make_uniform()
        source.server.put_discards()
        source.server.main.out.flush()
        data = drain(far)
        head = struct.pack(">BHHBB", 8, 6, 2 + 3 + 1 + 12 * 16, 0, 3) + b"ram\0"
        assert data.startswith(head)
        starts = [int.from_bytes(data[len(head) + 16 * i :][:8], "big") // PAGE for i in range(12)]
        assert starts == list(range(1, 24, 2))
        assert len(data) == 2 * len(head) + 16 * 16


def test_what_was_told_is_not_told_again() -> None:
    with channel_pair() as (main, far), channel_pair() as (back, _):
        source = Source(main, back)
        bitmap = source.server.dirty.bitmaps[0]
        for page in (*range(5), 20, 21):
            bitmap.clear(page)
        source.server.make_uniform()
        source.server.put_discards()
        for page in (2, 3, 7, 21):  # the guest has written to them; 7 is not new
            bitmap.set(page)
        source.server.make_uniform()
        source.server.put_discards()
        source.server.put_discards()
        source.server.main.out.flush()
        assert discards_in(drain(far)) == [[(5, 15), (22, 10)], [(2, 2), (21, 1)]]
        assert source.server.serve(1 << 30, 1 << 20)
        source.server.main.out.flush()
        assert sorted(pages_in(drain(far))) == [2, 3, *range(5, 20), *range(21, PAGES)]


def discards_in(data: bytes) -> list[list[tuple[int, int]]]:
    """The ranges of each command, in pages."""
    found = []
    while data:
        _, command, length = struct.unpack(">BHH", data[:5])
        assert command == 6
        numbers = struct.unpack(f">{(length - 6) // 8}Q", data[11 : 5 + length])
        found.append([(start // PAGE, size // PAGE) for start, size in zip(numbers[::2], numbers[1::2], strict=True)])
        data = data[5 + length :]
    return found


def test_what_arrived_need_not_go_again_and_what_was_never_sent_cannot_have_arrived() -> None:
    with channel_pair() as (main, far), channel_pair() as (back, _):
        source = Source(main, back)
        source.server.serve(0, 0)
        source.server.serve(10 * PAGE, 10)
        sent = pages_in(drain(far))
        arrived = bytearray(source.server.bitmap_size("ram"))
        for page in sent[:5]:
            arrived[page // 8] |= 1 << page % 8
        source.server.forget_requests()
        source.server.take_received("ram", bytes(arrived))
        source.server.make_uniform()
        assert source.server.dirty.remaining == PAGES - 5
        arrived[3] |= 0x80
        with pytest.raises(StreamError, match=r"has 1 pages of block 'ram' that were never sent, the first at 0x1f000"):
            source.server.take_received("ram", bytes(arrived))
