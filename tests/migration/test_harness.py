"""A harness for QEMU drives two minimal PCs as it would drive QEMU's: start, machine probe, migration by every way, memory.

The guest is the first sector of the disk: `A` once, then `B` again and again while it dirties its pages.
"""

from __future__ import annotations

import re
import select
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.qemumig.channels.pki import psk_directory, x509_directory
from tests.support.boot_sector import complaint, page_addresses, write_disk
from tests.support.harness import Harness, program
from tests.support.host import qemumig_system
from tests.support.vmm import wait_until

pytestmark = [pytest.mark.needs("kvm"), pytest.mark.usefixtures("no_leaks")]

PAGES = 256
VERSIONED = re.compile(r"[a-z0-9]+-[a-z0-9]+-[0-9]+\.[0-9]+")


class Bench:
    """The programs of one test, all started with the same disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._harnesses: list[Harness] = []
        self.disk = write_disk(directory / "bootsect", PAGES)

    def start(self, name: str, arguments: str) -> Harness:
        """A program with a harness's own arguments."""
        made = Harness(program(qemumig_system()), self.directory, name, arguments)
        self._harnesses.append(made)
        return made

    def machine(self, name: str, more: str = "", *, alias: str = "q35") -> Harness:
        """A PC as migration tests start one."""
        versioned = {"q35": "pc-q35-10.0", "pc": "pc-i440fx-10.0"}[alias]
        disk = f"-drive if=none,id=d0,file={self.disk},format=raw -device ide-hd,drive=d0,secs=1,cyls=1,heads=1"
        serial = f"-serial file:{self.serial_path(name)}"
        return self.start(
            name, f"-accel kvm -machine {versioned}, -name {name},debug-threads=on -m 150M {serial} {disk} {more}"
        )

    def serial_path(self, name: str) -> Path:
        return self.directory / f"{name}_serial"

    def serial(self, name: str) -> bytes:
        path = self.serial_path(name)
        return path.read_bytes() if path.exists() else b""

    def wait_for_serial(self, name: str, letter: bytes) -> None:
        """Until the guest has printed *letter*; it prints nothing but these two."""
        wait_until(lambda: letter in self.serial(name), f"{name} prints {letter!r}")
        assert set(self.serial(name)) <= set(b"AB"), self.serial(name)

    def close(self) -> None:
        for harness in self._harnesses:
            harness.close()


@pytest.fixture
def bench(directory: Path) -> Iterator[Bench]:
    bench = Bench(directory)
    yield bench
    bench.close()


def wait_migrated(source: Harness) -> None:
    def done() -> bool:
        report = source.command("query-migrate")
        assert report.get("status") not in ("failed", "cancelled"), report
        return report.get("status") == "completed"

    wait_until(done, "the migration completes")


def check_pages(machine: Harness) -> None:
    """Read the pages as a harness does: a byte each."""
    counts = [machine.read(address, 1)[0] for address in page_addresses(PAGES)]
    assert complaint(counts) == ""


def test_the_probes_that_come_before_any_test(bench: Bench) -> None:
    probe = bench.start("probe", "-machine none")
    accelerators = probe.command("qom-list-types", implements="accel", abstract=False)
    assert "kvm-accel" in [entry["name"] for entry in accelerators]
    assert "tcg-accel" not in [entry["name"] for entry in accelerators]
    machines = {entry.get("alias"): entry["name"] for entry in probe.command("query-machines")}
    assert VERSIONED.fullmatch(machines["q35"]) and VERSIONED.fullmatch(machines["pc"])
    types = {entry["name"] for entry in probe.command("qom-list-types", implements="machine", abstract=False)}
    assert {f"{entry['name']}-machine" for entry in probe.command("query-machines")} == types
    assert probe.qtest("clock_step").startswith("FAIL cannot advance clock to the next deadline")
    assert [probe.qtest(f"clock_{words}") for words in ("step 100", "set 50", "set 1000")] == [
        "OK 100",
        "FAIL 100",
        "OK 1000",
    ]
    probe.quit()


@pytest.mark.parametrize("way", ["unix", "tcp", "exec", "file", "fd"])
def test_a_guest_moves_by_every_way(bench: Bench, way: str) -> None:
    uri = {
        "unix": f"unix:{bench.directory}/migsocket",
        "tcp": "tcp:127.0.0.1:0",
        "exec": f"exec:cat > {bench.directory}/migfile",
        "file": f"file:{bench.directory}/migfile,offset=0x1000",
        "fd": "fd:fd-mig",
    }[way]
    source = bench.machine("source", alias="pc" if way == "tcp" else "q35")
    bench.wait_for_serial("source", b"B")
    source.command("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    source.command("migrate-set-parameters", max_bandwidth=0, downtime_limit=1000)
    if way in ("exec", "file"):  # the source first: what it wrote is read later
        source.command("migrate", uri=uri)
        wait_migrated(source)
        uri = uri.replace("cat >", "cat")
    destination = bench.machine("target", "-incoming defer", alias="pc" if way == "tcp" else "q35")
    if way == "fd":
        ends = socket.socketpair()
        for harness, end in zip((source, destination), ends, strict=True):
            harness.command("getfd", fdname="fd-mig", fds=(end.fileno(),))
            end.close()
    destination.command("migrate-incoming", uri=uri)
    if way not in ("exec", "file"):
        addresses = destination.command("query-migrate").get("socket-address", [])
        where = f"tcp:127.0.0.1:{addresses[0]['port']}" if way == "tcp" else uri
        source.command("migrate", uri=where)
        wait_migrated(source)
    source.event("STOP")
    destination.event("RESUME")
    assert source.command("query-status")["status"] == "postmigrate"
    bench.wait_for_serial("target", b"B")
    assert b"A" not in bench.serial("target")
    assert bench.serial("source").count(b"A") == 1
    destination.command("stop")
    check_pages(destination)
    for harness in (source, destination):
        harness.quit()


def test_a_guest_moves_through_tls_with_certificates_and_then_with_a_shared_key(bench: Bench) -> None:
    """Credentials are made by the monitor, as harnesses make them; the destination asks the source for a certificate."""
    directories = {
        "x509": x509_directory(bench.directory / "x509"),
        "psk": psk_directory(bench.directory / "psk", qemu="00112233445566778899aabbccddeeff"),
    }
    source, names = bench.machine("source"), iter(("middle", "last"))
    bench.wait_for_serial("source", b"B")
    for kind, directory in directories.items():
        name = next(names)
        destination = bench.machine(name, "-incoming defer")
        for harness, endpoint in ((source, "client"), (destination, "server")):
            creds = {"qom_type": f"tls-creds-{kind}", "id": f"{kind}-{endpoint}", "dir": str(directory)}
            harness.command("object-add", **creds, endpoint=endpoint, verify_peer=kind == "x509")
            harness.command("migrate-set-parameters", tls_creds=f"{kind}-{endpoint}", max_bandwidth=0, downtime_limit=1000)
        destination.command("migrate-incoming", uri="tcp:127.0.0.1:0")
        (address,) = destination.command("query-migrate")["socket-address"]
        source.command("migrate", uri=f"tcp:127.0.0.1:{address['port']}")
        wait_migrated(source)
        destination.event("RESUME")
        bench.wait_for_serial(name, b"B")
        source.quit()
        source = destination
    source.command("stop")
    check_pages(source)
    source.quit()


def cancel(source: Harness, state: str, uri: str) -> None:
    """Migrate to *uri*, and cancel in that *state*: the guest runs on."""
    source.command("migrate", uri=uri)
    wait_until(lambda: source.command("query-migrate")["status"] == state, f"state {state}")
    source.command("migrate_cancel")
    wait_until(lambda: source.command("query-migrate")["status"] == "cancelled", f"the end of state {state}")
    assert source.command("query-status")["status"] == "running"


def cancel_in_device(source: Harness, path: Path) -> None:
    """A peer that reads all until the guest stands still, and then nothing: its last pages do not fit on the way."""
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as pool, ExitStack() as peers:
        listener.bind(str(path))
        listener.listen(1)
        enough = threading.Event()

        def read_until_enough() -> None:
            peer = peers.enter_context(listener.accept()[0])
            while not enough.is_set():
                if select.select([peer], [], [], 0.05)[0]:
                    peer.recv(1 << 20)

        reading = pool.submit(read_until_enough)
        source.command("migrate", uri=f"unix:{path}")
        wait_until(lambda: source.command("query-migrate")["status"] == "pre-switchover", "state pre-switchover")
        enough.set()
        reading.result()
        source.command("migrate-continue", state="pre-switchover")
        wait_until(lambda: source.command("query-migrate")["status"] == "device", "state device")
        source.command("migrate_cancel")
        wait_until(lambda: source.command("query-migrate")["status"] == "cancelled", "the end of state device")
        assert source.command("query-status")["status"] == "running"


def test_a_migration_is_cancelled_in_each_of_its_states_and_then_takes_place(bench: Bench) -> None:
    source, destination = bench.machine("source"), bench.machine("target", "-incoming defer")
    uri = f"unix:{bench.directory}/migsocket"

    def listen_again() -> None:
        wait_until(lambda: destination.command("query-migrate").get("status") in (None, "failed"), "the destination's end")
        destination.command("migrate-incoming", uri=uri, exit_on_error=False)

    bench.wait_for_serial("source", b"B")
    with socket.socket(socket.AF_UNIX) as deaf, socket.socket(socket.AF_UNIX) as client:
        deaf.bind(f"{bench.directory}/deaf")
        deaf.listen(0)
        client.connect(f"{bench.directory}/deaf")  # the queue is full: nobody else gets in
        cancel(source, "setup", f"unix:{bench.directory}/deaf")
    keys = psk_directory(bench.directory / "psk", qemu="00112233445566778899aabbccddeeff")
    source.command("object-add", qom_type="tls-creds-psk", id="psk", dir=str(keys), endpoint="client")
    source.command("migrate-set-parameters", tls_creds="psk")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it connects, and nobody shakes hands
        cancel(source, "setup", f"tcp:127.0.0.1:{silent.getsockname()[1]}")
    source.command("migrate-set-parameters", tls_creds="", max_bandwidth=1 << 20, downtime_limit=1000)
    listen_again()
    cancel(source, "active", uri)
    source.command("migrate-set-parameters", max_bandwidth=0)
    pause = [{"capability": "pause-before-switchover", "state": True}]
    source.command("migrate-set-capabilities", capabilities=pause)
    listen_again()
    cancel(source, "pre-switchover", uri)
    cancel_in_device(source, bench.directory / "full")
    pause[0]["state"] = False
    source.command("migrate-set-capabilities", capabilities=pause)
    listen_again()
    source.command("migrate", uri=uri)
    wait_migrated(source)
    destination.event("RESUME")
    bench.wait_for_serial("target", b"B")
    destination.command("stop")
    check_pages(destination)
    for harness in (source, destination):
        harness.quit()


def test_a_destination_that_is_told_so_ends_with_status_1(bench: Bench) -> None:
    source = bench.machine("source", alias="pc")
    destination = bench.machine("target", f"-incoming unix:{bench.directory}/migsocket")
    destination.expected_status = 1
    source.command("migrate", uri=f"unix:{bench.directory}/migsocket")
    wait_until(lambda: source.command("query-migrate").get("status") == "failed", "the source gives up")
    destination.wait_end()
    assert "qemumig-i440fx" in destination.log.read_text() and "qemumig-q35" in destination.log.read_text()
    assert source.command("query-status")["status"] == "running"
    source.quit()


def test_a_guest_that_sleeps_arrives_asleep_and_wakes_there(bench: Bench) -> None:
    write_disk(bench.disk, PAGES, suspends=True)
    source = bench.machine("source")
    wait_until(lambda: source.command("query-status")["status"] == "suspended", "the guest sleeps")
    assert source.command("query-status") == {"status": "suspended", "running": False}
    destination = bench.machine("target", f"-incoming unix:{bench.directory}/migsocket")
    source.command("migrate", uri=f"unix:{bench.directory}/migsocket")
    wait_migrated(source)
    source.event("STOP")
    destination.event("RESUME")
    assert destination.command("query-status")["status"] == "suspended"
    assert bench.serial("source") == b"AB"
    destination.command("system_wakeup")
    destination.event("WAKEUP")
    bench.wait_for_serial("target", b"B")
    assert b"A" not in bench.serial("target")
    destination.command("stop")
    check_pages(destination)
    destination.quit()
    source.quit()


def refusal(harness: Harness, name: str, **arguments: Any) -> str:
    response = harness.ask(name, **arguments)
    text: str = response["error"]["desc"]
    return text


def test_a_pause_keeps_a_guest_asleep_and_only_a_sleeper_can_be_woken(bench: Bench) -> None:
    write_disk(bench.disk, PAGES, suspends=True)
    machine = bench.machine("vm")
    wait_until(lambda: machine.command("query-status")["status"] == "suspended", "the guest sleeps")
    machine.command("cont")
    assert machine.command("query-status")["status"] == "suspended"
    machine.command("stop")
    machine.event("STOP")
    assert machine.command("query-status")["status"] == "paused"
    assert refusal(machine, "system_wakeup") == "Unable to wake up: guest is not in suspended state"
    machine.command("cont")
    machine.event("RESUME")
    assert machine.command("query-status")["status"] == "suspended"
    assert machine.command("query-current-machine") == {"wakeup-suspend-support": True}
    machine.command("system_wakeup")
    machine.event("WAKEUP")
    wait_until(lambda: len(bench.serial("vm")) > 3, "the guest goes on")
    assert refusal(machine, "system_wakeup") == "Unable to wake up: guest is not in suspended state"
    machine.quit()
