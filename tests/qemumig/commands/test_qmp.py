"""qemumig.commands.qmp: the migration commands over two machines without KVM (qmp.md §5, §6)."""

import asyncio
import socket
import threading

import pytest

from qemumig.commands.command import CommandError
from qemumig.commands.qmp import MigrationCommands
from qemumig.options import MigrationOptions
from qemumig.qapi import MigrationStatus
from tests.support.fake_machine import FakeMachine
from tests.support.pair import no_fd, wait_for

INET = {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "1"}


class Side:
    """One end: a machine, its commands, and what it had to say."""

    def __init__(self, incoming=False):
        self.machine = FakeMachine(4 << 20, guest=True, incoming=incoming)
        self.events = []
        self.failures = []
        self.control = MigrationCommands(
            self.machine,
            MigrationOptions(),
            emit=lambda name, data=None: self.events.append((name, *(data or {}).values())),
            take_fd=no_fd,
            exit_process=lambda status, message: self.failures.append((status, message)),
        )
        self.commands = {command.name: command for command in self.control.commands()}

    def ask(self, name, **arguments):
        """The result of a command, which is of the type that it declares."""
        command = self.commands[name]
        result = asyncio.run(command.call({key.replace("_", "-"): value for key, value in arguments.items()}))
        command.returns.check(result, "return")
        return result

    def refusal(self, name, **arguments):
        with pytest.raises(CommandError) as caught:
            self.ask(name, **arguments)
        return caught.value.desc

    def close(self):
        asyncio.run(self.control.close())
        self.machine.close()


@pytest.fixture
def source():
    side = Side()
    yield side
    side.close()


@pytest.fixture
def destination():
    side = Side(incoming=True)
    yield side
    side.close()


def listening(destination):
    destination.ask("migrate-incoming", uri="tcp:127.0.0.1:0", exit_on_error=False)
    return destination.ask("query-migrate")["socket-address"][0]["port"]


def test_a_migration_from_the_first_command_to_the_last(source, destination):
    for side in (source, destination):
        side.ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    source.ask("migrate-set-parameters", max_bandwidth=0)
    source.machine.start()
    port = listening(destination)
    source.ask("migrate", channels=[{"channel-type": "main", "addr": {**INET, "port": port}}])
    wait_for(lambda: source.ask("query-migrate")["status"] == "completed", "the source")
    wait_for(lambda: destination.ask("query-migrate")["status"] == "completed", "the destination")
    assert source.events[0] == ("MIGRATION", "setup")
    assert source.refusal("migrate", uri="tcp:x:1") == "Can't migrate the vm that was paused due to previous migration"
    assert destination.refusal("migrate-incoming", uri="x:1") == "The incoming migration has already been started"


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({}, "need either 'uri' or 'channels' argument"),
        (
            {"uri": "tcp:a:1", "channels": [{"channel-type": "main", "addr": INET}]},
            "need either 'uri' or 'channels' argument",
        ),
        ({"channels": []}, "need either 'uri' or 'channels' argument"),
        ({"channels": [{"channel-type": "main", "addr": INET}] * 2}, "Channel list has more than one main entry"),
        ({"uri": "foo:1"}, "unknown migration protocol: foo:1"),
        ({"uri": "tcp:127.0.0.1:1", "resume": True}, "Cannot resume if there is no paused migration"),
        ({"channels": [{"channel-type": "main", "addr": {**INET, "port": 5}}]}, "…addr.port', expected: string"),
        ({"channels": [{"channel-type": "main", "addr": {**INET, "to": 70000}}]}, "Parameter 'to' expects uint16_t"),
        ({"channels": [{"channel-type": "main", "addr": {**INET, "numeric": 1}}]}, "…addr.numeric', expected: boolean"),
    ],
)
def test_migrate_says_what_is_wrong_and_changes_nothing(source, arguments, desc):
    refusal = source.refusal("migrate", **arguments)
    assert refusal == desc or (desc[0] == "…" and refusal.endswith(desc[1:]))
    assert source.ask("query-migrate") == {}


def test_migrate_incoming_looks_at_the_machine_first(source):
    assert source.refusal("migrate-incoming") == "'-incoming' was not specified on the command line"
    assert source.refusal("migrate-incoming", uri="foo:1") == "'-incoming' was not specified on the command line"


def test_migrate_is_refused_while_a_guest_is_expected(destination):
    assert destination.refusal("migrate", uri="tcp:127.0.0.1:1") == "Guest is waiting for an incoming migration"


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({}, "need either 'uri' or 'channels' argument"),
        ({"uri": "defer"}, "unknown migration protocol: defer"),
        (
            {"channels": [{"channel-type": "main", "addr": INET}] * 2},
            "Channel list must have only one entry, for type 'main'",
        ),
    ],
)
def test_migrate_incoming_says_what_is_wrong(destination, arguments, desc):
    assert destination.refusal("migrate-incoming", **arguments) == desc
    listening(destination)


@pytest.mark.parametrize("state", [status.value for status in MigrationStatus if status.value != "none"])
def test_migrate_continue_wants_the_state_that_there_is(source, state):
    assert source.refusal("migrate-continue", state=state) == "Migration not in expected state: none"


def test_migrate_continue_in_the_state_that_there_is_succeeds(source):
    assert source.ask("migrate-continue", state="none") == {}


def test_cancel_is_without_effect_where_nothing_runs(source, destination):
    assert source.ask("migrate_cancel") == {}
    assert destination.ask("migrate_cancel") == {}


@pytest.mark.parametrize(
    ("arguments", "desc", "error_class"),
    [
        ({"protocol": "vnc", "hostname": "h"}, "Parameter 'protocol' expects 'spice'", "GenericError"),
        ({"protocol": "spice", "hostname": "h", "port": 1}, "SPICE is not in use", "DeviceNotActive"),
        ({"protocol": "spice"}, "Parameter 'hostname' is missing", "GenericError"),
    ],
)
def test_there_is_no_spice(source, arguments, desc, error_class):
    with pytest.raises(CommandError) as caught:
        source.ask("client_migrate_info", **arguments)
    assert (caught.value.desc, caught.value.error_class) == (desc, error_class)


# ---- against a peer that does not read ----


@pytest.fixture
def mute_peer():
    """A listening socket whose backlog takes connections that nobody reads."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"tcp:127.0.0.1:{listener.getsockname()[1]}"


def stuck(source, uri):
    """Migrate to a peer that takes what the socket buffers take, a round or all of them, and never answers."""
    source.machine.start()
    source.ask("migrate-set-parameters", max_bandwidth=0)
    source.ask("migrate", uri=uri)
    wait_for(lambda: source.ask("query-migrate")["status"] in ("active", "device"), "the first pages")


def test_threads_are_listed_while_a_migration_runs(source, mute_peer):
    assert source.ask("query-migrationthreads") == []
    stuck(source, mute_peer)
    (thread,) = source.ask("query-migrationthreads")
    assert thread["name"] == "mig/src/main"
    assert thread["thread-id"] in [one.native_id for one in threading.enumerate()]


def test_a_yanked_migration_fails_and_the_guest_runs_on(source, mute_peer):
    assert not source.control.is_under_way
    stuck(source, mute_peer)
    assert source.control.is_under_way
    source.control.yank()
    wait_for(lambda: source.ask("query-migrate")["status"] == "failed", "the end")
    assert source.ask("query-migrate")["error-desc"]
    assert source.machine.runstate.value == "running"
    assert not source.control.is_under_way


def test_a_yanked_destination_fails_and_takes_another_guest(destination):
    port = listening(destination)
    with socket.create_connection(("127.0.0.1", int(port))) as peer:
        wait_for(lambda: destination.ask("query-migrate")["status"] == "active", "the connection")
        assert destination.control.is_under_way
        destination.control.yank()
        assert peer.recv(1) == b""
        wait_for(lambda: destination.ask("query-migrate")["status"] == "failed", "the end")
    assert not destination.control.is_under_way
    listening(destination)


def test_yanking_a_destination_that_listens_changes_nothing(destination):
    listening(destination)
    destination.control.yank()
    assert destination.ask("query-migrate")["status"] == "setup"


def test_what_bars_a_migration_is_listed_at_any_time_and_said_when_it_is_asked_for(source, destination):
    assert source.ask("query-migrate") == {}
    source.machine.migration_blockers = ["it is nailed down", "it is asleep"]
    assert source.ask("query-migrate") == {"blocked-reasons": ["it is nailed down", "it is asleep"]}
    assert source.refusal("migrate", uri="tcp:127.0.0.1:1") == "it is nailed down"
    assert source.ask("query-migrate") == {"blocked-reasons": ["it is nailed down", "it is asleep"]}
    source.machine.migration_blockers = []
    source.ask("migrate", uri="tcp:127.0.0.1:1")
    destination.machine.migration_blockers = ["it is nailed down"]
    listening(destination)
    assert destination.ask("query-migrate")["blocked-reasons"] == ["it is nailed down"]
