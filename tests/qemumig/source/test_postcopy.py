"""The first moments after the switch belong to the guest: until it runs there, only what it asks for is sent."""

from __future__ import annotations

import socket

import pytest

from qemumig.savevm.commands import Shut, encode_return_message
from qemumig.source import postcopy
from tests.qemumig.postcopy.test_serve import request
from tests.support.fake_peer import FakePeer, migrate_to, ping, pong, read_until
from tests.support.pair import Pair, wait_for

LAST_PAGE = (4 << 20) - 2 * 4096  # of those that hold something
FOOTER = b"\x7e\0\0\0\1"
STREAM_END = b"\0\0\0\0\0\0\0\x10" + FOOTER + b"\0"
TAKEN = 0x42  # the ping behind device state


class TakesItsTime(FakePeer):
    """It asks for a page before it says that it has the guest, and takes the rest in after that."""

    def __init__(self) -> None:
        self.asked_for = self.unasked = self.rest = b""
        super().__init__(b"")

    def _serve(self) -> None:
        connection, _ = self.listener.accept()
        with connection:
            read_until(connection, ping(4))
            connection.sendall(request(LAST_PAGE, name="microvm.ram"))
            while not self.asked_for.endswith(FOOTER):
                self.asked_for += connection.recv(1 << 20)
            connection.settimeout(0.2)
            try:
                self.unasked = connection.recv(1 << 20)
            except TimeoutError:
                connection.settimeout(None)
            connection.sendall(pong(TAKEN))
            while more := connection.recv(1 << 20):
                self.rest += more
                if STREAM_END in self.rest[-40:]:
                    connection.sendall(encode_return_message(Shut(0)))


def test_only_what_is_asked_for_is_sent_until_the_guest_runs_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is the first that is said on the return path since the switch."""
    monkeypatch.setattr(postcopy, "SETTLE_S", 3600)  # the word of the destination ends the wait, not the time
    with Pair(capabilities={"postcopy-ram": True}, parameters={"max-bandwidth": 1 << 20}) as pair:
        page = pair.source.read(pair.source.ram, LAST_PAGE, 4096)
        assert page != bytes(4096)
        peer = TakesItsTime()
        migrate_to(peer, pair)
        pair.migration.start_postcopy()
        wait_for(lambda: not pair.migration.is_running, "the source to end")
        peer.close()
        assert pair.migration.status.value == "completed"
        assert page in peer.asked_for and len(peer.asked_for) < 2 * 4096
        assert peer.unasked == b""
        assert len(peer.rest) > 1 << 18 and page not in peer.rest


def test_pages_are_sent_to_a_destination_that_does_not_say_that_it_has_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older QEMU answers when it comes to it, and the time is over long before a user would notice."""
    monkeypatch.setattr(postcopy, "SETTLE_S", 0.01)

    class NeverSays(FakePeer):
        rest = b""

        def _serve(self) -> None:
            connection, _ = self.listener.accept()
            with connection:
                read_until(connection, ping(4))
                while len(self.rest) <= 1 << 18:
                    self.rest += connection.recv(1 << 20)
                connection.shutdown(socket.SHUT_WR)  # an end in order: what comes is still read
                while connection.recv(1 << 20):
                    pass

    with Pair(capabilities={"postcopy-ram": True}, parameters={"max-bandwidth": 1 << 20}) as pair:
        peer = NeverSays(b"")
        migrate_to(peer, pair)
        pair.migration.start_postcopy()
        wait_for(lambda: not pair.migration.is_running, "the source to end")
        peer.close()
        assert len(peer.rest) > 1 << 18
        pair.assert_guest_at("source")  # it has left without that word
