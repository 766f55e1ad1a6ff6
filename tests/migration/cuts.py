"""Postcopy whose link is reset at random bytes, and mended, again and again: `python -m tests.migration.cuts --cuts 200`.

A relay stands between two VMMs and resets both of its connections after a random number of bytes; then the destination
listens anew, and the source goes on through another relay.  After some cuts the rest is let through: the guest, which
checks itself, must be well.  The seed is printed; the same seed makes the same choices.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import select
import shutil
import socket
import struct
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

from qemumig.cli.guest import ALL_CHECKS, FILL_RANDOM
from tests.support.host import qemumig_system
from tests.support.postcopy import advise, wait_status
from tests.support.vmm import MIB, GuestParameters, Stage, Vmm, listen, wait_until

CUTS_A_GUEST = 20
UNLIMITED = 1 << 40
SETTLED = ("completed", "postcopy-paused")
REACHES = (200, 6000, 1 << 20, 1 << 21)  # bytes: in the middle of a recovery, of the first pages, of many


class Relay:
    """Connections to *target* pass until *budget* bytes have; then all of them are reset."""

    def __init__(self, target: int, budget: int) -> None:
        self.budget = budget
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._ways: dict[socket.socket, socket.socket] = {}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        open_ways: dict[socket.socket, socket.socket] = {}
        while self.budget >= 0 and not self._ending.is_set():
            for ready in select.select([self._listener, *open_ways], [], [], 0.1)[0]:
                if ready is self._listener:
                    near, far = self._listener.accept()[0], socket.create_connection(("127.0.0.1", self._target))
                    self._ways |= {near: far, far: near}
                    open_ways |= {near: far, far: near}
                elif not self._pass(ready, open_ways[ready]):
                    del open_ways[ready]
        for sock in self._ways:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        self._listener.close()

    def _pass(self, source: socket.socket, target: socket.socket) -> bool:
        data = b""
        with contextlib.suppress(OSError):
            data = source.recv(65536)
            target.sendall(data[: max(self.budget, 0)])
        self.budget -= len(data)
        if not data:
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)
        return bool(data)

    def close(self) -> None:
        self._ending.set()
        self._thread.join()


def cut_one(stage: Stage, chance: random.Random, source: Vmm, destination: Vmm) -> int:
    """Move the guest, with cuts; how many there were."""
    relay = Relay(int(listen(destination).rsplit(":", 1)[1]), UNLIMITED)
    source.command("migrate", uri=f"tcp:127.0.0.1:{relay.port}")
    wait_status(source, "active")
    wait_until(lambda: source.command("query-migrate")["ram"]["transferred"] > 0, "some bytes to be sent")
    source.command("migrate-start-postcopy")
    destination.wait_runstate("running")
    relay.budget = chance.randrange(1, 1 << 19)
    cuts = 0
    while wait_status(source, *SETTLED) != "completed" and wait_status(destination, *SETTLED) != "completed":
        relay.close()
        cuts += 1
        destination.command("migrate-recover", uri="tcp:127.0.0.1:0")
        (where,) = (one for one in destination.command("query-migrate")["socket-address"] if one["type"] == "inet")
        budget = chance.randrange(1, chance.choice(REACHES)) if cuts < CUTS_A_GUEST else UNLIMITED
        relay = Relay(int(where["port"]), budget)
        source.command("migrate", uri=f"tcp:127.0.0.1:{relay.port}", resume=True)
        wait_until(partial(has_gone_on, source, relay), "the source to go on")
    wait_status(destination, "completed")
    relay.close()
    stage.assert_guest_is_well(destination)
    return cuts


def has_gone_on(source: Vmm, relay: Relay) -> bool:
    """Whether *source* is paused no longer, or again: a QEMU says for a moment that it is while it begins."""
    return relay.budget < 0 or source.command("query-migrate")["status"] != "postcopy-paused"


def run(wanted: int, source_system: str, destination_system: str, seed: int, *, multifd: bool) -> None:
    chance = random.Random(seed)
    cuts = guests = 0
    while cuts < wanted:
        preempt, cpus = chance.random() < 0.5, chance.choice((1, 2))
        guest = GuestParameters(dirty_pages=4096, fill_pages=4096, fill_mode=FILL_RANDOM, flags=ALL_CHECKS, cpus=cpus)
        directory = Path(tempfile.mkdtemp(prefix="qmt-"))
        stage = Stage(directory)
        try:
            source = stage.vmm("source", source_system, guest=guest, memory=64 * MIB, unlimited=False)
            destination = stage.vmm("destination", destination_system, memory=64 * MIB, incoming=True, unlimited=False)
            advise([source, destination], postcopy_preempt=preempt, multifd=multifd)
            cuts += cut_one(stage, chance, source, destination)
        finally:
            stage.close()
            shutil.rmtree(directory)
        guests += 1
        print(f"guest {guests}: {cpus} vCPUs, preempt {'on' if preempt else 'off'}: well; {cuts} cuts so far", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.migration.cuts", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cuts", type=int, default=200, help="how many at least (200)")
    parser.add_argument("--source-system", default=qemumig_system(), metavar="COMMAND")
    parser.add_argument("--destination-system", default=qemumig_system(), metavar="COMMAND")
    parser.add_argument("--multifd", action="store_true", help="multifd carries what goes before the switch")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    run(args.cuts, args.source_system, args.destination_system, args.seed, multifd=args.multifd)


if __name__ == "__main__":
    sys.exit(main())
