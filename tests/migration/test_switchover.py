"""The moment of the switchover: a pause before it, the destination's consent, a cancel in it."""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

import pytest

from qemumig.channels.address import parse_channels, parse_uri
from qemumig.errors import StateError
from qemumig.qapi import MigrationStatus, RunState
from qemumig.savevm import commands
from tests.migration.test_channels import Ends
from tests.support.pair import Pair, wait_for

pytestmark = pytest.mark.usefixtures("no_leaks")

PAUSE = {"pause-before-switchover": True}
FIGURES = {"status", "total-time", "setup-time", "expected-downtime", "ram"}


def reach(pair: Pair, status: str) -> None:
    wait_for(lambda: pair.migration.status.value == status or not pair.migration.is_running, status)
    assert pair.migration.status.value == status, pair.migration.query()


def test_the_guest_stands_still_until_somebody_says_go_on() -> None:
    with Pair(capabilities=PAUSE) as pair:
        with pytest.raises(StateError, match="Migration not in expected state: none"):
            pair.migration.proceed(MigrationStatus.PRE_SWITCHOVER)
        pair.start()
        reach(pair, "pre-switchover")
        assert pair.running == [] and pair.source.runstate is RunState.FINISH_MIGRATE
        assert set(pair.migration.query()) == FIGURES
        assert pair.incoming.status is MigrationStatus.ACTIVE
        pair.migration.proceed(MigrationStatus.PRE_SWITCHOVER)
        pair.wait()
        assert pair.statuses == ("completed", "completed")
        pair.assert_guest_at("destination")
        words = [event[1] for event in pair.events["source"]]
        assert words[-4:-2] == ["pre-switchover", "device"] and words[-1] == "completed"
        assert pair.events["source"][-2][0] == "MIGRATION_PASS", "what was written since is looked for after the pause"


@pytest.mark.parametrize("running", [True, False], ids=["running", "paused"])
def test_a_cancel_in_the_pause_gives_the_guest_back_as_it_was(running: bool) -> None:
    with Pair(capabilities=PAUSE, running=running) as pair:
        if not running:
            pair.source.runstate = RunState.PAUSED
        pair.start()
        reach(pair, "pre-switchover")
        pair.migration.cancel()
        pair.wait()
        assert pair.statuses == ("cancelled", "failed")
        assert [event[1] for event in pair.events["source"]][-2:] == ["cancelling", "cancelled"]
        if running:
            pair.assert_guest_at("source")
        else:
            assert pair.source.runstate is RunState.PAUSED


@pytest.mark.parametrize("how", ["reset", "end"])
def test_a_connection_that_ends_in_the_pause_gives_the_guest_back_at_once(how: str) -> None:
    with Pair(capabilities=PAUSE) as pair:
        pair.start()
        reach(pair, "pre-switchover")
        pair.link.cut(how)
        pair.wait()
        assert pair.statuses == ("failed", "failed")
        assert "broke during the pause before the switchover" in pair.migration.query()["error-desc"]
        pair.assert_guest_at("source")


def test_a_pause_in_front_of_a_file(tmp_path: Path) -> None:
    ends = Ends()
    ends.here.set_capabilities(PAUSE.items())
    ends.outgoing.start(parse_uri(f"file:{tmp_path}/stream"))
    wait_for(lambda: ends.outgoing.status is MigrationStatus.PRE_SWITCHOVER, "the pause")
    ends.outgoing.proceed(MigrationStatus.PRE_SWITCHOVER)
    wait_for(lambda: not ends.outgoing.is_running, "the source to end")
    ends.listen(parse_uri(f"file:{tmp_path}/stream"))
    ends.assert_arrived()
    ends.close()


ACK = {"switchover-ack": True}


def test_a_destination_that_agrees_gets_the_guest() -> None:
    with Pair(capabilities=ACK) as pair:
        pair.migrate()
        assert pair.statuses == ("completed", "completed")
        pair.assert_guest_at("destination")


class Listener:
    """A destination that swallows the stream and says what a test tells it to."""

    def __init__(self, pair: Pair) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        pair.link.port = self._server.getsockname()[1]
        pair.start()
        self.connection, _ = self._server.accept()
        self.received = 0
        self._thread = threading.Thread(target=self._swallow)
        self._thread.start()

    def _swallow(self) -> None:
        while data := self.connection.recv(1 << 20):
            self.received += len(data)

    def say(self, message: commands.ReturnMessage) -> None:
        self.connection.sendall(commands.encode_return_message(message))

    def close(self) -> None:
        self._thread.join()
        self.connection.close()
        self._server.close()


def test_without_consent_the_guest_runs_on_and_its_memory_is_sent_again() -> None:
    with Pair(capabilities=ACK) as pair:
        peer = Listener(pair)
        wait_for(lambda: len([e for e in pair.events["source"] if e[0] == "MIGRATION_PASS"]) > 12, "many rounds")
        assert pair.migration.status is MigrationStatus.ACTIVE
        pair.assert_guest_at("source")
        peer.say(commands.SwitchoverAck())
        reach(pair, "device")
        pair.migration.cancel()
        wait_for(lambda: not pair.migration.is_running, "the cancel")
        peer.close()
        pair.assert_guest_at("source")


def test_a_destination_that_falls_silent_before_it_agreed_ends_the_migration() -> None:
    with Pair(capabilities=ACK) as pair:
        peer = Listener(pair)
        peer.connection.shutdown(socket.SHUT_WR)
        wait_for(lambda: not pair.migration.is_running, "the source to end")
        peer.close()
        assert pair.migration.status is MigrationStatus.FAILED
        assert "the destination closed the connection" in pair.migration.query()["error-desc"]
        pair.assert_guest_at("source")


def test_where_no_device_is_asked_nobody_waits_for_a_word() -> None:
    with Pair(capabilities=ACK) as pair:
        pair.migration._options.set_property("switchover-ack-legacy", "off")
        peer = Listener(pair)
        reach(pair, "device")
        pair.migration.cancel()
        wait_for(lambda: not pair.migration.is_running, "the cancel")
        peer.close()


def test_a_guest_that_stands_still_anyway_needs_no_consent() -> None:
    with Pair(capabilities=ACK, running=False) as pair:
        peer = Listener(pair)
        reach(pair, "device")
        pair.migration.cancel()
        wait_for(lambda: not pair.migration.is_running, "the cancel")
        peer.close()


@pytest.mark.parametrize("name", ["return-path", "switchover-ack"])
def test_a_wish_for_answers_is_refused_where_there_is_only_one_way(name: str, tmp_path: Path) -> None:
    ends = Ends()
    ends.here.set_capabilities([(name, True)])
    ends.outgoing.start(parse_uri(f"file:{tmp_path}/stream"))
    wait_for(lambda: not ends.outgoing.is_running, "the source to end")
    assert f"capability '{name}' needs a transport that flows both ways" in ends.outgoing.query()["error-desc"]
    ends.close()


BRIDGE = """
import os, socket, threading
sock = socket.socket(socket.AF_UNIX)
sock.connect({path!r})
def back():
    while data := sock.recv(65536):
        os.write(1, data)
threading.Thread(target=back, daemon=True).start()
while data := os.read(0, 65536):
    sock.sendall(data)
"""


def test_a_command_that_carries_both_ways_can_have_a_return_path(tmp_path: Path) -> None:
    ends = Ends()
    ends.here.set_capabilities([("return-path", True)])
    ends.listen(parse_uri(f"unix:{tmp_path}/s"))
    args = [sys.executable, "-c", BRIDGE.format(path=f"{tmp_path}/s")]
    channel = {"channel-type": "main", "addr": {"transport": "exec", "args": args}}
    ends.send(parse_channels([channel], incoming=False))
    ends.assert_arrived()
    ends.close()
