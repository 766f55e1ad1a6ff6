"""Arrivals: who has come, who belongs here, and who is one too many (channels.md §2.3)."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemumig.channels.address import UnixAddress
from qemumig.channels.channel import QuitEvent
from qemumig.channels.connect import Listener, incoming
from qemumig.errors import StreamError
from qemumig.multifd.arrivals import MAIN, NO_UUID, Arrivals
from qemumig.multifd.packet import encode_init
from qemumig.options import MigrationOptions

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def listener(directory: Path) -> Iterator[Listener]:
    quit_event = QuitEvent()
    listener = incoming(UnixAddress(f"{directory}/s"), quit_event.fd, lambda name: -1)
    yield listener
    listener.close()
    quit_event.close()


def connection(directory: Path, first: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(f"{directory}/s")
    sock.sendall(first)
    return sock


def waiting(listener: Listener, channels: int, *, preempt: bool = False) -> Arrivals:
    """A destination that wants so many channels of multifd."""
    options = MigrationOptions()
    options.set_capabilities({"multifd": True, "postcopy-ram": preempt, "postcopy-preempt": preempt}.items())
    options.set_parameters({"multifd-channels": channels})
    return Arrivals(listener, options, None)


def close(arrivals: Arrivals, *source: socket.socket) -> None:
    arrivals.close()
    assert arrivals.main is not None
    arrivals.main.close()
    for sock in source:
        sock.close()


@pytest.mark.parametrize("preempt", [False, True])
def test_who_has_said_nothing_when_all_is_loaded(preempt: bool, directory: Path, listener: Listener) -> None:
    """It costs its own connection, unless it may be the channel of urgent pages and another was taken for that."""
    arrivals = waiting(listener, 1, preempt=preempt)
    source = [connection(directory, first) for first in (encode_init(NO_UUID, 0), MAIN)]
    arrivals.gather()
    source.append(connection(directory, b""))
    if preempt:
        with pytest.raises(StreamError, match="opened a connection too many"):
            arrivals.check_surplus()
    else:
        arrivals.check_surplus()
    close(arrivals, *source)


def test_a_source_may_have_sent_everything_before_it_is_looked_at(directory: Path, listener: Listener) -> None:
    """Channels that have ended already, the last one having said who it is only then, are all there."""
    arrivals = waiting(listener, 2)
    listener.expect(3)
    main, first, last = (connection(directory, words) for words in (MAIN, encode_init(NO_UUID, 0), b""))
    for sock in (main, first):
        sock.shutdown(socket.SHUT_WR)
    speaking = threading.Timer(0.1, last.sendall, (encode_init(NO_UUID, 1),))
    speaking.start()
    arrivals.gather()
    speaking.join()
    assert sorted(arrivals.channels) == [0, 1]
    close(arrivals, main, first, last)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_source_may_have_gone_before_all_its_connections_are_there(
    late: int, directory: Path, listener: Listener
) -> None:
    """A tunnel opens them one by one, in its own time; the main one is as late as any other."""
    arrivals = waiting(listener, 2)
    words = [MAIN + b"state", encode_init(NO_UUID, 0) + b"pages", encode_init(NO_UUID, 1) + b"pages"]
    words.append(words.pop(late))

    def source() -> None:
        for number, said in enumerate(words):
            time.sleep(0.2 if number == 2 else 0)
            connection(directory, said).close()

    tunnel = threading.Thread(target=source)
    tunnel.start()
    arrivals.gather()
    tunnel.join()
    assert [arrivals.channels[number].read(5) for number in (0, 1)] == [b"pages", b"pages"]
    assert arrivals.stream is not None and arrivals.stream.read(9) == MAIN + b"state"
    close(arrivals)


def test_what_another_source_left_makes_room_for_its_successor(
    directory: Path, listener: Listener, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, at its successor's first connection: pages of two guests never meet."""
    arrivals = waiting(listener, 3)

    def sources() -> None:
        for number in (0, 2):
            connection(directory, encode_init(NO_UUID, number) + b"wrong").close()
        time.sleep(0.2)
        for number in (0, 1, 2):
            connection(directory, encode_init(NO_UUID, number) + b"right").close()
        connection(directory, MAIN).close()

    speaking = threading.Thread(target=sources)
    speaking.start()
    arrivals.gather()
    speaking.join()
    assert [arrivals.channels[number].read(5) for number in range(3)] == [b"right"] * 3
    assert "multifd channel 2 has gone before there was a main one" in capsys.readouterr().err
    close(arrivals)


def test_pages_that_another_source_left_never_complete_a_guest(
    directory: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its successor has no such channel: that one is missing then."""
    monkeypatch.setattr("qemumig.multifd.arrivals.GONE_S", 0.2)
    arrivals = waiting(listener, 3)
    listener.expect(5)
    for number in (0, 2):
        connection(directory, encode_init(NO_UUID, number) + b"wrong").close()
    for words in (encode_init(NO_UUID, 0), encode_init(NO_UUID, 1), MAIN):
        connection(directory, words + b"right").close()
    with pytest.raises(StreamError, match="the source has gone while 1 of 3 multifd channels were missing"):
        arrivals.gather()
    close(arrivals)


def test_who_left_before_it_sent_anything_makes_room_even_when_the_main_channel_is_there(
    directory: Path, listener: Listener
) -> None:
    arrivals = waiting(listener, 2)
    listener.expect(4)
    connection(directory, encode_init(NO_UUID, 1)).close()
    source = [connection(directory, words) for words in (MAIN, *(encode_init(NO_UUID, number) for number in (1, 0)))]
    arrivals.gather()
    source[1].sendall(b"pages")
    assert arrivals.channels[1].read(5) == b"pages"
    close(arrivals, *source)


def test_a_source_that_has_gone_is_not_waited_for_long(
    directory: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qemumig.multifd.arrivals.GONE_S", 0.2)
    arrivals = waiting(listener, 2)
    listener.expect(2)
    for words in (MAIN, encode_init(NO_UUID, 0)):
        connection(directory, words).close()  # before anybody was let in
    waits = []
    accept_among = listener.accept_among
    monkeypatch.setattr(listener, "accept_among", lambda *words: waits.append(words) or accept_among(*words))
    with pytest.raises(StreamError, match="the source has gone while 1 of 2 multifd channels were missing"):
        arrivals.gather()
    assert len(waits) < 10  # it sleeps
    close(arrivals)
