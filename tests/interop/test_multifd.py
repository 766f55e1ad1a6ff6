"""Multifd between qemumig and a real QEMU: methods, sync modes, numbers of channels; memory compared each time."""

from __future__ import annotations

import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qemumig.cli.interrupts import Interrupts
from qemumig.cli.vmm import Vmm, VmmError, with_capabilities
from tests.interop.test_tls import credentials
from tests.qemumig.channels.pki import x509_directory
from tests.support.host import qemumig_system
from tests.support.vmm import MIB, GuestParameters, Stage, listen, migrate, wait_until
from tools.interoplib.guests import CHECKING, DIRTYING, guest
from tools.interoplib.peers import Peer, ours, real
from tools.interoplib.trial import Rules, hop
from tools.interoplib.trial import Stage as TrialStage

pytestmark = pytest.mark.usefixtures("no_leaks")

TIMEOUT = 30.0
FILLED = 96 * MIB // 4096 // 4  # pages that the guest fills; those that it rewrites come on top, how often is chance
TLS_END = "-global migration.multifd-clean-tls-termination"
EACH_SECTION = "-global migration.multifd-flush-after-each-section=on"
both_ways = pytest.mark.parametrize("direction", ["to-qemu", "from-qemu"])


def ends(direction: str, qemu: str) -> tuple[Peer, Peer]:
    pair = ours(qemumig_system()), real(qemu)
    return pair if direction == "to-qemu" else pair[::-1]


def move(
    source: Peer,
    destination: Peer,
    *,
    kind: str = CHECKING,
    held: bool = True,
    transport: str = "tcp",
    zero_page_detection: str = "",
    zero_copy: bool = False,
    extra: str = "",
    **parameters: Any,
) -> dict[str, Any]:
    """A guest moves with multifd and *parameters*, from a source with *extra* options; the source's last report."""
    if source.version is None and destination.is_before(8, 1):
        extra += f" {EACH_SECTION}"
    with Interrupts() as interrupts:
        rules = Rules(interrupts, timeout=TIMEOUT)
        with TrialStage(rules, guest(kind, 96 * MIB, 2), 96 * MIB) as stage:
            here, there = stage.source(source, extra), stage.destination(destination, held=held)
            use_multifd([here, there], **parameters)
            with_capabilities([here], **{"zero-copy-send": zero_copy})
            if zero_page_detection:
                here.command("migrate-set-parameters", zero_page_detection=zero_page_detection)
            return hop(here, there, transport, TIMEOUT, held=held).report


def use_multifd(vmms: list[Vmm], **parameters: Any) -> None:
    with_capabilities(vmms, multifd=True)
    for vmm in vmms:
        vmm.command("migrate-set-parameters", **parameters)


@both_ways
@pytest.mark.parametrize("method", ["none", "zlib", "zstd"])
def test_memory_is_equal_afterwards(qemu: str, direction: str, method: str) -> None:
    ram = move(*ends(direction, qemu), multifd_compression=method)["ram"]
    assert ram["normal"] > FILLED and ram["duplicate"] > FILLED
    assert ram["multifd-bytes"] > 0.9 * ram["transferred"] - MIB
    if direction == "to-qemu" and method != "none":
        assert ram["multifd-bytes"] < 0.7 * ram["normal-bytes"]


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_a_stream_goes_on_where_its_content_changes(qemu: str, directory: Path, method: str) -> None:
    """Noise is compressed in a hurry, text is not: where they meet a frame of zstd ends, or zlib searches on."""
    chance = random.Random(1)
    words = [chance.randbytes(40) for _ in range(100)]
    text = directory / "text"
    letters = (bytes(chance.choices(b"aaaaaaaabbbbccde", k=1 << 16)) * 4 for _ in range(48))
    sentences = (b"".join(chance.choices(words, k=1 << 16)) for _ in range(5))
    text.write_bytes(b"".join((*letters, *sentences)))
    loader = f"-device loader,file={text},addr={64 * MIB:#x},force-raw=on"
    ram = move(*ends("to-qemu", qemu), extra=loader, multifd_compression=method, multifd_channels=1)["ram"]
    assert ram["normal"] > FILLED + text.stat().st_size // 4096


@both_ways
@pytest.mark.parametrize(("channels", "transport"), [(1, "unix"), (16, "tcp")])
def test_guest_that_dirties_memory_arrives_by_any_number_of_channels(
    qemu: str, direction: str, channels: int, transport: str
) -> None:
    report = move(*ends(direction, qemu), kind=DIRTYING, held=False, transport=transport, multifd_channels=channels)
    assert report["ram"]["dirty-sync-count"] >= 2


def test_memory_that_is_taken_from_where_it_lies_is_equal_afterwards(qemu: str) -> None:
    """Nothing of it shows on the wire; over the loopback device the kernel copies it all the same, and says so."""
    ram = move(*ends("to-qemu", qemu), zero_copy=True)["ram"]
    assert ram["normal"] > FILLED
    assert ram["dirty-sync-missed-zero-copy"] >= 2


@both_ways
def test_every_way_to_look_for_zero_pages(qemu: str, direction: str) -> None:
    """The peer has to know zero pages in packets, else they are on the main channel."""
    source, destination = ends(direction, qemu)
    if source.is_before(9):
        pytest.skip(f"QEMU {source.name} has no zero-page-detection")
    for detection in ("none", "legacy", *(() if destination.is_before(9) else ("multifd",))):
        ram = move(source, destination, zero_page_detection=detection)["ram"]
        assert (ram["duplicate"] == 0) == (detection == "none")


@both_ways
def test_every_channel_is_enciphered(stage: Stage, qemu: str, direction: str) -> None:
    """Older ones end their channels without a word, and say so to a newer one by an option."""
    there, here = ends(direction, qemu)
    files = x509_directory(stage.directory / "x509")
    old = there.is_before(10) or here.is_before(10)
    system = qemumig_system() + (f" {EACH_SECTION}" if here.is_before(8, 1) else "")
    system += f" {TLS_END}=off" if old else ""
    source = stage.vmm("source", system if there.version is None else there.command, guest=GuestParameters(dirty_pages=64))
    destination = stage.vmm("destination", system if here.version is None else here.command, incoming=True)
    credentials(source, "x509", "client", files)
    credentials(destination, "x509", "server", files)
    use_multifd([source, destination], multifd_channels=3)
    migrate(source, destination)
    destination.wait_runstate("running")
    stage.assert_guest_is_well(destination)


@pytest.mark.parametrize("direction", ["to-ourselves", "from-qemu"])
def test_a_tunnel_may_deliver_it_all_when_the_source_has_gone(stage: Stage, qemu: str, direction: str) -> None:
    """Connection by connection, the main one last: the guest is nowhere else by then."""
    system = qemumig_system() if direction == "to-ourselves" else qemu
    source = stage.vmm("source", system, guest=GuestParameters(dirty_pages=64, cpus=2), memory=64 * MIB)
    destination = stage.vmm("destination", qemumig_system(), memory=64 * MIB, incoming=True)
    use_multifd([source, destination], multifd_channels=3)
    with_capabilities([source], **{"return-path": False})
    port = int(listen(destination).rpartition(":")[2])
    with socket.create_server(("127.0.0.1", 0)) as tunnel, ThreadPoolExecutor(4) as pool:
        tunnel.settimeout(TIMEOUT)
        source.command("migrate", uri=f"tcp:127.0.0.1:{tunnel.getsockname()[1]}")
        said = [pool.submit(all_of, tunnel.accept()[0]) for _ in range(4)]
        source.wait_runstate("postmigrate")
        for one in reversed(said):
            pool.submit(deliver, one.result(TIMEOUT), port)
            time.sleep(0.2)
    destination.wait_runstate("running")
    stage.assert_guest_is_well(destination)


def all_of(connection: socket.socket) -> bytes:
    """Everything that comes until it ends."""
    with connection, connection.makefile("rb") as file:
        return file.read()


def deliver(data: bytes, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(data)


def test_a_qemu_that_waits_for_more_channels_can_be_given_up(stage: Stage, qemu: str) -> None:
    source, destination = ends("to-qemu", qemu)
    here = stage.vmm("source", source.command, guest=GuestParameters(dirty_pages=64))
    there = stage.vmm("destination", destination.command, incoming=True)
    use_multifd([here], multifd_channels=2)
    use_multifd([there], multifd_channels=3)
    here.command("migrate", uri=listen(there))
    wait_until(lambda: here.command("query-migrate")["status"] != "none", "the migration to begin")
    here.command("migrate_cancel")
    wait_until(lambda: here.command("query-migrate")["status"] == "cancelled", "the end of the cancel")
    stage.assert_guest_is_well(here, arrived=False)


def test_a_qemu_with_more_channels_is_told_so(stage: Stage, qemu: str) -> None:
    """Pages that went to the channel too many would be missing: the load fails, and the guest stays where it is."""
    source = stage.vmm("source", qemu, guest=GuestParameters(dirty_pages=64))
    destination = stage.vmm("destination", qemumig_system(), incoming=True)
    use_multifd([source], multifd_channels=4)
    use_multifd([destination], multifd_channels=2)
    source.command("migrate", uri=listen(destination))
    wait_until(destination.has_died, "the destination to end")
    assert "'multifd-channels' must be equal on both sides" in destination.last_words()
    check_source_failed(stage, source, qemu)


def test_another_method_is_refused_by_name(stage: Stage, qemu: str) -> None:
    source = stage.vmm("source", qemu, guest=GuestParameters(dirty_pages=64))
    destination = stage.vmm("destination", qemumig_system(), incoming=True)
    use_multifd([source], multifd_compression="zstd")
    use_multifd([destination], multifd_compression="zlib")
    source.command("migrate", uri=listen(destination))
    wait_until(destination.has_died, "the destination to end")
    assert "compression zstd" in destination.last_words() and "this side has zlib" in destination.last_words()
    check_source_failed(stage, source, qemu)


def check_source_failed(stage: Stage, source: Vmm, qemu: str) -> None:
    """It noticed, and its guest runs on.  One before 8.0 may hang when its channels break, whatever the destination is."""
    if real(qemu).is_before(8):
        return
    wait_until(lambda: source.command("query-migrate")["status"] == "failed", "the source to fail")
    stage.assert_guest_is_well(source, arrived=False)


def test_a_transport_with_one_connection_is_refused(stage: Stage) -> None:
    vmm = stage.vmm("source", qemumig_system(), guest=GuestParameters(dirty_pages=64))
    use_multifd([vmm])
    for uri in ("exec:cat >/dev/null", f"file:{stage.directory}/x"):
        with pytest.raises(VmmError, match=r"requires multi-channel URIs"):
            vmm.command("migrate", uri=uri)
    assert vmm.command("query-migrate").get("status", "none") == "none"
