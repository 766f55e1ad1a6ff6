"""The first moments after the switch belong to the guest: until it runs there, only what it asks for is sent."""

from __future__ import annotations

import socket
import struct

import pytest

from qemumig.qapi import RunState
from qemumig.savevm import commands
from qemumig.savevm.commands import Shut, encode_return_message
from qemumig.source import postcopy
from qemumig.source.writer import StreamWriter
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


def refuse(connection: socket.socket) -> None:
    """End the connection in order: what comes is still read."""
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(1 << 20):
        pass


def hand_over(pair: Pair, peer: FakePeer) -> None:
    """Migrate to *peer* by postcopy, until the source has ended."""
    migrate_to(peer, pair)
    switch(pair, peer)


def switch(pair: Pair, peer: FakePeer) -> None:
    """Let the guest of a migration that runs go to *peer* at once, until the source has ended."""
    pair.migration.start_postcopy()
    wait_for(lambda: not pair.migration.is_running, "the source to end")
    peer.close()


def test_only_what_is_asked_for_is_sent_until_the_guest_runs_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is the first that is said on the return path since the switch."""
    monkeypatch.setattr(postcopy, "SETTLE_S", 3600)  # the word of the destination ends the wait, not the time
    with Pair(capabilities={"postcopy-ram": True}, parameters={"max-bandwidth": 1 << 20}) as pair:
        page = pair.source.read(pair.source.ram, LAST_PAGE, 4096)
        assert page != bytes(4096)
        peer = TakesItsTime()
        hand_over(pair, peer)
        assert pair.migration.status.value == "completed"
        assert page in peer.asked_for and len(peer.asked_for) < 2 * 4096
        assert peer.unasked == b""
        assert len(peer.rest) > 1 << 18 and page not in peer.rest


def test_what_is_dirty_is_discarded_while_the_guest_still_runs() -> None:
    """What it writes until it stands still comes after the stop, and no page comes twice."""

    class Looks(FakePeer):
        early = late = b""
        written = 0
        runstate: RunState | None = None

        def _serve(self) -> None:
            connection, _ = self.listener.accept()
            with connection:
                while ping(1) not in self.early:
                    self.early += connection.recv(1 << 20)
                connection.sendall(pong(1))
                while ping(commands.PING_DRAINED) not in self.early:
                    self.early += connection.recv(1 << 20)
                self.runstate = pair.source.runstate
                clean = set(range(pair.source.ram.pages)) - {page for _, page in discarded(self.early)}
                self.written = max(clean)
                pair.source.write(pair.source.ram, self.written * 4096, b"new")
                connection.sendall(pong(commands.PING_DRAINED))
                while ping(2) not in self.late:
                    self.late += connection.recv(1 << 20)
                refuse(connection)

    slow = {"max-bandwidth": 4 << 20, "downtime-limit": 1}  # it does not get so far in precopy
    with Pair(capabilities={"postcopy-ram": True}, parameters=slow) as pair:
        peer = Looks(b"")
        migrate_to(peer, pair)
        wait_for(lambda: pair.migration.query().get("ram", {}).get("dirty-sync-count", 0) > 1, "a whole pass")
        switch(pair, peer)
        assert peer.runstate is RunState.RUNNING
        early, late = discarded(peer.early), discarded(peer.late)
        assert early and (b"microvm.ram", peer.written) in late and not early & late
        pair.assert_guest_at("source")


def test_a_refusal_right_behind_the_last_byte_of_the_package_gives_the_guest_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next write fails: that is no failure of the migration before the destination's last word was looked at."""

    class Refuses(FakePeer):
        def _serve(self) -> None:
            connection, _ = self.listener.accept()
            with connection:
                read_until(connection, ping(TAKEN))
                refuse(connection)

    def wait_for_refusal(self: StreamWriter, command: commands.Command) -> None:
        if command == commands.Ping(4):
            path = pair.migration._attempt._return_path  # type: ignore[union-attr]
            wait_for(lambda: path.verdict is not None, "the end of the return path")
            wait_for(lambda: not path._thread.is_alive(), "its reader")
        write(self, command)

    write = StreamWriter.command
    monkeypatch.setattr(StreamWriter, "command", wait_for_refusal)
    with Pair(capabilities={"postcopy-ram": True}, parameters={"max-bandwidth": 1 << 20}) as pair:
        peer = Refuses(b"")
        hand_over(pair, peer)
        assert pair.migration.status.value == "failed"
        pair.assert_guest_at("source")


def discarded(stream: bytes) -> set[tuple[bytes, int]]:
    """Block and number of every page that the commands in *stream* say to forget."""
    pages: set[tuple[bytes, int]] = set()
    for block in (b"microvm.ram", b"rom"):
        mark = bytes([0, len(block)]) + block + b"\0"
        at = stream.find(b"\x08\0\6")
        while at >= 0:
            length = int.from_bytes(stream[at + 3 : at + 5], "big")
            body = stream[at + 5 : at + 5 + length]
            if body.startswith(mark) and (length - len(mark)) % 16 == 0:
                numbers = struct.unpack(f">{(length - len(mark)) // 8}Q", body[len(mark) :])
                for start, size in zip(numbers[::2], numbers[1::2], strict=True):
                    pages |= {(block, page) for page in range(start // 4096, (start + size) // 4096)}
            at = stream.find(b"\x08\0\6", at + 1)
    return pages


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
                refuse(connection)

    with Pair(capabilities={"postcopy-ram": True}, parameters={"max-bandwidth": 1 << 20}) as pair:
        peer = NeverSays(b"")
        hand_over(pair, peer)
        assert len(peer.rest) > 1 << 18
        pair.assert_guest_at("source")  # it has left without that word
