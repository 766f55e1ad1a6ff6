"""The ways between qemumig and a real QEMU that few people take; test_precopy.py has the others."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from qemumig.cli.guest import ALL_CHECKS, FILL_HALF_RANDOM
from tests.support.host import qemumig_system
from tests.support.vmm import GuestParameters, Stage, Vmm, VmmError, wait_until
from tools.interoplib.peers import real
from tools.interoplib.transports import load, store

pytestmark = pytest.mark.usefixtures("no_leaks")

GUEST = GuestParameters(fill_pages=1024, fill_mode=FILL_HALF_RANDOM, flags=ALL_CHECKS)
TO_QEMU, FROM_QEMU = "to-qemu", "from-qemu"
both_ways = pytest.mark.parametrize("direction", [TO_QEMU, FROM_QEMU])
TIMEOUT = 30.0


def ends(stage: Stage, direction: str, qemu: str, *, incoming: bool = True) -> tuple[Vmm, Vmm]:
    """Source and destination."""
    there, here = (qemumig_system(), qemu) if direction == TO_QEMU else (qemu, qemumig_system())
    return stage.vmm("source", there, guest=GUEST), stage.vmm("destination", here, incoming=incoming)


def arrive(stage: Stage, destination: Vmm) -> None:
    destination.wait_runstate("running")
    stage.assert_guest_is_well(destination)


def main(**addr: Any) -> list[dict[str, Any]]:
    return [{"channel-type": "main", "addr": addr}]


@both_ways
def test_ipv6(stage: Stage, qemu: str, direction: str) -> None:
    source, destination = ends(stage, direction, qemu)
    destination.command("migrate-incoming", uri="tcp:[::1]:0,keep-alive=on")
    (where,) = destination.command("query-migrate")["socket-address"]
    assert where["host"] == "::1" and where["ipv6"] is True
    source.command("migrate", uri=f"tcp:[::1]:{where['port']},keep-alive=on")
    arrive(stage, destination)


@both_ways
def test_every_address_of_the_host(stage: Stage, qemu: str, direction: str) -> None:
    """Both kinds of VMM name the same two sockets, and the one of IPv6 takes IPv4."""
    source, destination = ends(stage, direction, qemu)
    destination.command("migrate-incoming", uri="tcp::0")
    six, four = destination.command("query-migrate")["socket-address"]
    assert (six["host"], four["host"]) == ("::", "0.0.0.0")
    source.command("migrate", uri=f"tcp:127.0.0.1:{six['port']}")
    arrive(stage, destination)


@both_ways
def test_the_next_port_of_a_range(stage: Stage, qemu: str, direction: str) -> None:
    source, destination = ends(stage, direction, qemu)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        destination.command("migrate-incoming", uri=f"tcp:127.0.0.1:{port},to={min(port + 50, 65535)}")
    (where,) = destination.command("query-migrate")["socket-address"]
    assert int(where["port"]) > port
    source.command("migrate", uri=f"tcp:127.0.0.1:{where['port']}")
    arrive(stage, destination)


@both_ways
def test_json_on_our_side(stage: Stage, qemu: str, direction: str) -> None:
    source, destination = ends(stage, direction, qemu)
    path = f"{stage.directory}/migration"
    json = {"channels": main(transport="socket", type="unix", path=path)}
    uri = {"uri": f"unix:{path}"}
    destination.command("migrate-incoming", **(uri if direction == TO_QEMU else json))
    source.command("migrate", **(json if direction == TO_QEMU else uri))
    arrive(stage, destination)


def test_a_listening_descriptor(stage: Stage, qemu: str) -> None:
    """Passed to us with `getfd`; a QEMU would take it for the connection itself."""
    source, destination = ends(stage, FROM_QEMU, qemu)
    with socket.create_server(("127.0.0.1", 0)) as server:
        destination.qmp.give_fd("listener", server.fileno())
        port = server.getsockname()[1]
        destination.command("migrate-incoming", channels=main(transport="socket", type="fd", str="listener"))
    source.command("migrate", uri=f"tcp:127.0.0.1:{port}")
    arrive(stage, destination)


HEADER = b"somebody's header"


@both_ways
def test_a_plain_file_by_descriptor(stage: Stage, qemu: str, direction: str) -> None:
    """It is written and read from where it stands; a QEMU that takes none any more gets the file by its name."""
    source, destination = ends(stage, direction, qemu)
    path = stage.directory / "stream"
    path.write_bytes(HEADER)
    real_one = destination if direction == TO_QEMU else source
    store(source, descriptor(source, path, os.O_WRONLY, may_refuse=source is real_one), TIMEOUT)
    assert path.read_bytes().startswith(HEADER + b"QEVM")
    load(destination, descriptor(destination, path, os.O_RDONLY, may_refuse=destination is real_one), TIMEOUT)
    arrive(stage, destination)


def descriptor(vmm: Vmm, path: Path, flags: int, *, may_refuse: bool) -> str:
    """The URI by which *vmm* gets the file behind the header: a descriptor, unless its QEMU is too new for that."""
    if may_refuse and vmm.command("query-version")["qemu"]["major"] >= 11:
        return f"file:{path},offset={len(HEADER)}"
    fd = os.open(path, flags)
    os.lseek(fd, len(HEADER), os.SEEK_SET)
    vmm.qmp.give_fd("stream", fd)
    os.close(fd)
    return "fd:stream"


@both_ways
def test_a_file_from_an_offset_on(stage: Stage, qemu: str, direction: str) -> None:
    """A QEMU without files takes our stream from the offset on by a command, and leaves it there by one."""
    source, destination = ends(stage, direction, qemu)
    path = stage.directory / "stream"
    has_files = real(qemu).has("file")
    uri = f"file:{path},offset=4K"
    store_uri = f"exec:dd bs=4k seek=1 iflag=fullblock of={path} 2>&1" if direction == FROM_QEMU and not has_files else uri
    load_uri = f"exec:tail -c +4097 {path}" if direction == TO_QEMU and not has_files else uri
    store(source, store_uri, TIMEOUT)
    source.close()  # a command may outlive `completed`
    assert path.read_bytes()[4096:4100] == b"QEVM"
    load(destination, load_uri, TIMEOUT)
    arrive(stage, destination)


@both_ways
def test_a_file_out_of_a_set_of_descriptors(stage: Stage, qemu: str, direction: str) -> None:
    """The set is on our side; the real QEMU gets the same file by its name, or by a command."""
    source, destination = ends(stage, direction, qemu)
    path = stage.directory / "stream"
    by_name = f"file:{path}" if real(qemu).has("file") else f"exec:cat {'<' if direction == TO_QEMU else '>'}{path}"
    path.touch()

    def uri(vmm: Vmm, flags: int) -> str:
        if vmm is (destination if direction == TO_QEMU else source):
            return by_name
        fd = os.open(path, flags)
        found = vmm.qmp.add_fd(fd)
        os.close(fd)
        return f"file:{found}"

    store(source, uri(source, os.O_WRONLY), TIMEOUT)
    source.close()  # a command may outlive `completed`
    load(destination, uri(destination, os.O_RDONLY), TIMEOUT)
    arrive(stage, destination)


def test_a_command_without_a_shell(stage: Stage, qemu: str) -> None:
    source, destination = ends(stage, FROM_QEMU, qemu)
    path = stage.directory / "a stream; with $odd name"
    store(source, f"exec:cat >'{path}'", TIMEOUT)
    source.close()
    destination.command("migrate-incoming", channels=main(transport="exec", args=["/bin/cat", str(path)]))
    arrive(stage, destination)


NOWHERE = (
    *("tcp:localhost", "tcp:h:", "tcp:[::1:4", "tcp:127.0.0.1:nosuch", "tcp:127.0.0.1:1"),
    *("tcp:127.0.0.1:1,ipv4=off,ipv6=off", "unix:", "unix:/nonexistent/socket", "unix:/" + "x" * 120),
    *("vsock:", "vsock:1", "vsock:a:1", "vsock:1:2:3", "fd:nobody", "fd:12"),
)


def test_both_say_the_same_of_an_address_that_leads_nowhere(stage: Stage, qemu: str) -> None:
    """Whether at once or when the migration has failed is the same, too."""
    ours = stage.vmm("ours", qemumig_system(), guest=GUEST, stopped=True)
    theirs = stage.vmm("theirs", qemu, stopped=True)
    assert {uri: refusal(ours, uri) for uri in NOWHERE} == {uri: refusal(theirs, uri) for uri in NOWHERE}


def refusal(vmm: Vmm, uri: str) -> tuple[str, str]:
    """What the command says, or else what the migration says that it began and that failed."""
    try:
        vmm.command("migrate", uri=uri)
    except VmmError as error:
        return str(error).removeprefix(f"{vmm.name} refuses migrate: "), ""
    wait_until(lambda: vmm.command("query-migrate")["status"] == "failed", f"{vmm.name} to fail")
    return "", str(vmm.command("query-migrate")["error-desc"])
