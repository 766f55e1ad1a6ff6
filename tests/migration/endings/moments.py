"""Ends of a migration between two machines without KVM, at a moment that chance chooses.

A moment is a number of bytes that have passed, or a time.  The rest is chosen, too: whether there is a return path, a
pause before the switchover, TLS, a rate limit, which kind of dirty log.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from qemumig.channels.address import ExecAddress, FdAddress, FileAddress, InetAddress
from qemumig.qapi import MigrationStatus, RunState
from tests.migration.endings.judgement import Judge
from tests.qemumig.channels.pki import x509_directory
from tests.support.pair import Cut, Pair, wait_for

LENGTH = 1600 << 10  # bytes of a stream, about: most moments are in it, some never come
DURATION_S = 0.06
DEVICES = 16 << 10  # the last bytes of a stream: device state and its description


class Scene:
    """A migration about to begin, dressed by *chance*; what the tests call a Pair, and its judge."""

    def __init__(
        self, chance: Random, directory: Path, *, cut: Cut | None = None, may_encipher: bool = True, **fixed: bool
    ) -> None:
        self.chance = chance
        wishes = {
            "return-path": chance.random() > 0.1,
            "pause-before-switchover": chance.random() < 0.3,
            "xbzrle": chance.random() < 0.3,
            **{name.replace("_", "-"): state for name, state in fixed.items()},
        }
        wishes["switchover-ack"] = wishes["return-path"] and chance.random() < 0.2
        limit = chance.choice((0, 0, 0, 20 << 20))
        self.pair = Pair(
            cut=cut,
            manual_clear=chance.random() < 0.7,
            capabilities=wishes,
            parameters={"max-bandwidth": limit, "downtime-limit": chance.choice((300, 2000))},
            tls=certificates(directory) if chance.random() < 0.2 and may_encipher else None,
        )
        self.judge = Judge(self.pair, has_return_path=wishes["return-path"])

    def __enter__(self) -> Scene:
        self.pair.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.pair.__exit__(*exception)

    def begin(self, action: Callable[[], None]) -> None:
        """Start, and let *action* happen at some moment; it may be over before."""
        if self.chance.random() < 0.5:
            self.pair.link.at(self.chance.randrange(1, LENGTH), action)
            self.pair.start()
        else:
            self.pair.start()
            time.sleep(self.chance.random() * DURATION_S)
            action()

    def end(self) -> str:
        """Wait, judge, and where the guest stayed migrate it after all."""
        self.judge.settle(self.chance)
        outcome = self.judge.outcome()
        if outcome in ("failed", "cancelled") and "source" in self.pair.running:
            self.judge.again()
            outcome += ", then completed"
        return outcome


def certificates(directory: Path) -> Path:
    """A directory of certificates, made once."""
    path = directory / "x509"
    return path if path.exists() else x509_directory(path)


# ---- somebody changes his mind ----


def cancel(chance: Random, directory: Path) -> str:
    with Scene(chance, directory) as scene:
        scene.begin(scene.pair.migration.cancel)
        return scene.end()


def cancel_in_the_pause(chance: Random, directory: Path) -> str:
    with Scene(chance, directory, pause_before_switchover=True) as scene:
        pair = scene.pair
        pair.start()
        wait_for(lambda: pair.migration.status is MigrationStatus.PRE_SWITCHOVER, "the pause")
        time.sleep(chance.random() * 0.01)
        pair.migration.cancel()
        return scene.end()


def cancel_while_connecting(chance: Random, directory: Path) -> str:
    """Nobody takes the connection out of the queue, which is full."""
    with Scene(chance, directory) as scene, socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        clients = [socket.socket() for _ in range(3)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        scene.pair.migration.start(InetAddress("127.0.0.1", str(server.getsockname()[1])))
        time.sleep(chance.random() * 0.02)
        scene.pair.migration.cancel()
        outcome = scene.end()
        for client in clients:
            client.close()
        return outcome


def cancel_with_a_deaf_peer(chance: Random, directory: Path) -> str:
    """It reads for a while, then no more; with TLS it never says a word."""
    with Scene(chance, directory) as scene, socket.create_server(("127.0.0.1", 0)) as server:
        scene.pair.migration.start(InetAddress("127.0.0.1", str(server.getsockname()[1])))
        peer, _ = server.accept()
        with peer:
            peer.settimeout(0.02)
            left = chance.randrange(1, LENGTH)
            with contextlib.suppress(TimeoutError):  # it waits for an answer
                while left > 0 and (data := peer.recv(min(left, 65536))):
                    left -= len(data)
            time.sleep(chance.random() * 0.02)
            scene.pair.migration.cancel()
            return scene.end()


def yank(chance: Random, directory: Path) -> str:
    with Scene(chance, directory) as scene:
        side = scene.chance.choice((scene.pair.migration, scene.pair.incoming))
        scene.begin(side.break_connection)
        return scene.end()


# ---- the link breaks ----


def cut(chance: Random, directory: Path) -> str:
    how, backwards = chance.choice(("reset", "end")), chance.random() < 0.2
    after = chance.randrange(1, 60) if backwards else chance.randrange(1, LENGTH)
    with Scene(chance, directory, cut=Cut(after, how, backwards)) as scene:
        scene.pair.start()
        return scene.end()


def cut_in_the_switchover(chance: Random, directory: Path) -> str:
    """The last bytes are few, and matter most."""
    with Scene(chance, directory, pause_before_switchover=True) as scene:
        pair = scene.pair
        pair.start()
        wait_for(lambda: pair.migration.status is not MigrationStatus.ACTIVE, "the pause")
        wait_for(lambda: pair.migration.status is MigrationStatus.PRE_SWITCHOVER, "the pause")
        pair.link.cut_after(chance.randrange(DEVICES), chance.choice(("reset", "end")))
        return scene.end()


# ---- the other side ends, or will not have it ----


def destination_ends(chance: Random, directory: Path) -> str:
    """Its process is told to quit, and takes down what it has; a new one takes its place."""
    with Scene(chance, directory) as scene:
        scene.begin(scene.pair.incoming.abandon)
        return scene.end()


def source_ends(chance: Random, directory: Path) -> str:
    """Its process is told to quit: the guest ends with it, unless the destination has it."""
    with Scene(chance, directory, return_path=True, pause_before_switchover=False) as scene:
        pair = scene.pair
        pair.start()
        time.sleep(chance.random() * DURATION_S)
        pair.migration.close()
        scene.judge.settle(chance)
        if pair.incoming.status is MigrationStatus.COMPLETED:
            assert "source" not in pair.running
            return scene.judge.outcome()
        pair.assert_guest_at("source")
        return f"{pair.migration.status.value} as the process ended"


def refusal(chance: Random, directory: Path) -> str:
    """The destination takes all of the stream, and then not the state of its devices."""
    with Scene(chance, directory, return_path=True) as scene:
        scene.pair.destination.refuses = "it does not like this"
        scene.pair.start()
        scene.judge.settle(chance)
        assert scene.judge.outcome() == "failed"
        assert "it does not like this" in scene.pair.incoming.query()["error-desc"]
        scene.pair.destination.refuses = ""
        scene.judge.again()
        return "failed, then completed"


# ---- where there is no other side ----


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file of this process grows beyond *size* bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def full_disk(chance: Random, directory: Path) -> str:
    """Written by name or through a descriptor, from an offset on or not."""
    path = directory / "stream"
    with Scene(chance, directory, may_encipher=False, return_path=False) as scene, room(chance.randrange(1, LENGTH)):
        if chance.random() < 0.3:
            scene.pair.fds["file"] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            scene.pair.migration.start(FdAddress("file"))
        else:
            scene.pair.migration.start(FileAddress(str(path), chance.choice((0, 4096))))
        scene.judge.settle(chance)
        path.unlink()
        if scene.pair.migration.status is MigrationStatus.COMPLETED:
            assert scene.pair.running == []
            return "there was room"
        assert "File too large" in scene.pair.migration.query()["error-desc"]
        return scene.end()


def command_that_dies(chance: Random, directory: Path) -> str:
    """A command that reads so many bytes and no more; nobody has the guest but its output."""
    with Scene(chance, directory, may_encipher=False, return_path=False) as scene:
        count = chance.randrange(1, LENGTH)
        scene.pair.migration.start(ExecAddress(("/bin/sh", "-c", f"head -c {count} >/dev/null")))
        scene.judge.settle(chance)
        if scene.pair.migration.status is MigrationStatus.COMPLETED:
            assert scene.pair.running == []
            return "it read all of it"
        return scene.end()


# ---- nothing goes wrong ----


def pause_and_go_on(chance: Random, directory: Path) -> str:
    with Scene(chance, directory, pause_before_switchover=True) as scene:
        scene.pair.start()
        return scene.end()


STATES = (RunState.PAUSED, RunState.PRELAUNCH, RunState.SHUTDOWN, RunState.IO_ERROR, RunState.WATCHDOG, RunState.DEBUG)


def stopped_guest(chance: Random, directory: Path) -> str:
    """It arrives, or stays, in the state in which it was, and runs nowhere."""
    state = chance.choice(STATES)
    with Scene(chance, directory, return_path=True) as scene:
        pair = scene.pair
        pair.source.stop(state)
        before = pair.source.digests()
        scene.begin(pair.migration.cancel if chance.random() < 0.5 else lambda: None)
        scene.judge.settle(chance)
        arrived = pair.migration.status is MigrationStatus.COMPLETED
        machine = pair.destination if arrived else pair.source
        assert (machine.runstate, pair.running, machine.digests()) == (state, [], before)
        assert pair.incoming.status is MigrationStatus.COMPLETED or not arrived
        return f"{state.value} {'there' if arrived else 'here'}"


KINDS: dict[str, Callable[[Random, Path], str]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        *(cancel, cancel_in_the_pause, cancel_while_connecting, cancel_with_a_deaf_peer, yank, cut, cut_in_the_switchover),
        *(destination_ends, source_ends, refusal, full_disk, command_that_dies, pause_and_go_on, stopped_guest),
    )
}
