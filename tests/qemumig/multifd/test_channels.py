"""Senders and receivers over socket pairs: pages arrive by any channel, syncs keep order, and every fault has words."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemumig.channels.channel import QuitEvent, SocketChannel
from qemumig.errors import ChannelError, MigrationCancelled, MigrationError, StreamError
from qemumig.multifd.methods import METHODS
from qemumig.multifd.packet import encode_header
from qemumig.multifd.recv import Meeting, Receiver
from qemumig.multifd.send import Dispatch, Sender
from qemumig.ram.dirty import DirtyPages
from qemumig.ram.landing import Landing
from qemumig.ram.save_multifd import MultifdPageSender
from qemumig.wire.stream import InputStream, OutputStream
from tests.support.memory import Memory, QuietLog

PAGE = 4096
PAGES = 700
NAME = b"ram"
SYNC = encode_header(flags=1, slots=0)


class Bench:
    """*count* receivers with a socket each, and the memory that they load into."""

    def __init__(self, count: int, method: str = "none", *, fresh: bool = True) -> None:
        self.memory = Memory("ram", PAGES * PAGE, fresh=fresh)
        self.landing = Landing([self.memory.block])
        self.landing.share()
        self.quit = QuitEvent()
        self.failed = threading.Event()
        self.meeting = Meeting(count, self.failed.set)
        pairs = [socket.socketpair() for _ in range(count)]
        self.near = [near for near, _ in pairs]
        self.channels = [SocketChannel(f"c{n}", far, self.quit.fd) for n, (_, far) in enumerate(pairs)]
        self.receivers = [Receiver(n, InputStream(c), self.meeting, self.landing) for n, c in enumerate(self.channels)]
        if method != "none":
            for receiver in self.receivers:
                receiver.decompress_with(METHODS[method].flag, METHODS[method].decompressor())
        self.threads = [threading.Thread(target=receiver.run) for receiver in self.receivers]
        for thread in self.threads:
            thread.start()

    def sync(self) -> None:
        self.meeting.sync(self.quit.fd)

    def close(self) -> None:
        self.quit.set()
        self.meeting.close(is_complete=False)
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        for one in (*self.near, *self.channels, self.quit):
            one.close()


@contextlib.contextmanager
def bench(count: int, method: str = "none", *, fresh: bool = True) -> Iterator[Bench]:
    stage = Bench(count, method, fresh=fresh)
    try:
        yield stage
    finally:
        stage.close()


def refusal_of(*packets: bytes, method: str = "none") -> str:
    """What a receiver says to *packets* on its channel."""
    with bench(1, method) as stage:
        stage.near[0].sendall(b"".join(packets))
        assert stage.failed.wait(10)
        with pytest.raises(MigrationError) as caught:
            stage.sync()
        return str(caught.value)


# ---- both ends together ----


@pytest.mark.parametrize("method", ["none", "zlib", "zstd"])
@pytest.mark.parametrize("detection", ["none", "legacy", "multifd"])
def test_memory_arrives_over_every_channel(method: str, detection: str) -> None:
    chance = random.Random(method + detection)
    source = Memory("ram", PAGES * PAGE)
    for page in range(PAGES):
        if chance.random() < 0.7:
            source.write(page * PAGE, chance.randbytes(PAGE // 2) * 2)
    with bench(3, method, fresh=False) as stage, contextlib.closing(QuitEvent()) as alarm:
        stage.memory.write(0, chance.randbytes(PAGES * PAGE))  # what was there before must not shine through
        dispatch = Dispatch(3, alarm.set)
        mains = socket.socketpair()
        main = SocketChannel("main", mains[0], alarm.fd)
        senders = []
        for number in range(3):
            out = OutputStream(SocketChannel(f"s{number}", stage.near[number], alarm.fd))
            senders.append(Sender(number, out, dispatch, detects_zero=detection == "multifd"))
            if method != "none":
                senders[-1].compress_with(METHODS[method].flag, METHODS[method].compressor(1))
        threads = [threading.Thread(target=sender.run) for sender in senders]
        for thread in threads:
            thread.start()
        pages = MultifdPageSender(
            DirtyPages([source.block], QuietLog()),
            OutputStream(main),
            dispatch,
            zero_page_detection=detection,
            sync_each_round=True,
        )
        while not pages.send(1 << 20, 200):
            pass
        pages.write_mark()
        stage.sync()
        dispatch.drain()
        dispatch.close()
        for thread in threads:
            thread.join()
        zero = sum(sender.zero_pages for sender in senders)
        normal = sum(sender.normal_pages for sender in senders)
        assert zero + normal + pages.zero_pages == PAGES
        assert (zero > 0, pages.zero_pages > 0) == (detection == "multifd", detection == "legacy")
        assert sum(receiver.normal_pages for receiver in stage.receivers) == normal
        assert sum(1 for sender in senders if sender.normal_pages) > 1
        expected = bytearray(source.contents())
        if detection == "legacy":  # those are records of the main stream, which nobody reads here
            for page in range(PAGES):
                if not any(expected[page * PAGE : page * PAGE + PAGE]):
                    expected[page * PAGE : page * PAGE + PAGE] = stage.memory.read(page * PAGE, PAGE)
        assert stage.memory.contents() == bytes(expected)
        stage.meeting.close(is_complete=True)
        for end in (main, *mains[1:]):
            end.close()


# ---- the order that syncs keep ----


def plain(page: int, fill: int, *, flags: int = 0) -> bytes:
    return encode_header(flags=flags, normal=[page * PAGE], data_size=PAGE, name=NAME) + bytes([fill]) * PAGE


def test_nothing_behind_a_sync_is_loaded_before_all_have_met() -> None:
    with bench(2) as stage:
        stage.near[0].sendall(plain(5, 1) + SYNC + plain(5, 3))
        stage.near[1].sendall(plain(6, 2))
        stage.near[1].sendall(SYNC)
        for _ in range(20):
            assert stage.memory.read(5 * PAGE, 1) in (b"\0", b"\1")
        stage.sync()
        stage.near[0].sendall(SYNC)
        stage.near[1].sendall(SYNC)
        stage.sync()
        assert stage.memory.read(5 * PAGE, 1) == b"\3" and stage.memory.read(6 * PAGE, 1) == b"\2"


def test_a_sync_may_ride_on_a_packet_with_pages() -> None:
    with bench(1) as stage:
        stage.near[0].sendall(plain(1, 7, flags=1))
        stage.sync()
        assert stage.memory.read(PAGE, PAGE) == b"\7" * PAGE


def test_packets_that_say_nothing_do_nothing() -> None:
    """7.2 sends some, with old values in them."""
    with bench(1) as stage:
        stale = bytearray(encode_header(normal=[1 << 60], data_size=99, name=b"nonsense"))
        stale[16:20] = bytes(4)
        stage.near[0].sendall(bytes(stale) + SYNC + bytes(stale))
        stage.sync()
        stage.meeting.close(is_complete=True)


@pytest.mark.parametrize("then", [b"", SYNC], ids=["no-sync", "a-sync-that-the-main-channel-has-not"])
def test_pages_behind_the_last_sync_end_the_load(then: bytes) -> None:
    with bench(1) as stage:
        stage.near[0].sendall(SYNC)
        stage.sync()
        stage.near[0].sendall(plain(1, 1) + then)
        while not stage.receivers[0].normal_pages:
            pass
        time.sleep(0.02)  # it may have got to what follows
        with pytest.raises(StreamError, match="channel 0 has brought pages behind the last sync point"):
            stage.meeting.close(is_complete=True)


def test_pages_that_come_after_the_load_are_not_loaded() -> None:
    with bench(1) as stage:
        stage.near[0].sendall(SYNC)
        stage.sync()
        stage.meeting.close(is_complete=True)
        stage.near[0].sendall(plain(1, 1))
        stage.threads[0].join(10)
        assert stage.memory.read(PAGE, 1) == b"\0"


def test_zero_pages_are_cleared_and_untouched_ones_left_alone() -> None:
    with bench(1) as stage:
        stage.near[0].sendall(plain(3, 9) + encode_header(zero=[3 * PAGE, 4 * PAGE], name=NAME) + SYNC)
        stage.sync()
        assert stage.memory.read(3 * PAGE, 2 * PAGE) == bytes(2 * PAGE)
        assert stage.receivers[0].zero_pages == 2


# ---- the end of a channel ----


def test_a_channel_that_ended_cannot_meet_the_others() -> None:
    with bench(2) as stage:
        stage.near[0].sendall(SYNC)
        stage.near[1].close()
        with pytest.raises(StreamError, match="1 of 2 multifd channels ended before the sync point"):
            stage.sync()


def test_channels_may_end_when_everything_has_come() -> None:
    with bench(2) as stage:
        for near in stage.near:
            near.sendall(SYNC)
        stage.sync()
        for near in stage.near:
            near.close()
        for thread in stage.threads:
            thread.join(10)
        stage.meeting.close(is_complete=True)


def test_a_wait_for_the_others_ends_with_the_quit_event() -> None:
    with bench(2) as stage:
        stage.near[0].sendall(SYNC)
        threading.Timer(0.05, stage.quit.set).start()
        with pytest.raises(MigrationCancelled):
            stage.sync()


# ---- hostile packets ----


@pytest.mark.parametrize(
    ("packet", "finding"),
    [
        (encode_header(magic=0), "channel 0, packet at offset 0x40: magic 0x00000000 found"),
        (encode_header(normal=[0], name=b"rom"), "block 'rom' does not exist here, this machine has 'ram'"),
        (encode_header(normal=[0], name=b"\xff" * 256), "does not exist here"),
        (encode_header(normal=[PAGES * PAGE], name=NAME), "offset 0x2bc000 of page 0 in block 'ram'.*below 0x2bc000"),
        (encode_header(zero=[0, 1 << 63], name=NAME), "offset 0x8000000000000000 of page 1"),
        (encode_header(zero=[8], name=NAME), "offset 0x8 of page 0"),
        (encode_header(flags=4, normal=[0], name=NAME), "compression zstd .* this side has none: .*'multifd-compression'"),
    ],
)
def test_a_hostile_packet_is_refused_in_words(packet: bytes, finding: str) -> None:
    assert re.search(finding, refusal_of(packet))


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_hostile_compressed_data_is_refused_in_words(method: str) -> None:
    flag = METHODS[method].flag
    good = METHODS[method].compressor(1).compress(b"\5" * 2 * PAGE)

    def said(data: bytes, size: int | None = None, pages: int = 2) -> str:
        header = encode_header(
            flags=flag,
            normal=[page * PAGE for page in range(pages)],
            data_size=len(data) if size is None else size,
            name=NAME,
        )
        return refusal_of(header + data, method=method)

    assert "expected at most 1048576" in said(b"", (1 << 20) + 1)
    assert "0 bytes of compressed data for 2 pages" in said(b"")
    assert f"bytes of {method} data make fewer than 3 pages" in said(good, pages=3)
    assert f"bytes of {method} data make more than 1 pages" in said(good, pages=1)
    assert f"{method} data that does not decompress: " in said(b"\xff" * 100)
    assert "this side has " + method in refusal_of(encode_header(normal=[0], name=NAME), method=method)


def test_a_stream_that_ends_in_a_packet_says_where() -> None:
    with bench(1) as stage:
        stage.near[0].sendall(plain(1, 1) + plain(2, 2)[:-1])
        stage.near[0].close()
        assert stage.failed.wait(10)
        with pytest.raises(StreamError, match="stream ends inside a packet of multifd channel 0"):
            stage.sync()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            lambda flags, slots, normal, zero, size, name, data: (
                encode_header(
                    flags=flags, slots=slots, normal=normal, zero=zero, data_size=size, name=name, number=len(data)
                )
                + data
            ),
            flags=st.sampled_from([0, 0, 0, 1, 2, 4, 0x40, 0xFFFFFFFF]),
            slots=st.sampled_from([128, 128, 5, 0, 129]),
            normal=st.lists(st.integers(0, PAGES + 1).map(lambda page: page * PAGE), max_size=4),
            zero=st.lists(st.integers(0, (1 << 64) - 1), max_size=2),
            size=st.sampled_from([0, PAGE, 1 << 20, 0xFFFFFFFF]),
            name=st.sampled_from([NAME, NAME, NAME, b"", b"ram2", b"r" * 256]),
            data=st.binary(max_size=3).map(lambda seed: seed * PAGE),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["none", "zlib", "zstd"]),
)
def test_whatever_comes_the_receiver_ends_and_stays_inside_its_memory(packets: list[bytes], method: str) -> None:
    with bench(1, method) as stage:
        stage.near[0].sendall(b"".join(packets))
        stage.near[0].shutdown(socket.SHUT_WR)
        with contextlib.suppress(StreamError):
            for _ in range(len(packets) + 1):
                stage.sync()


# ---- a source whose channel breaks ----


def test_a_sender_whose_peer_is_gone_wakes_whoever_waits() -> None:
    ends = [socket.socketpair() for _ in range(2)]
    with contextlib.closing(QuitEvent()) as alarm:
        dispatch = Dispatch(2, alarm.set)
        channels = [SocketChannel(f"s{number}", near, alarm.fd) for number, (near, _) in enumerate(ends)]
        senders = [Sender(n, OutputStream(channel), dispatch, detects_zero=False) for n, channel in enumerate(channels)]
        threads = [threading.Thread(target=sender.run) for sender in senders]
        for thread in threads:
            thread.start()
        ends[1][1].close()
        with pytest.raises(ChannelError, match="Unable to write to socket: Broken pipe"):
            for _ in range(100):
                dispatch.sync()
        assert alarm.is_set()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        for end in (*channels, ends[0][1]):
            end.close()
