"""Arrivals: who has come, who belongs here, and who is one too many (channels.md §2.3)."""

from __future__ import annotations

import socket
import threading
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


def test_a_source_that_has_gone_is_not_waited_for(directory: Path, listener: Listener) -> None:
    arrivals = waiting(listener, 2)
    listener.expect(2)
    for words in (MAIN, encode_init(NO_UUID, 0)):
        connection(directory, words).close()  # before anybody was let in
    with pytest.raises(StreamError, match="the source has gone while 1 of 2 multifd channels were missing"):
        arrivals.gather()
    close(arrivals)
