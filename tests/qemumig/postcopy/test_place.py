"""Missing pages: told of, asked for once, placed whole; what a source may not send."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import random
import select
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from qemumig.channels.channel import QuitEvent
from qemumig.errors import ChannelError, MachineError, StreamError
from qemumig.postcopy.answers import Answers
from qemumig.postcopy.blocktime import FaultTimes
from qemumig.postcopy.faults import FaultServer
from qemumig.postcopy.place import MissingMemory, PageReceiver
from qemumig.postcopy.uffd import Userfaultfd
from qemumig.ram.landing import Landing
from qemumig.wire.stream import InputStream
from tests.support.memory import Memory, channel_pair
from tests.support.vmm import wait_until

pytestmark = pytest.mark.needs("userfaultfd")

PAGE = 4096
PAGES = 64
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
ZERO, FULL, EOS, CONTINUE = 0x2, 0x8, 0x10, 0x20
UFFDIO_COPY = 0xC028AA03


@contextmanager
def missing(
    flags: int = PRIVATE, received: tuple[int, ...] = (), *, rom: int = 0, forgets: bool = False
) -> Iterator[SimpleNamespace]:
    """64 pages of which none but *received* are here, and a link whose far end is the source; *rom* pages beside them."""
    memory = Memory("ram", PAGES * PAGE, flags=flags)
    beside = [Memory("rom", rom * PAGE)] if rom else []
    landing = Landing([memory.block, *(other.block for other in beside)])
    landing.listed.update(range(1 + len(beside)))
    for page in received:
        landing.received[0].set(page)
    here = MissingMemory(landing, Userfaultfd(), FaultTimes([]))
    here.register()
    with channel_pair() as (near, far):
        stream = InputStream(near)
        yield SimpleNamespace(
            memory=memory,
            beside=beside,
            here=here,
            near=near,
            far=far,
            receiver=PageReceiver(stream, here, forgets=forgets),
            answers=Answers(near),
        )
    here.unregister()


def record(offset: int, kind: int, data: bytes, name: str = "ram") -> bytes:
    named = b"" if kind & CONTINUE else bytes([len(name)]) + name.encode()
    return struct.pack(">Q", offset | kind) + named + data


def feed(link: SimpleNamespace, *records: bytes) -> None:
    link.far._socket.sendall(b"".join((*records, struct.pack(">Q", EOS))))
    link.receiver.load_body()


def touch(address: int) -> int:
    """Read a byte without the GIL, so that whoever brings the page may run."""
    target = ctypes.create_string_buffer(1)
    ctypes.memmove(ctypes.addressof(target), address, 1)
    return target.raw[0]


@pytest.mark.parametrize("flags", [PRIVATE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS], ids=["private", "shared"])
def test_pages_and_zeroes_land_where_they_belong(flags: int) -> None:
    with missing(flags) as link:
        feed(link, record(0x3000, FULL, b"x" * PAGE), record(0x4000, FULL | CONTINUE, b"y" * PAGE), record(0, ZERO, b"\0"))
        assert link.memory.read(0x3000, 2 * PAGE) == b"x" * PAGE + b"y" * PAGE
        assert link.memory.read(0, PAGE) == bytes(PAGE)
        assert link.here.missing_pages() == PAGES - 3
        assert (link.receiver.normal_pages, link.receiver.zero_pages) == (2, 1)


def test_a_page_that_is_here_is_not_written_again() -> None:
    with missing() as link:
        feed(link, run_of(2, b"wx"), record(0x3000, FULL, b"z" * PAGE), run_of(2, b"yy"))
        assert pages_of(link.memory, 2, 2) == b"wx"
        assert link.here.placed_pages == 2


def pages_of(memory: Memory, first: int, count: int) -> bytes:
    """The first byte of each page, and that the rest of it is the same."""
    data = memory.read(first * PAGE, count * PAGE)
    firsts = data[::PAGE]
    assert data == b"".join(bytes([value]) * PAGE for value in firsts)
    return firsts


def run_of(first: int, values: bytes) -> bytes:
    """Records of neighbours, page by page full of one of *values*."""
    parts = [record((first + i) * PAGE, FULL | CONTINUE * (i > 0), bytes([value]) * PAGE) for i, value in enumerate(values)]
    return b"".join(parts)


def test_neighbours_are_placed_at_once_sixteen_at_most() -> None:
    with missing() as link:
        feed(link, run_of(8, bytes(range(1, 41))))
        assert pages_of(link.memory, 8, 40) == bytes(range(1, 41))
        assert (link.here.placed_pages, link.here.times_placed, link.here.missing_pages()) == (40, 3, PAGES - 40)


def test_only_neighbours_of_one_kind_are_placed_at_once() -> None:
    zero = record(10 * PAGE, ZERO | CONTINUE, b"\0") + record(11 * PAGE, ZERO | CONTINUE, b"\0")
    with missing() as link:
        feed(link, run_of(8, b"ab"), zero, run_of(12, b"cd"), run_of(20, b"e"), run_of(19, b"f"))
        assert pages_of(link.memory, 8, 6) == b"ab\0\0cd"
        assert pages_of(link.memory, 19, 2) == b"fe"
        assert (link.here.placed_pages, link.here.times_placed) == (8, 5)


def place_unnoticed(link: SimpleNamespace, page: int, value: bytes) -> None:
    """As another thread that has placed a page and has not yet said so."""
    data = ctypes.create_string_buffer(value * PAGE)
    target = link.memory.block.host_address + page * PAGE
    fcntl.ioctl(link.here.uffd.fd, UFFDIO_COPY, struct.pack("QQQQq", target, ctypes.addressof(data), PAGE, 0, 0))


@pytest.mark.parametrize("flags", [PRIVATE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS], ids=["private", "shared"])
@pytest.mark.parametrize("there", [(8,), (10,), (12,), (9, 10), (8, 10, 12)], ids=str)
@pytest.mark.parametrize("kind", [FULL, ZERO], ids=["pages", "zeroes"])
def test_what_somebody_else_has_placed_stays_and_its_neighbours_are_placed(
    kind: int, there: tuple[int, ...], flags: int
) -> None:
    with missing(flags) as link:
        for page in there:
            place_unnoticed(link, page, b"w")
        zeroes = b"".join(record(page * PAGE, ZERO, b"\0") for page in range(8, 13))
        feed(link, run_of(8, b"abcde") if kind == FULL else zeroes)
        sent = b"abcde" if kind == FULL else bytes(5)
        assert pages_of(link.memory, 8, 5) == bytes(ord("w") if 8 + i in there else sent[i] for i in range(5))
        assert (link.here.missing_pages(), link.here.times_placed) == (PAGES - 5, 1)


def test_who_waits_for_a_page_among_its_neighbours_goes_on_before_those_behind_it() -> None:
    with missing() as link, fault_thread(link):
        seen: list[int] = []
        address = link.memory.block.host_address + 11 * PAGE
        waiter = threading.Thread(target=lambda: seen.append(touch(address)))
        waiter.start()
        link.far._socket_recv(20)
        feed(link, run_of(8, b"abcdefgh"))
        waiter.join()
        assert seen == [ord("d")]
        assert (link.here.times_placed, link.here.outstanding_pages()) == (2, 0)


def test_no_page_waits_for_bytes_to_come() -> None:
    with missing() as link:
        receiver = threading.Thread(target=link.receiver.load_body)
        receiver.start()
        half_a_head = b"\0" * 4
        link.far._socket.sendall(run_of(0, b"ab") + half_a_head)
        wait_until(lambda: link.here.missing_pages() == PAGES - 2, "both pages to be placed")
        assert receiver.is_alive()
        link.far._socket.sendall(struct.pack(">Q", EOS)[4:])
        receiver.join()
        assert pages_of(link.memory, 0, 2) == b"ab"


@pytest.mark.parametrize("seed", range(30))
def test_whatever_way_the_bytes_come_each_page_is_what_was_sent_first(seed: int) -> None:
    """Runs, jumps, zeroes, names, repetitions, pages that are here already; in pieces that end anywhere."""
    chance = random.Random(seed)
    here = tuple(page for page in range(PAGES) if chance.random() < 0.1)
    expected = {page: bytes(PAGE) for page in here}
    records: list[bytes] = []
    page, ends = 0, [0]
    for _ in range(200):
        page = page + 1 if chance.random() < 0.9 and page + 1 < PAGES else chance.randrange(PAGES)
        named = FULL if not records or chance.random() < 0.1 else FULL | CONTINUE
        data = chance.randbytes(PAGE) if chance.random() < 0.9 else b"\0"
        records.append(record(page * PAGE, named if data != b"\0" else named ^ FULL | ZERO, data))
        expected.setdefault(page, data.ljust(PAGE, b"\0"))
        ends.append(ends[-1] + len(records[-1]))
    stream = b"".join(records) + struct.pack(">Q", EOS) + b"behind"
    with missing(received=here) as link:
        receiver = threading.Thread(target=link.receiver.load_body)
        receiver.start()
        at = 0
        while at < len(stream):
            end = chance.choice((at + chance.randrange(1, 9000), *(end for end in ends if at < end < at + 200000)))
            while at < min(end, len(stream)):
                select.select([], [link.far._socket], [])
                at += link.far._socket.send(stream[at:end])
            time.sleep(chance.choice((0, 0, 0.001)))  # what has come may be taken in, or not
        receiver.join()
        for page in here:  # they were only said to be here, and nothing of the stream may have brought them
            place_unnoticed(link, page, b"\0")
        assert all(link.memory.read(page * PAGE, PAGE) == contents for page, contents in expected.items())
        assert link.here.missing_pages() == PAGES - len(expected)
        assert link.receiver.normal_pages + link.receiver.zero_pages == 200
        assert (link.receiver.stream.offset, link.receiver.stream.peek(6)) == (len(stream) - 6, b"behind")


@pytest.mark.parametrize("end", [record(11 * PAGE, FULL, b"d" * 4000), b"\0\0\0", record(11 * PAGE, 0x40, b"")], ids=repr)
def test_pages_before_a_lost_link_or_a_bad_record_are_here(end: bytes) -> None:
    with missing() as link:
        link.far._socket.sendall(run_of(8, b"abc") + end)
        link.far.finish()
        with pytest.raises(StreamError):
            link.receiver.load_body()
        assert pages_of(link.memory, 8, 3) == b"abc"
        assert (link.here.missing_pages(), link.here.times_placed) == (PAGES - 3, 1)


def test_only_the_page_that_the_kernel_refuses_is_missing() -> None:
    with missing() as link:
        link.here.uffd.unregister(link.memory.block.host_address + 10 * PAGE, PAGE)
        with pytest.raises(MachineError, match=r"the page at 0xa000 of block 'ram' could not be placed: No such file"):
            feed(link, run_of(8, b"abcd"))
        assert pages_of(link.memory, 8, 2) == b"ab"
        assert link.here.missing_pages() == PAGES - 2


@pytest.mark.parametrize("kind", [FULL, ZERO], ids=["pages", "zeroes"])
def test_neighbours_in_two_mappings_of_the_kernel_are_placed(kind: int) -> None:
    with missing() as link:
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(link.memory.block.host_address), 10 * PAGE, mmap.PROT_WRITE)
        feed(link, *(record(page * PAGE, kind, b"m" * PAGE if kind == FULL else b"\0") for page in range(8, 12)))
        assert pages_of(link.memory, 8, 4) == (b"mmmm" if kind == FULL else bytes(4))
        assert link.here.missing_pages() == PAGES - 4


def test_who_touches_a_missing_page_waits_and_one_request_is_enough() -> None:
    with missing() as link, fault_thread(link) as server:
        seen: list[int] = []
        waiters = [
            threading.Thread(target=lambda: seen.append(touch(link.memory.block.host_address + 0x5000 + 7)))
            for _ in range(3)
        ]
        for waiter in waiters:
            waiter.start()
        request = link.far._socket_recv(4 + 13 + 3)
        assert request == struct.pack(">HHQIB", 3, 16, 0x5000, PAGE, 3) + b"ram"
        feed(link, record(0x5000, FULL, b"q" * PAGE))
        for waiter in waiters:
            waiter.join()
        assert seen == [ord("q")] * 3
        assert link.answers.requests == 1
        assert server.faults - server.merged == 1


def test_the_next_request_of_a_block_does_not_name_it_again_until_the_link_is_another() -> None:
    with missing() as link, fault_thread(link) as server:
        address = link.memory.block.host_address
        waiters = [threading.Thread(target=touch, args=(address + page * PAGE,)) for page in (1, 2)]
        waiters[0].start()
        assert link.far._socket_recv(20)[:4] == struct.pack(">HH", 3, 16)
        waiters[1].start()
        assert link.far._socket_recv(16) == struct.pack(">HHQI", 4, 12, 2 * PAGE, PAGE)
        link.answers.detach()
        with pytest.raises(ChannelError, match="there is no return path"):
            link.answers.send(b"anything")
        link.answers.attach(link.near)
        assert server.ask_again() == link.here.outstanding_pages() == 2
        assert link.far._socket_recv(36) == struct.pack(">HHQIB", 3, 16, PAGE, PAGE, 3) + b"ram" + struct.pack(
            ">HHQI", 4, 12, 2 * PAGE, PAGE
        )
        feed(link, record(PAGE, ZERO, b"\0"), record(2 * PAGE, ZERO | CONTINUE, b"\0"))
        for waiter in waiters:
            waiter.join()
        assert link.here.outstanding_pages() == 0


def test_a_page_that_precopy_said_to_be_zero_is_given_without_asking() -> None:
    with missing(received=(9,)) as link, fault_thread(link) as server:
        assert touch(link.memory.block.host_address + 9 * PAGE) == 0
        assert (server.zeroes, link.answers.requests) == (1, 0)


@pytest.mark.parametrize(
    ("record_bytes", "text"),
    [
        (record(PAGES * PAGE, FULL, b""), r"offset 0x40000 in block 'ram', expected one below 0x40000"),
        (record(0, FULL, b"", name="rom"), r"block 'rom' was not in the source's list, expected one of 'ram'"),
        (record(0, FULL | CONTINUE, b""), r"continues a block, expected a name"),
        (record(0, ZERO, b"\5"), r"fill byte 0x5 of a zero page, expected 0"),
        (record(0, 0x40, b""), r"has flags 0x40, expected ZERO"),
        (record(0, 0x4, b""), r"nothing else is sent in postcopy"),
    ],
)
def test_what_a_source_may_not_send_is_refused_with_the_place(record_bytes: bytes, text: str) -> None:
    with missing() as link, pytest.raises(StreamError, match=r"postcopy record at offset 0x0: .*" + text):
        feed(link, record_bytes)


def test_a_stream_that_ends_inside_a_page_places_nothing() -> None:
    with missing() as link:
        link.far._socket.sendall(record(0, FULL, b"x" * 100))
        link.far.finish()
        with pytest.raises(StreamError, match="stream ends inside a record of section 'ram'"):
            link.receiver.load_body()
        assert link.here.missing_pages() == PAGES


def test_a_channel_of_urgent_pages_ends_with_a_mark_or_without() -> None:
    for mark in (True, False):
        with missing() as link:
            link.far._socket.sendall(record(0, FULL, b"u" * PAGE) + struct.pack(">Q", EOS) * mark)
            link.far.finish()
            assert link.receiver.load_channel() is mark
            assert link.here.missing_pages() == PAGES - 1


def send_urgently(link: SimpleNamespace, page: int) -> None:
    """Page *page* of "rom" arrives by the channel of urgent pages."""
    with channel_pair() as (near, far):
        far._socket.sendall(record(page * PAGE, FULL, b"u" * PAGE, name="rom"))
        far.finish()
        PageReceiver(InputStream(near), link.here).load_channel()


def test_a_forgotten_name_is_that_of_the_urgent_page_where_the_page_is_missing_there_alone() -> None:
    with missing(received=(1, 2), rom=16, forgets=True) as link:
        feed(link, record(5 * PAGE, FULL, b"r" * PAGE))
        send_urgently(link, 0)
        feed(link, *(record(page * PAGE, FULL | CONTINUE, b"o" * PAGE) for page in (1, 2, 3)))
        assert all(link.here.received[1].test(page) for page in range(4))  # who touches another waits for ever
        assert pages_of(link.beside[0], 0, 4) == b"uooo"
        feed(link, record(6 * PAGE, FULL, b"s" * PAGE))
        assert pages_of(link.memory, 5, 2) == b"rs"
        assert link.here.missing_pages() == PAGES - 4 + 12


@pytest.mark.parametrize("forgets", [True, False])
def test_a_name_that_was_not_forgotten_stands(forgets: bool) -> None:
    with missing(rom=16, forgets=forgets) as link:
        feed(link, record(5 * PAGE, FULL, b"r" * PAGE))
        send_urgently(link, 0)
        feed(link, record(6 * PAGE, FULL | CONTINUE, b"s" * PAGE))
        assert pages_of(link.memory, 5, 2) == b"rs"
        assert link.here.missing_pages() == PAGES - 2 + 15


def test_a_page_that_may_be_of_two_blocks_is_refused() -> None:
    with missing(rom=16, forgets=True) as link:
        feed(link, record(5 * PAGE, FULL, b"r" * PAGE))
        send_urgently(link, 5)
        expected = r"offset 0x6000 without a name may be of block 'ram' or of 'rom', expected a name"
        with pytest.raises(StreamError, match=expected):
            feed(link, record(6 * PAGE, FULL | CONTINUE, b"?" * PAGE))
        assert link.here.missing_pages() == PAGES - 1 + 15


def test_an_urgent_page_on_its_way_is_waited_for_before_a_name_is_missed() -> None:
    with missing(received=(1,), rom=16, forgets=True) as link, fault_thread(link):
        feed(link, record(5 * PAGE, FULL, b"r" * PAGE))
        waiter = threading.Thread(target=touch, args=(link.beside[0].block.host_address,))
        waiter.start()
        link.far._socket_recv(20)
        link.far._socket.sendall(record(PAGE, FULL | CONTINUE, b"o" * PAGE) + struct.pack(">Q", EOS))
        receiver = threading.Thread(target=link.receiver.load_body)
        receiver.start()
        send_urgently(link, 0)
        receiver.join()
        waiter.join()
        assert link.here.received[1].test(1)
        assert pages_of(link.beside[0], 0, 2) == b"uo"


@pytest.mark.parametrize("length", [4, 8, 12, 100])
def test_a_channel_of_urgent_pages_does_not_end_inside_a_record(length: int) -> None:
    with missing() as link:
        link.far._socket.sendall(record(0, FULL, b"u" * PAGE)[:length])
        link.far.finish()
        with pytest.raises(StreamError, match="stream ends inside a record of the preempt channel"):
            link.receiver.load_channel()
        assert link.here.missing_pages() == PAGES


@contextmanager
def fault_thread(link: SimpleNamespace) -> Iterator[FaultServer]:
    """The fault thread, with the far end's socket readable in one call."""
    quit_event = QuitEvent()
    server = FaultServer(link.here, link.answers, quit_event.fd)
    thread = threading.Thread(target=server.serve)
    thread.start()

    def receive(length: int) -> bytes:
        link.far._socket.setblocking(True)
        link.far._socket.settimeout(20)
        data = b""
        while len(data) < length:
            data += link.far._socket.recv(length - len(data))
        return data

    link.far._socket_recv = receive
    try:
        yield server
    finally:
        quit_event.set()
        thread.join()
        quit_event.close()
