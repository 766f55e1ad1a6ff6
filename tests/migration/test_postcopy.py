"""Postcopy with a real guest on KVM between two qemumig-systems: plain, preempt, broken links, processes that die."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qemumig.cli.guest import ALL_CHECKS, FILL_RANDOM
from qemumig.cli.vmm import VmmError
from tests.qemumig.channels.pki import psk_directory
from tests.support.host import qemumig_system
from tests.support.postcopy import advise, begin, break_and_recover, wait_completed, wait_status
from tests.support.vmm import (
    MIB,
    GuestParameters,
    Stage,
    Vmm,
    listen,
    migrate,
    open_files,
    thread_names,
    wait_until,
    with_capabilities,
)

pytestmark = pytest.mark.needs("kvm", "userfaultfd")

GUEST = GuestParameters(dirty_pages=4096, print_every=20, fill_pages=4096, fill_mode=FILL_RANDOM, flags=ALL_CHECKS, cpus=2)
SLOW = 16 * MIB


def pair(stage: Stage, *extra: str, held: bool = False) -> tuple[Vmm, Vmm]:
    system = qemumig_system()
    source = stage.vmm("source", system, guest=GUEST, memory=64 * MIB, unlimited=False, extra=extra)
    destination = stage.vmm(
        "destination", system, memory=64 * MIB, incoming=True, stopped=held, unlimited=False, extra=extra
    )
    return source, destination


@pytest.mark.parametrize("layout", ["one-channel", "preempt", "old-preempt", "multifd", "multifd-preempt"])
def test_memory_is_equal_when_the_guest_is_held_there(stage: Stage, layout: str) -> None:
    extra = ("-global", "migration.x-preempt-pre-7-2=on") if layout == "old-preempt" else ()
    source, destination = pair(stage, *extra, held=True)
    advise([source, destination], postcopy_preempt="preempt" in layout, multifd="multifd" in layout)
    begin(source, destination, where="paused")
    wait_completed(source, destination)
    assert destination.memory_digest() == source.memory_digest()
    destination.command("cont")
    stage.assert_guest_is_well(destination)


BACKENDS = {
    "memfd": "memory-backend-memfd,share=on",
    "private-memfd": "memory-backend-memfd,share=off",
    "shm": "memory-backend-shm",
    "file": "memory-backend-file,mem-path=/dev/shm,share=on",
    "private-file": "memory-backend-file,mem-path=/dev/shm,share=off",
    "shared": "memory-backend-ram,share=on",
    "huge-pages": "memory-backend-memfd,hugetlb=on,hugetlbsize=2M",
}


@pytest.mark.parametrize(
    ("kind", "preempt"),
    [
        ("memfd", False),
        ("private-memfd", True),
        ("shm", True),
        ("file", False),
        ("private-file", True),
        ("shared", False),
        pytest.param("huge-pages", False, marks=pytest.mark.needs("huge pages")),
        pytest.param("huge-pages", True, marks=pytest.mark.needs("huge pages")),
    ],
)
def test_memory_of_every_kind_can_be_missing(stage: Stage, kind: str, preempt: bool) -> None:
    """Files are without a name: of a folder on tmpfs."""
    ends = []
    for end in ("source", "destination"):
        extra = ("-object", f"{BACKENDS[kind]},id=m,size={64 * MIB}", "-M", "memory-backend=m")
        incoming = end == "destination"
        ends.append(
            stage.vmm(
                end,
                qemumig_system(),
                guest=GUEST,
                memory=64 * MIB,
                incoming=incoming,
                stopped=incoming,
                extra=extra,
                unlimited=False,
            )
        )
    source, destination = ends
    advise(ends, postcopy_preempt=preempt)
    begin(source, destination, where="paused")
    wait_completed(source, destination)
    assert destination.memory_digest() == source.memory_digest()
    destination.command("cont")
    stage.assert_guest_is_well(destination)


def test_threads_have_their_names_and_nothing_is_left_at_the_end(stage: Stage) -> None:
    source, destination = pair(stage)
    before = [len(open_files(vmm.process.pid)) for vmm in (source, destination)]
    advise([source, destination], postcopy_bandwidth=SLOW, postcopy_preempt=True)
    begin(source, destination)
    assert {"mig/src/main", "mig/src/return"} <= set(thread_names(source.process.pid))
    assert {"mig/dst/fault", "mig/dst/listen", "mig/dst/preempt"} <= set(thread_names(destination.process.pid))
    source.command("migrate-set-parameters", max_postcopy_bandwidth=0)
    wait_completed(source, destination)
    for vmm, count in zip((source, destination), before, strict=True):
        wait_until(
            lambda vmm=vmm: not [n for n in thread_names(vmm.process.pid) if n.startswith("mig/")], "its threads to end"
        )
        wait_until(lambda vmm=vmm, count=count: len(open_files(vmm.process.pid)) <= count, "its descriptors to be closed")


def test_both_sides_go_through_the_states_in_order(stage: Stage) -> None:
    trace = stage.directory / "trace"
    source, destination = pair(stage, "-trace", f"*postcopy*,file={trace}")
    advise([source, destination], postcopy_bandwidth=SLOW)
    begin(source, destination)
    break_and_recover(source, destination, f"unix:{stage.directory}/r")
    source.command("migrate-set-parameters", max_postcopy_bandwidth=0)
    wait_completed(source, destination)
    assert [name for name in trace_names(trace) if name in ON_THE_WAY] == ON_THE_WAY
    assert statuses(source) == [
        *("setup", "active", "device", "postcopy-device", "postcopy-active", "postcopy-paused"),
        *("postcopy-recover-setup", "postcopy-recover", "postcopy-active", "completed"),
    ]
    assert statuses(destination) == [
        *("setup", "active", "postcopy-device", "postcopy-active", "postcopy-paused"),
        *("postcopy-recover", "postcopy-active", "completed"),
    ]


ON_THE_WAY = [
    *("qemu_savevm_send_postcopy_advise", "postcopy_start", "ram_postcopy_send_discard_bitmap"),
    *("savevm_send_postcopy_listen", "savevm_send_postcopy_run", "source_return_path_thread_postcopy_package_loaded"),
    *("postcopy_pause", "savevm_send_postcopy_resume", "postcopy_pause_continued"),
    *("migration_completion_postcopy_end", "migration_completion_postcopy_end_after_complete"),
]
"""What the source traces, in this order; the destination writes to the same file."""


def trace_names(path: Path) -> list[str]:
    return [line.split()[0] for line in path.read_text().splitlines()]


def statuses(vmm: Vmm) -> list[str]:
    """The statuses that the events of migration told, from the beginning."""
    return [event["data"]["status"] for event in vmm.qmp.events if event["event"] == "MIGRATION"]


def test_a_recovery_that_finds_nobody_leads_back_to_paused(stage: Stage) -> None:
    source, destination = pair(stage)
    advise([source, destination], postcopy_bandwidth=SLOW)
    begin(source, destination)
    source.command("migrate-pause")
    wait_status(source, "postcopy-paused")
    wait_status(destination, "postcopy-paused")
    source.command("migrate", uri=f"unix:{stage.directory}/nobody", resume=True)
    wait_until(lambda: "nobody" in source.command("query-migrate").get("error-desc", ""), "the reason")
    assert wait_status(source, "postcopy-paused") == "postcopy-paused"
    with pytest.raises(VmmError, match="Postcopy migration in progress, cannot cancel"):
        source.command("migrate_cancel")
    destination.command("migrate-recover", uri=f"unix:{stage.directory}/first")
    destination.command("migrate-recover", uri=f"unix:{stage.directory}/second")
    source.command("migrate", uri=f"unix:{stage.directory}/second", resume=True)
    source.command("migrate-set-parameters", max_postcopy_bandwidth=0)
    wait_completed(source, destination)
    stage.assert_guest_is_well(destination)


def test_pages_are_given_back_as_they_leave(stage: Stage) -> None:
    source, destination = pair(stage)
    advise([source, destination], postcopy_bandwidth=SLOW)
    with_capabilities([source], release_ram=True)
    begin(source, destination)
    wait_status(source, "postcopy-active")  # before that the source may need them yet
    source.command("migrate-set-parameters", max_postcopy_bandwidth=0)
    wait_completed(source, destination)
    stage.assert_guest_is_well(destination)
    status = Path(f"/proc/{source.process.pid}/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    assert int(resident.split()[1]) < 48 * 1024, "the guest's 32 MiB are still there"


def test_a_destination_that_dies_leaves_a_source_that_says_what_is_lost(stage: Stage) -> None:
    source, destination = pair(stage)
    advise([source, destination], postcopy_bandwidth=SLOW)
    begin(source, destination)
    destination.process.kill()
    wait_status(source, "postcopy-paused")
    assert "if the destination is gone for good, so is the guest" in source.command("query-migrate")["error-desc"]
    assert source.command("query-status")["status"] == "finish-migrate"


def test_a_source_that_dies_leaves_a_destination_that_waits_for_it(stage: Stage) -> None:
    source, destination = pair(stage)
    advise([source, destination], postcopy_bandwidth=SLOW)
    begin(source, destination)
    source.process.kill()
    wait_status(destination, "postcopy-paused")
    assert destination.command("query-status")["status"] == "running"


def test_precopy_may_end_before_anybody_wants_postcopy(stage: Stage) -> None:
    source, destination = pair(stage)
    advise([source, destination])
    source.command("migrate-set-parameters", max_bandwidth=0)
    migrate(source, destination)
    destination.wait_runstate("running")
    stage.assert_guest_is_well(destination)


def test_a_channel_of_multifd_too_many_is_not_taken_for_the_one_of_urgent_pages(stage: Stage) -> None:
    source, destination = pair(stage)
    advise([source, destination], postcopy_preempt=True, multifd=True)
    source.command("migrate-set-parameters", multifd_channels=3)
    source.command("migrate", uri=listen(destination))
    source.command("migrate-start-postcopy")
    assert destination.process.wait(30) == 1
    assert "'multifd-channels' must be equal on both sides" in destination.last_words()
    wait_status(source, "failed")
    source.wait_runstate("running")
    stage.assert_guest_is_well(source, arrived=False)


def test_commands_of_postcopy_say_when_they_come_too_early(stage: Stage) -> None:
    source, destination = pair(stage)
    refusals = {
        "migrate-start-postcopy": "Enable postcopy with migrate_set_capability before the start of migration",
        "migrate-pause": "migrate-pause is currently only supported during postcopy-active or postcopy-recover state",
    }
    for command, text in refusals.items():
        with pytest.raises(VmmError, match=text):
            source.command(command)
    with pytest.raises(VmmError, match=r"Migrate recover can only be run when postcopy is paused\."):
        destination.command("migrate-recover", uri="tcp:127.0.0.1:0")
    with pytest.raises(VmmError, match="Cannot resume if there is no paused migration"):
        source.command("migrate", uri="tcp:127.0.0.1:1", resume=True)
    with_capabilities([source], postcopy_ram=True)
    with pytest.raises(VmmError, match="Postcopy must be started after migration has been started"):
        source.command("migrate-start-postcopy")
    assert listen(destination).startswith("tcp:")


def test_a_host_that_does_not_permit_userfaultfd_is_told_what_would() -> None:
    """An unprivileged destination: neither the sysctl nor the device is for it."""
    if os.geteuid() != 0 or Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("only a privileged test on a host that keeps userfaultfd to itself can take the permission away")
    code = (
        "import os\n"
        "from qemumig.postcopy.uffd import offered_features\n"
        "from qemumig.errors import MachineError\n"
        "os.setuid(65534)\n"
        "try: offered_features()\n"
        "except MachineError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "userfaultfd is not permitted here: 'sysctl vm.unprivileged_userfaultfd=1', or permission to read" in told
    assert "/dev/userfaultfd" in told


@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
def test_all_of_it_goes_through_tls_as_well(stage: Stage, preempt: bool) -> None:
    source, destination = pair(stage)
    keys = psk_directory(stage.directory / "keys", qemu="00112233445566778899aabbccddeeff")
    for vmm, endpoint in ((source, "client"), (destination, "server")):
        vmm.command("object-add", **{"qom-type": "tls-creds-psk", "id": "tls", "dir": str(keys), "endpoint": endpoint})
        vmm.command("migrate-set-parameters", tls_creds="tls")
    advise([source, destination], postcopy_bandwidth=SLOW, postcopy_preempt=preempt)
    begin(source, destination)
    break_and_recover(source, destination, f"unix:{stage.directory}/r")
    source.command("migrate-set-parameters", max_postcopy_bandwidth=0)
    wait_completed(source, destination)
    stage.assert_guest_is_well(destination)
