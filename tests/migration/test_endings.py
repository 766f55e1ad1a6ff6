"""Every way in which a precopy can end, on machines without KVM: where the guest runs then, and what stays behind.

The rows are those of state-machine.md §5.  The moment of a cut is a byte of the stream, chosen all over it.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time

import pytest

from qemumig import trace
from qemumig.channels.address import FdAddress, InetAddress
from qemumig.errors import MigrationError, StateError
from qemumig.qapi import RunState
from qemumig.savevm import commands
from qemumig.source.attempt import Attempt
from qemumig.source.writer import StreamWriter
from tests.support.fake_peer import FakePeer, migrate_to, ping, pong, read_until
from tests.support.pair import Cut, Pair, wait_for


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> object:
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("manual_clear", [True, False], ids=["manual-clear", "plain-log"])
def test_the_guest_moves(manual_clear: bool) -> None:
    with Pair(manual_clear=manual_clear) as pair:
        wait_for(lambda: pair.source.guest.passes > 1, "the guest to warm up")
        pair.migrate()
        assert pair.statuses == ("completed", "completed")
        pair.assert_guest_at("destination")
        assert pair.source.runstate is RunState.POSTMIGRATE
        assert pair.events["source"][:3] == [("MIGRATION", "setup"), ("MIGRATION_PASS", 1), ("MIGRATION", "active")]
        assert pair.events["source"][-3][1] == "device" and pair.events["source"][-1] == ("MIGRATION", "completed")
        assert pair.events["destination"] == [("MIGRATION", word) for word in ("setup", "active", "completed")]
        with pytest.raises(StateError, match="Can't migrate the vm that was paused due to previous migration"):
            pair.start()


@pytest.mark.parametrize("manual_clear", [True, False], ids=["manual-clear", "plain-log"])
def test_memory_and_devices_of_a_stopped_guest_are_the_same_afterwards(manual_clear: bool) -> None:
    with Pair(running=False, manual_clear=manual_clear) as pair:
        pair.source.runstate = RunState.PAUSED
        pair.source.records["cpu", 0].regs = list(range(16))
        pair.migrate()
        assert pair.statuses == ("completed", "completed")
        assert pair.source.digests() == pair.destination.digests()
        assert pair.source.records == pair.destination.records
        assert pair.destination.runstate is RunState.PAUSED
        assert pair.running == []


def test_without_a_return_path_the_source_believes_its_last_write() -> None:
    with Pair(capabilities={"return-path": False}) as pair:
        pair.migrate()
        assert pair.statuses == ("completed", "completed")
        pair.assert_guest_at("destination")
        assert pair.link.passed[1] == 0


def shortest_stream() -> int:
    """Bytes of a stream of which the guest writes nothing a second time."""
    with Pair(running=False) as pair:
        pair.migrate()
        return pair.link.passed[0]


@pytest.mark.parametrize("how", ["reset", "end"])
def test_a_cut_before_the_last_byte_leaves_the_guest_at_the_source(how: str) -> None:
    chance = random.Random(1)
    length = shortest_stream()
    moments = [1, 8, 9, 30, *(chance.randrange(1, length * 3 // 4) for _ in range(16))]
    for after in moments:
        with Pair(cut=Cut(after, how)) as pair:
            pair.migrate()
            assert pair.statuses == ("failed", "failed"), f"cut after {after} bytes"
            pair.assert_guest_at("source")
            assert pair.migration.query()["error-desc"]
            assert pair.incoming.query()["error-desc"]
            assert pair.destination.loads == 0, "no device state took effect"


def test_a_cut_during_the_switchover_never_lets_two_sides_run() -> None:
    """A paused guest makes the stream's length exact, so that cuts can be put around its last write."""
    with Pair(running=False) as pair:
        pair.migrate()
        length = pair.link.passed[0]
        last_write = len(pair.link.tail) - pair.link.tail.rindex(b'{"configuration"') + 6
    for how in ("reset", "end"):
        for after in (length - last_write - 1, length - last_write, length - last_write // 2, length - 1):
            with Pair(running=False, cut=Cut(after, how)) as pair:
                pair.migrate()
                assert pair.statuses == ("failed", "failed")
                assert pair.destination.loads == 0
                if after > length - last_write and how == "reset":  # in the middle of the last write: nobody can tell
                    assert pair.source.runstate is RunState.POSTMIGRATE
                    assert "use 'cont'" in pair.migration.query()["error-desc"]
                else:
                    assert pair.source.runstate is RunState.PRELAUNCH


def test_a_word_that_is_lost_leaves_the_source_stopped_and_says_so() -> None:
    with Pair() as pair:
        pair.migrate()
        back = pair.link.passed[1]
    with Pair(cut=Cut(back - 1, "reset", backwards=True)) as pair:
        pair.migrate()
        assert pair.migration.status.value == "failed"
        assert pair.source.runstate is RunState.POSTMIGRATE
        assert "use 'cont'" in pair.migration.query()["error-desc"]
        assert "source" not in pair.running


REFUSALS = {
    "clean end": b"",
    "SHUT 1": commands.encode_return_message(commands.Shut(1)),
    "PONG and SHUT 7": commands.encode_return_message(commands.Pong(99)) + commands.encode_return_message(commands.Shut(7)),
}


@pytest.mark.parametrize("answer", REFUSALS)
def test_a_destination_that_refuses_gives_the_guest_back(answer: str) -> None:
    with Pair() as pair:
        peer = FakePeer(REFUSALS[answer])
        migrate_to(peer, pair)
        wait_for(lambda: not pair.migration.is_running, "the source to end")
        peer.close()
        assert pair.migration.status.value == "failed"
        pair.assert_guest_at("source")
        if answer != "clean end":
            assert f"Sibling indicated error {answer[-1]}" in pair.migration.query()["error-desc"]


NOISE = {
    "unknown message": b"\x00\x63\x00\x00",
    "too long": b"\x00\x01\xff\xff",
    "half a message": commands.encode_return_message(commands.Shut(0))[:5],
    "wrong length": b"\x00\x01\x00\x02\x00\x00",
    "resume out of place": commands.encode_return_message(commands.ResumeAck()),
}


@pytest.mark.parametrize("noise", NOISE)
def test_noise_instead_of_a_word_is_not_taken_for_one(noise: str) -> None:
    with Pair() as pair:
        peer = FakePeer(NOISE[noise])
        migrate_to(peer, pair)
        wait_for(lambda: not pair.migration.is_running, "the source to end")
        peer.close()
        assert pair.migration.status.value == "failed"
        assert "use 'cont'" in pair.migration.query()["error-desc"]
        assert pair.running == [] and pair.source.runstate is RunState.POSTMIGRATE


class Breaker(FakePeer):
    """It takes a part of the last write, and then resets the connection."""

    def _serve(self) -> None:
        connection, _ = self.listener.accept()
        read_until(connection, ping(0x10))
        connection.sendall(pong(0x10) + pong(LAST_PONG) + self._answer)
        connection.recv(1 << 20)
        self.has_last_write.set()
        self.done.wait(10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


LAST_PONG = 0x77


@pytest.mark.parametrize("answer", ["clean end", "SHUT 1"])
def test_a_reset_that_the_writer_took_is_no_refusal(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of it once: who reads afterwards sees an ordinary end, and whatever had come before."""
    heard, broke = threading.Event(), threading.Event()

    def hold_reader(value: int) -> None:
        if value == LAST_PONG:
            heard.set()
            assert broke.wait(10)

    monkeypatch.setattr(trace, "source_return_path_thread_pong", hold_reader)
    monkeypatch.setattr(StreamWriter, "last_words", lambda writer, described: bytes(64 << 20))  # more than a link holds
    give_up = Attempt._give_up

    def judge(attempt: Attempt, error: MigrationError | None = None) -> None:
        broke.set()
        assert attempt._return_path is not None and attempt._return_path.wait(10)
        give_up(attempt, error)

    monkeypatch.setattr(Attempt, "_give_up", judge)
    with Pair() as pair:
        peer = Breaker(REFUSALS[answer])
        migrate_to(peer, pair)
        assert heard.wait(10)
        assert peer.has_last_write.wait(10)
        peer.close()
        wait_for(lambda: not pair.migration.is_running, "the source to end")
        assert pair.migration.status.value == "failed"
        if answer == "SHUT 1":
            pair.assert_guest_at("source")
        else:
            assert pair.running == [] and pair.source.runstate is RunState.POSTMIGRATE
            assert "use 'cont'" in pair.migration.query()["error-desc"]


def test_a_yank_after_the_last_byte_says_nothing_of_the_destination() -> None:
    with Pair() as pair:
        peer = FakePeer(b"", close=False)
        migrate_to(peer, pair)
        assert peer.has_last_write.wait(10)
        pair.migration.break_connection()
        wait_for(lambda: not pair.migration.is_running, "the source to end")
        peer.close()
        assert pair.migration.status.value == "failed"
        assert "use 'cont'" in pair.migration.query()["error-desc"]
        assert pair.running == [] and pair.source.runstate is RunState.POSTMIGRATE


class TakesThePackage(FakePeer):
    """A destination of postcopy that has the guest, and has not said so yet."""

    def __init__(self) -> None:
        self.taken = threading.Event()
        super().__init__(b"")

    def _serve(self) -> None:
        connection, _ = self.listener.accept()
        read_until(connection, ping(4))
        self.taken.set()
        self.done.wait(10)
        connection.close()


def test_who_breaks_a_handover_does_not_take_its_end_for_a_refusal() -> None:
    with Pair(capabilities={"postcopy-ram": True}) as pair:
        peer = TakesThePackage()
        migrate_to(peer, pair)
        pair.migration.start_postcopy()
        assert peer.taken.wait(10)
        pair.migration.break_connection()
        wait_for(lambda: pair.migration.status.value in ("postcopy-paused", "failed"), "the pause")
        assert pair.migration.status.value == "postcopy-paused"
        assert pair.running == []
        peer.close()


def test_a_cancel_at_any_moment_ends_with_the_guest_in_one_place() -> None:
    chance = random.Random(2)
    ends = set()
    for _ in range(40):
        with Pair() as pair:
            pair.start()
            time.sleep(chance.random() * 0.03)
            pair.migration.cancel()
            pair.wait()
            ends.add(pair.statuses)
            assert pair.statuses in {("cancelled", "failed"), ("completed", "completed")}
            pair.assert_guest_at("source" if pair.statuses[0] == "cancelled" else "destination")
    assert ("cancelled", "failed") in ends


def test_a_cancel_after_the_last_byte_waits_for_the_word() -> None:
    with Pair() as pair:
        peer = FakePeer(b"", close=False)
        migrate_to(peer, pair)
        assert peer.has_last_write.wait(10)
        pair.migration.cancel()
        assert pair.migration.status.value == "cancelling"
        assert pair.running == []
        peer.close()  # a clean end: the destination has not started
        wait_for(lambda: not pair.migration.is_running, "the source to end")
        assert pair.migration.status.value == "cancelled"
        pair.assert_guest_at("source")


def test_a_peer_that_stops_reading_does_not_hold_a_cancel() -> None:
    with Pair(ram_size=32 << 20) as pair, socket.create_server(("127.0.0.1", 0)) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        pair.link.port = deaf.getsockname()[1]
        pair.start()
        connection, _ = deaf.accept()
        wait_for(lambda: pair.migration.status.value == "active", "the rounds")
        pair.migration.cancel()
        wait_for(lambda: not pair.migration.is_running, "the source to end")
        assert pair.migration.status.value == "cancelled"
        pair.assert_guest_at("source")
        connection.close()


class Deaf:
    """A listener that takes every connection and reads nothing."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0), backlog=16)
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.port = self._server.getsockname()[1]
        self.connections: list[socket.socket] = []

    def take(self, count: int) -> None:
        self.connections += [self._server.accept()[0] for _ in range(count)]

    def close(self) -> None:
        for one in (self._server, *self.connections):
            one.close()


@pytest.mark.parametrize("channels", [1, 3], ids=["one-channel", "multifd"])
@pytest.mark.parametrize("how", ["yank", "tunnel"])
def test_a_source_before_a_full_way_is_set_free(how: str, channels: int) -> None:
    """By a yank; or when a tunnel, whose far end is gone, says so backwards, and goes on to take nothing."""
    with Pair(ram_size=32 << 20) as pair:
        options = pair.migration._options
        options.set_capabilities([("multifd", channels > 1)])
        options.set_parameters({"multifd-channels": channels - 1 or 2})
        deaf = Deaf()
        pair.link.port = deaf.port
        pair.start()
        deaf.take(channels)
        wait_for(lambda: pair.migration.status.value == "active", "the rounds")
        wait_for(lambda: pair.migration.query()["ram"]["transferred"] > 0, "the first pages")
        if how == "yank":
            pair.migration.break_connection()
        else:
            deaf.connections[0].shutdown(socket.SHUT_WR)
        wait_for(lambda: not pair.migration.is_running, "the source to end")
        assert pair.migration.status.value == "failed"
        reason = "the destination closed the connection before it had loaded" if how == "tunnel" else "Broken pipe"
        assert reason in pair.migration.query()["error-desc"]
        pair.assert_guest_at("source")
        deaf.close()


def test_a_guest_that_somebody_stops_at_the_last_moment_arrives_stopped() -> None:
    with Pair() as pair:
        stop = pair.source.stop

        def stop_twice(state: RunState) -> RunState:
            if state is RunState.FINISH_MIGRATE:
                stop(RunState.PAUSED)  # the monitor is a moment faster
            return stop(state)

        pair.source.stop = stop_twice
        pair.migrate()
        assert pair.statuses == ("completed", "completed")
        assert pair.destination.runstate is RunState.PAUSED
        assert pair.running == []


def test_a_full_disk_leaves_the_guest_at_the_source() -> None:
    with Pair() as pair:
        pair.fds["full"] = os.open("/dev/full", os.O_WRONLY)
        pair.migration.start(FdAddress("full"))
        wait_for(lambda: not pair.migration.is_running, "the source to end")
        assert pair.migration.status.value == "failed"
        assert "No space left on device" in pair.migration.query()["error-desc"]
        pair.assert_guest_at("source")


def test_a_source_migrates_again_after_a_failure_and_so_does_the_destination() -> None:
    with Pair(cut=Cut(100000)) as pair:
        pair.migrate()
        assert pair.statuses == ("failed", "failed")
        pair.incoming.listen(InetAddress("127.0.0.1", "0"))
        pair.link.port = int(pair.incoming.query()["socket-address"][0]["port"])
        pair.start()
        pair.wait()
        assert pair.statuses == ("completed", "completed")
        pair.assert_guest_at("destination")


def test_a_failed_load_ends_the_process_unless_told_otherwise() -> None:
    with Pair(cut=Cut(5000), exit_on_error=True) as pair:
        pair.migrate()
        wait_for(lambda: bool(pair.failures), "the process to be ended")
        (message,) = pair.failures
        assert message.startswith("load of migration failed: ")


def test_the_rate_limit_holds() -> None:
    limit = 4 << 20
    with Pair(parameters={"max-bandwidth": limit}, ram_size=8 << 20, running=False) as pair:
        start = time.monotonic()
        pair.migrate()
        elapsed = time.monotonic() - start
        assert pair.statuses == ("completed", "completed")
        assert pair.link.passed[0] <= limit * (elapsed + 0.2) + (1 << 20), "no window was overdrawn by much"


def test_a_destination_that_is_stopped_keeps_the_guest_stopped() -> None:
    with Pair() as pair:
        pair.incoming.set_autostart(False)
        pair.migrate()
        assert pair.statuses == ("completed", "completed")
        assert pair.destination.runstate is RunState.PAUSED
        assert pair.running == []
