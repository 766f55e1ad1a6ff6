"""Precopy with a real guest on KVM, from one qemumig-system to another, over every transport.

The guest checks itself all the way: pages, FPU, privileged registers, clock, timer interrupts (support/vmm.py).
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from qemumig.cli.guest import ALL_CHECKS, FILL_HALF_RANDOM, FILL_RANDOM, failures_in
from qemumig.savevm import sections
from qemumig.wire.format import SectionType
from tests.support.host import qemumig_system
from tests.support.plain_stream import read_stream
from tests.support.vmm import (
    MIB,
    GuestParameters,
    Stage,
    Vmm,
    VmmError,
    children,
    listen,
    migrate,
    open_files,
    thread_names,
    wait_until,
    with_capabilities,
)

pytestmark = pytest.mark.needs("kvm")

BUSY = GuestParameters(dirty_pages=4096, print_every=20, fill_pages=2048, fill_mode=FILL_RANDOM, flags=ALL_CHECKS, cpus=2)
MODEST = GuestParameters(dirty_pages=256, print_every=20, flags=ALL_CHECKS)


def pair(stage: Stage, guest: GuestParameters, **options: object) -> tuple[Vmm, Vmm]:
    source = stage.vmm("source", qemumig_system(), guest=guest, **options)
    destination = stage.vmm("destination", qemumig_system(), incoming=True, **options)
    return source, destination


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_a_busy_guest_moves_and_does_not_notice(stage: Stage, transport: str) -> None:
    source, destination = pair(stage, BUSY)
    uri = "tcp:127.0.0.1:0" if transport == "tcp" else f"unix:{stage.directory}/m"
    outcome = migrate(source, destination, uri)
    destination.wait_runstate("running")
    stage.assert_guest_is_well(destination)
    source.wait_runstate("postmigrate")
    ram = outcome.report["ram"]
    assert ram["total"] == 128 * MIB + 65536
    assert ram["normal"] >= 2048 + 4096 and ram["duplicate"] > 10000
    assert ram["transferred"] > ram["normal-bytes"] == ram["normal"] * 4096
    assert ram["remaining"] == 0 and ram["dirty-sync-count"] >= 3
    assert outcome.report["total-time"] >= outcome.report["downtime"] > 0


def test_memory_is_equal_on_both_sides_afterwards(stage: Stage) -> None:
    source = stage.vmm("source", qemumig_system(), guest=BUSY)
    destination = stage.vmm("destination", qemumig_system(), incoming=True, stopped=True)
    migrate(source, destination)
    destination.wait_runstate("paused")
    assert destination.memory_digest() == source.memory_digest()
    destination.command("cont")
    stage.assert_guest_is_well(destination)


def test_a_guest_that_is_woken_in_the_middle_loses_nothing(stage: Stage) -> None:
    """Its memory was protected while it stood, all at once: what it writes from then on goes again."""
    source = stage.vmm("source", qemumig_system(), guest=BUSY, unlimited=False)
    destination = stage.vmm("destination", qemumig_system(), incoming=True, stopped=True)
    source.command("stop")
    source.command("migrate-set-parameters", max_bandwidth=16 * MIB)
    source.command("migrate", uri=listen(destination))
    wait_until(
        lambda: source.command("query-migrate").get("ram", {}).get("transferred", 0) > 4 * MIB, "a part of it to leave"
    )
    source.command("cont")
    assert source.serial.wait_more(4, 30)
    source.command("migrate-set-parameters", max_bandwidth=0)
    destination.wait_runstate("paused")
    assert source.command("query-migrate")["ram"]["dirty-sync-count"] >= 3
    assert destination.memory_digest() == source.memory_digest()
    destination.command("cont")
    stage.assert_guest_is_well(destination)


def test_a_paused_guest_arrives_paused(stage: Stage) -> None:
    source, destination = pair(stage, MODEST)
    source.command("stop")
    migrate(source, destination)
    destination.wait_runstate("paused")
    assert destination.memory_digest() == source.memory_digest()
    destination.command("cont")
    stage.assert_guest_is_well(destination)


def test_memory_above_three_gib_arrives_in_its_place(stage: Stage) -> None:
    guest = GuestParameters(dirty_base=(4 << 30) + (64 << 20), dirty_pages=512, print_every=50, map_gib=8)
    source, destination = pair(stage, guest, memory=3584 * MIB)
    migrate(source, destination)
    destination.wait_runstate("running")
    stage.assert_guest_is_well(destination)


@pytest.mark.parametrize("transport", ["exec", "file"])
def test_through_a_file(stage: Stage, transport: str) -> None:
    source, destination = pair(stage, MODEST)
    file = stage.directory / "saved"
    source.command("migrate", uri=f"exec:cat > {file}" if transport == "exec" else f"file:{file},offset=4K")
    wait_until(lambda: source.command("query-migrate")["status"] == "completed", "the source to complete")
    wait_until(lambda: not children(source.process.pid), "the command to end")
    destination.command("migrate-incoming", uri=f"exec:cat {file}" if transport == "exec" else f"file:{file},offset=4K")
    destination.wait_runstate("running")
    stage.assert_guest_is_well(destination)


def test_through_a_file_that_has_a_place_for_every_page(stage: Stage) -> None:
    source, destination = pair(stage, BUSY)
    with_capabilities([source, destination], **{"mapped-ram": True})
    file = stage.directory / "saved"
    with pytest.raises(VmmError, match="Migration requires seekable transport"):
        source.command("migrate", uri="tcp:127.0.0.1:1")
    source.command("migrate", uri=f"file:{file},offset=12345")
    wait_until(lambda: source.command("query-migrate")["status"] == "completed", "the source to complete")
    ram = source.command("query-migrate")["ram"]
    assert ram["transferred"] > ram["normal-bytes"] > 0 == ram["remaining"]
    assert file.stat().st_size > 128 * MIB > 2 * 512 * file.stat().st_blocks
    destination.command("migrate-incoming", uri=f"file:{file},offset=12345")
    destination.wait_runstate("running")
    stage.assert_guest_is_well(destination)


def test_over_descriptors_that_somebody_else_opened(stage: Stage) -> None:
    source, destination = pair(stage, BUSY)
    left, right = socket.socketpair()
    with left, right:
        source.qmp.give_fd("link", left.fileno())
        destination.qmp.give_fd("link", right.fileno())
    migrate(source, destination, "fd:link")
    destination.wait_runstate("running")
    stage.assert_guest_is_well(destination)


def test_our_stream_as_a_plain_reader_sees_it(stage: Stage) -> None:
    guest = GuestParameters(dirty_pages=256, fill_pages=512, fill_mode=FILL_HALF_RANDOM, flags=ALL_CHECKS, cpus=2)
    source = stage.vmm("source", qemumig_system(), guest=guest, memory=48 * MIB)
    file = stage.directory / "saved"
    source.command("migrate", uri=f"file:{file}")
    wait_until(lambda: source.command("query-migrate")["status"] == "completed", "the source to complete")
    stream = read_stream(file.read_bytes())
    ram = source.command("query-migrate")["ram"]
    assert ram["transferred"] == file.stat().st_size
    memory = dict(zip(["microvm.ram", "pc.bios"], memory_blocks(source, stage), strict=True))
    for idstr, contents in memory.items():
        found = bytes(stream.blocks[idstr].memory)
        different = [page for page in range(len(found) // 4096) if differs(found, contents, page)]
        assert different in ([], [5]), f"{idstr}: pages {different[:20]} differ"  # page 5: the kernel writes its clock


def differs(one: bytes, other: bytes, page: int) -> bool:
    return one[page * 4096 : page * 4096 + 4096] != other[page * 4096 : page * 4096 + 4096]


def memory_blocks(vmm: Vmm, stage: Stage) -> list[bytes]:
    """The stopped machine's main memory (without the part that the firmware hides) and its firmware."""
    found = []
    for address, size in ((0, 48 * MIB), ((4 << 30) - 65536, 65536)):
        path = stage.directory / "memory"
        vmm.command("pmemsave", val=address, size=size, filename=str(path))
        found.append(bytearray(path.read_bytes()))
    found[0][0xF0000:0x100000] = bytes(0x10000)
    return [bytes(one) for one in found]


def test_there_and_back_again_with_nothing_left_behind(stage: Stage) -> None:
    """Four hops; afterwards no process that is left holds more than a machine at rest."""
    here = stage.vmm("hop0", qemumig_system(), guest=MODEST)
    at_rest = {"threads": own_threads(here), "files": len(open_files(here.process.pid))}
    for hop in range(1, 5):
        there = stage.vmm(f"hop{hop}", qemumig_system(), incoming=True)
        migrate(here, there, "tcp:127.0.0.1:0" if hop % 2 else f"unix:{stage.directory}/m{hop}")
        there.wait_runstate("running")
        wait_until(
            lambda there=there: not [name for name in own_threads(there) if name.startswith("mig/")], "threads to end"
        )
        here.close()
        here = there
    stage.assert_guest_is_well(here)
    assert own_threads(here) == at_rest["threads"]
    assert len(open_files(here.process.pid)) == at_rest["files"]
    assert not children(here.process.pid)


def own_threads(vmm: Vmm) -> list[str]:
    """Without the pool of workers, which grows to its size and stays."""
    return [name for name in thread_names(vmm.process.pid) if name != "worker"]


def test_a_cancelled_migration_leaves_the_guest_where_it_was(stage: Stage) -> None:
    source = stage.vmm("source", qemumig_system(), guest=BUSY)
    with_capabilities([source], events=True)
    source.command("migrate-set-parameters", max_bandwidth=8 << 20)
    for attempt in range(2):
        destination = stage.vmm(f"destination{attempt}", qemumig_system(), incoming=True)
        source.command("migrate", uri=listen(destination))
        source.qmp.wait_event("MIGRATION_PASS", 10)
        source.command("migrate_cancel")
        wait_until(lambda: source.command("query-migrate")["status"] == "cancelled", "the end of the cancel")
        assert source.command("query-status")["status"] == "running"
        wait_until(destination.has_died, "the destination to end")
        assert destination.process.returncode == 1
        assert "load of migration failed" in destination.last_words()
    source.command("migrate-set-parameters", max_bandwidth=0)
    destination = stage.vmm("last", qemumig_system(), incoming=True)
    migrate(source, destination)
    destination.wait_runstate("running")
    stage.assert_guest_is_well(destination)


def test_a_destination_with_another_memory_size_says_so(stage: Stage) -> None:
    source = stage.vmm("source", qemumig_system(), guest=MODEST, memory=128 * MIB)
    destination = stage.vmm("destination", qemumig_system(), memory=64 * MIB, incoming=True)
    source.command("migrate", uri=listen(destination))
    wait_until(lambda: source.command("query-migrate")["status"] == "failed", "the failure")
    wait_until(destination.has_died, "the destination to end")
    assert "block 'microvm.ram' has 0x4000000 bytes here, the stream says 0x8000000" in destination.last_words()
    stage.assert_guest_is_well(source, arrived=False)


@pytest.mark.parametrize("backend", ["anonymous", "memfd"])
def test_a_destination_that_failed_takes_another_guest(stage: Stage, backend: str) -> None:
    """Nothing of the first, which broke off in the middle of its memory, shines through."""
    memfd = ("-object", f"memory-backend-memfd,id=m,size={128 * MIB},share=on", "-M", "memory-backend=m")
    extra = memfd if backend == "memfd" else ()
    source = stage.vmm("source", qemumig_system(), guest=MODEST, extra=extra)
    destination = stage.vmm("destination", qemumig_system(), incoming=True, stopped=True, extra=extra)
    broken = stage.directory / "broken"
    broken.write_bytes(half_a_stream("m" if backend == "memfd" else "microvm.ram"))
    destination.command("migrate-incoming", uri=f"file:{broken}", exit_on_error=False)
    wait_until(lambda: destination.command("query-migrate")["status"] == "failed", "the failure")
    migrate(source, destination)
    destination.wait_runstate("paused")
    assert destination.memory_digest() == source.memory_digest()
    destination.command("cont")
    stage.assert_guest_is_well(destination)


def half_a_stream(idstr: str) -> bytes:
    """The beginning of a stream: every page of the first 64 MiB full of ones, then nothing."""
    name = bytes([len(idstr)]) + idstr.encode()
    header, _ = sections.encode_configuration(sections.Configuration.of("microvm"))
    ram = sections.SectionHeader(SectionType.QEMU_VM_SECTION_START, 1, "ram", 0, 4)
    first = (0x8).to_bytes(8, "big") + name + b"\xff" * 4096
    rest = b"".join((page * 4096 | 0x28).to_bytes(8, "big") + b"\xff" * 4096 for page in range(1, 16384))
    return sections.encode_file_header() + header + sections.encode_section_header(ram) + first + rest


def test_a_destination_that_was_fed_noise_takes_a_guest(stage: Stage) -> None:
    source, destination = pair(stage, MODEST)
    noise = stage.directory / "noise"
    noise.write_bytes(Path("/proc/self/exe").read_bytes()[:100000])
    destination.command("migrate-incoming", uri=f"file:{noise}", exit_on_error=False)
    wait_until(lambda: destination.command("query-migrate")["status"] == "failed", "the failure")
    assert "magic 0x7f454c46 found, expected 0x5145564d" in destination.command("query-migrate")["error-desc"]
    assert destination.command("query-status")["status"] == "inmigrate"
    migrate(source, destination)
    destination.wait_runstate("running")
    stage.assert_guest_is_well(destination)
    assert failures_in(destination.serial.output()) == []
