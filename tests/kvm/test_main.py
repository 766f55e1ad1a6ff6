"""kvm.main: the program as others see it, started, steered, migrated, ended; with the real guest on KVM."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.host import qemumig_system
from tests.support.vmm import open_files, thread_names, wait_until

from .program import BASE, GUEST, PATIENCE_S, connect_when_there, run, start, system

needs_kvm = pytest.mark.needs("kvm")


# ---- a life ----


@needs_kvm
def test_a_guest_starts_prints_and_can_be_stopped_and_continued(directory):
    with system(directory) as vm:
        vm.until_printed(2)
        assert vm.result("query-status") == {"running": True, "status": "running"}
        assert vm.printed().startswith(b"AB")
        vm.result("stop")
        assert vm.event("STOP")
        stopped = vm.printed()
        assert vm.result("query-status") == {"running": False, "status": "paused"}
        assert vm.printed() == stopped
        vm.result("cont")
        vm.until_printed(len(stopped) + 2)
        vm.result("quit")
        assert vm.end() == (0, "")


@needs_kvm
def test_with_s_the_guest_waits_for_cont(directory):
    with system(directory, "vm", "-S") as vm:
        assert vm.result("query-status") == {"running": False, "status": "prelaunch"}
        assert vm.printed() == b""
        vm.result("cont")
        vm.until_printed(2)


@needs_kvm
def test_query_cpus_fast_names_real_threads(directory):
    with system(directory, "vm", "-smp", "2") as vm:
        identities = [cpu["thread-id"] for cpu in vm.result("query-cpus-fast")]
        names = [Path(f"/proc/{vm.process.pid}/task/{identity}/comm").read_text() for identity in identities]
        assert names == ["CPU 0/KVM\n", "CPU 1/KVM\n"]


@needs_kvm
def test_pmemsave_shows_the_firmware_where_the_guest_sees_it(directory):
    with system(directory, "vm", "-S") as vm:
        for address in (0xF0000, 0xFFFF0000):
            vm.result("pmemsave", val=address, size=65536, filename=str(directory / "dump"))
            assert (directory / "dump").read_bytes() == GUEST.read_bytes()


@needs_kvm
def test_system_reset_starts_the_guest_anew(directory):
    with system(directory) as vm:
        vm.until_printed(3)
        vm.result("system_reset")
        assert vm.event("RESET")["data"] == {"guest": False, "reason": "host-qmp-system-reset"}
        wait_until(lambda: vm.printed().count(b"A") == 2, "the guest starts again", PATIENCE_S)


@needs_kvm
def test_names_given_on_the_command_line_are_told(directory):
    with system(directory, "vm", "-name", "my vm", "-uuid", "00010203-0405-0607-0809-0a0b0c0d0e0f") as vm:
        assert vm.result("query-name") == {"name": "my vm"}
        assert vm.result("query-uuid") == {"UUID": "00010203-0405-0607-0809-0a0b0c0d0e0f"}
        assert vm.result("query-version")["package"].startswith("qemumig ")


@needs_kvm
@pytest.mark.parametrize(
    "backend",
    [
        "memory-backend-ram,id=m0,size=32M,share=on,prealloc=off,merge=off,dump=off,reserve=off",
        "memory-backend-memfd,id=m0,size=32M,share=on,seal=off,hugetlb=off",
        "memory-backend-shm,id=m0,size=32M,share=on,prealloc=on",
        "memory-backend-file,id=m0,size=32M,mem-path={d},discard-data=on,align=2M,offset=0,readonly=off,rom=off",
        "memory-backend-file,id=m0,size=32M,mem-path={d}/ram,share=on",
    ],
)
def test_ram_may_come_from_a_memory_backend(directory, backend):
    argv = ["-object", backend.format(d=directory), "-M", "memory-backend=m0"]
    with system(directory, "vm", *argv) as vm:
        vm.until_printed(2)
        vm.result("stop")
        vm.result("pmemsave", val=0x1000, size=8, filename=str(directory / "status"))
        passes = (directory / "status").read_bytes()
        assert int.from_bytes(passes, "little") > 0
        if "mem-path={d}/ram" in backend:
            assert (directory / "ram").read_bytes()[0x1000:0x1008] == passes


@needs_kvm
def test_several_monitors_at_once(directory):
    argv = ["-chardev", f"socket,id=c0,path={directory}/other,server=on,wait=off", "-mon", "c0,mode=control,pretty=on"]
    with system(directory, "vm", *argv) as vm:
        other = connect_when_there(directory / "other", vm.process)
        file = other.makefile("rb")
        assert file.readline() == b"{\r\n"
        vm.result("stop")
        other.close()


@needs_kvm
def test_the_serial_port_takes_input_from_a_socket(directory):
    argv = [*BASE, "-bios", GUEST, "-serial", f"unix:{directory}/serial,server=on"]
    process = start(*argv)
    try:
        client = connect_when_there(directory / "serial", process)
        assert client.recv(1) == b"A"  # wait=on: the guest started only now, nothing was lost
        client.sendall(b"x" * 100)
        client.close()
    finally:
        process.terminate()
        _, said = process.communicate(timeout=PATIENCE_S)
    assert "info: QEMU waiting for connection on: disconnected:unix:" in said
    assert process.returncode == 0


# ---- migration, from the outside ----


@needs_kvm
def test_a_guest_moves_to_a_second_process(directory):
    with system(directory, "src") as source, system(directory, "dst", "-incoming", f"unix:{directory}/mig") as target:
        source.until_printed(3)
        assert target.result("query-status")["status"] == "inmigrate"
        source.result("migrate", uri=f"unix:{directory}/mig")
        target.event("RESUME")
        target.until_printed(3)
        assert target.printed().strip(b"B") == b""
        wait_until(lambda: source.result("query-status")["status"] == "postmigrate", "source is done", PATIENCE_S)
        assert source.result("query-migrate")["status"] == "completed"
        for vm in (source, target):  # libraries that only some migrations need are memory beyond the guest's
            mapped = Path(f"/proc/{vm.process.pid}/maps").read_text()
            assert "libpython" in mapped or "python3" in mapped
            assert not re.search(r"lib(crypto|ssl|zstd)\b|_decimal", mapped)


@needs_kvm
def test_stop_on_a_waiting_destination_keeps_the_guest_stopped_until_cont(directory):
    with system(directory, "src") as source, system(directory, "dst", "-incoming", "defer") as target:
        target.result("stop")
        target.result("migrate-incoming", uri=f"unix:{directory}/mig")
        source.result("migrate", uri=f"unix:{directory}/mig")
        wait_until(lambda: target.result("query-status")["status"] == "paused", "guest is there", PATIENCE_S)
        assert target.printed() == b""
        target.result("cont")
        target.until_printed(1)


@needs_kvm
def test_a_migration_may_go_through_a_passed_descriptor(directory):
    with system(directory, "src") as source, system(directory, "dst", "-incoming", "defer") as target:
        ours, theirs = socket.socketpair()
        for vm, end in ((source, ours), (target, theirs)):
            request = b'{"execute": "getfd", "arguments": {"fdname": "mig"}}'
            socket.send_fds(vm.socket, [request], [end.fileno()])
            assert vm.message() == {"return": {}}
            end.close()
        target.result("migrate-incoming", uri="fd:mig")
        source.result("migrate", uri="fd:mig")
        target.event("RESUME")
        assert source.ask("migrate", uri="fd:other")["error"]["class"] == "GenericError"


@needs_kvm
def test_a_failed_incoming_migration_ends_the_program(directory):
    with system(directory, "dst", "-incoming", f"unix:{directory}/mig") as target:
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(str(directory / "mig"))
        peer.sendall(b"this is no migration stream" * 10)
        status, said = target.end()
        peer.close()
        assert status == 1
        assert re.search(r"^\S+: load of migration failed: .", said)
        assert not target.qmp_path.exists()


# ---- the end ----


@needs_kvm
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_cleanly_and_says_who_sent_it(directory, number):
    with system(directory) as vm:
        vm.process.send_signal(number)
        event = vm.event("SHUTDOWN")
        assert event["data"] == {"guest": False, "reason": "host-signal"}
        status, said = vm.end()
        assert status == 0
        name = Path(f"/proc/{os.getpid()}/cmdline").read_bytes().partition(b"\0")[0].decode()
        assert said.endswith(f": terminating on signal {number.value} from pid {os.getpid()} ({name})\n")
        assert sorted(os.listdir(directory)) == ["vm.serial"]


@needs_kvm
def test_a_signal_ends_it_when_nobody_reads_what_it_says(directory):
    with system(directory) as vm:
        vm.process.stderr.close()
        vm.process.send_signal(signal.SIGTERM)
        assert vm.event("SHUTDOWN")
        assert vm.process.wait(PATIENCE_S) == 0
        assert sorted(os.listdir(directory)) == ["vm.serial"]


@needs_kvm
def test_quit_is_answered_before_the_connection_ends(directory):
    with system(directory, "vm", "-pidfile", directory / "pid") as vm:
        assert (directory / "pid").read_text() == f"{vm.process.pid}\n"
        assert vm.result("quit") == {}
        assert vm.event("SHUTDOWN")["data"] == {"guest": False, "reason": "host-qmp-quit"}
        assert vm.file.readline() == b""
        assert vm.end() == (0, "")
        assert sorted(os.listdir(directory)) == ["vm.serial"]


@needs_kvm
def test_a_stuck_dump_does_not_hold_up_the_end(directory):
    os.mkfifo(directory / "fifo")
    with system(directory) as vm:
        request = {"execute": "pmemsave", "arguments": {"val": 0, "size": 1, "filename": str(directory / "fifo")}}
        vm.socket.sendall(json.dumps(request).encode())
        vm.process.terminate()
        assert vm.end()[0] == 0


@needs_kvm
def test_monitor_clients_leave_no_descriptor_and_no_thread_behind(directory):
    with system(directory) as vm:
        vm.result("stop")  # its worker thread stays, once
        argv = {"val": 0, "size": 4096, "filename": str(directory / "dump")}
        vm.result("pmemsave", **argv)
        before = len(open_files(vm.process.pid)), sorted(thread_names(vm.process.pid))
        for _ in range(20):
            vm.file.close()
            vm.socket.close()
            vm.connect()
            vm.result("pmemsave", **argv)
            vm.ask("getfd", fdname="x")
        assert (len(open_files(vm.process.pid)), sorted(thread_names(vm.process.pid))) == before


@needs_kvm
def test_a_signal_to_a_thread_that_takes_signals_ends_it_too(directory):
    """What happens while a child process is being started with an ordinary signal mask."""
    code = (
        "import signal, sys, threading, kvm.main\n"
        "from kvm.monitor import commands\n"
        "def version():\n"
        "    def body():\n"
        "        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "    threading.Thread(target=body).start()\n"
        "commands.version = version\n"
        "sys.exit(kvm.main.main(sys.argv[1:]))\n"
    )
    argv = [*BASE, "-bios", GUEST, "-S", "-qmp", f"unix:{directory}/vm.qmp,server=on,wait=off"]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], stderr=subprocess.PIPE, text=True)
    client = connect_when_there(directory / "vm.qmp", process)
    client.sendall(b'{"execute": "qmp_capabilities"}{"execute": "query-version"}')
    _, said = process.communicate(timeout=PATIENCE_S)
    client.close()
    assert process.returncode == 0
    assert said.endswith(": terminating on signal 15\n")
    assert os.listdir(directory) == []


# ---- life in the background ----


@needs_kvm
def test_daemonize_returns_when_the_sockets_listen(directory):
    pidfile, path = directory / "pid", directory / "vm.qmp"
    argv = [*BASE, "-bios", GUEST, "-serial", "null", "-qmp", f"unix:{path},server=on,wait=off"]
    argv += ["-daemonize", "-pidfile", pidfile]
    assert run(*argv) == (0, "", "")
    daemon = int(pidfile.read_text())
    watch = os.pidfd_open(daemon)
    try:
        assert os.getsid(daemon) == daemon
        assert os.readlink(f"/proc/{daemon}/fd/2") == "/dev/null"
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(path))  # at once: no waiting for the file
        client.sendall(b'{"execute": "qmp_capabilities"}{"execute": "quit"}')
        while client.recv(4096):
            pass
        client.close()
        wait_until(lambda: not pidfile.exists(), "the daemon ends", PATIENCE_S)
        assert not path.exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(watch, signal.SIGKILL)
        os.close(watch)


@needs_kvm
def test_daemonize_passes_an_error_on(directory):
    status, _, said = run(*BASE, "-bios", directory / "missing", "-daemonize")
    assert status == 1
    assert said == f"qemu: could not load PC BIOS '{directory}/missing'\n"


# ---- monitors for people, the harness, objects ----


def read_until(client, text):
    """What a person at a monitor has seen once *text* has come."""
    seen = b""
    while text not in seen:
        more = client.recv(65536)
        assert more, f"the connection ended after {seen!r}"
        seen += more
    return seen.decode()


@needs_kvm
def test_people_and_harnesses_find_the_machine_behind_their_doors(directory):
    doors = ["-monitor", f"unix:{directory}/hmp,server=on,wait=off", "-qtest", f"unix:{directory}/qtest,server=on,wait=off"]
    doors += ["-qtest-log", f"{directory}/log", "-object", "authz-simple,id=who,identity=me"]
    with (
        system(directory, "vm", *doors) as vm,
        socket.socket(socket.AF_UNIX) as person,
        socket.socket(socket.AF_UNIX) as harness,
    ):
        for client, name in ((person, "hmp"), (harness, "qtest")):
            client.settimeout(PATIENCE_S)
            client.connect(str(directory / name))
        assert "monitor - type 'help'" in read_until(person, b"(qemu) ")
        person.sendall(b"info status\n")
        assert "VM status: running" in read_until(person, b"running\r\n(qemu) ")
        assert vm.result("human-monitor-command", command_line="info status") == "VM status: running\r\n"
        harness.sendall(b"endianness\nreadb 0xffff0000\ninb 0x3fd\nirq_intercept_in ioapic\n")
        answers = read_until(harness, b"OK\n").splitlines()
        assert answers == ["OK little", f"OK {GUEST.read_bytes()[0]:#018x}", "OK 0x0060", "OK"]
        objects = [entry["name"] for entry in vm.result("qom-list", path="/objects")]
        assert objects == ["type", "who", "microvm.ram"]
        labels = {entry["label"]: entry["frontend-open"] for entry in vm.result("query-chardev")}
        assert labels == {"qtest": True, "compat_monitor0": True, "compat_monitor1": True, "serial0": True}
        person.sendall(b"quit\n")
        assert vm.end()[0] == 0
    assert "[R +" in (directory / "log").read_text()


@needs_kvm
def test_serial_port_and_monitor_share_a_connection(directory):
    doors = ["-serial", f"mon:unix:{directory}/both,server=on,wait=off"]
    process = start(*BASE, "-bios", GUEST, *doors, "-S", "-qmp", f"unix:{directory}/qmp,server=on,wait=off")
    try:
        with connect_when_there(directory / "both", process) as client:
            client.sendall(b"\x01c")
            read_until(client, b"(qemu) ")
            client.sendall(b"cont\n")
            assert "A" in read_until(client, b"B")  # the prompt may come between them
            client.sendall(b"\x01x")
            assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.communicate()


@needs_kvm
def test_a_program_ends_with_the_one_that_started_it(directory):
    """A shell starts it in the background, tells its number and ends."""
    command = [*shlex.split(qemumig_system()), *BASE, "-bios", str(GUEST), "-run-with", "exit-with-parent=on"]
    command += ["-qmp", f"unix:{directory}/qmp,server=on,wait=off"]
    script = f"{shlex.join(map(str, command))} & echo $!; read line"
    shell = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    number = int(shell.stdout.readline())
    connect_when_there(directory / "qmp", shell).close()
    shell.communicate(b"\n", timeout=PATIENCE_S)
    wait_until(lambda: not os.path.exists(f"/proc/{number}/cmdline") or not os.listdir(directory), "it ends", PATIENCE_S)
    wait_until(lambda: not (directory / "qmp").exists(), "its socket goes", PATIENCE_S)


@needs_kvm
def test_a_machine_may_be_empty(directory):
    """Nothing runs, and nothing is migrated, successfully."""
    files = [f"unix:{directory}/{name},server=on,wait=off" for name in ("a", "b")]
    processes = [
        start("-M", "none", "-qmp", files[0]),
        start("-M", "none", "-qmp", files[1], "-incoming", f"unix:{directory}/m"),
    ]
    try:
        source, destination = (Client(directory / name, process) for name, process in zip("ab", processes, strict=True))
        with source, destination:
            assert source.ask("query-cpus-fast") == []
            assert source.ask("query-memory-size-summary")["base-memory"] == 0
            assert source.ask("query-status")["status"] == "running"
            source.ask("migrate", uri=f"unix:{directory}/m")
            wait_until(lambda: source.ask("query-migrate").get("status") == "completed", "nothing moves", PATIENCE_S)
            wait_until(lambda: destination.ask("query-status")["status"] == "running", "it arrives", PATIENCE_S)
            for client in (source, destination):
                client.ask("quit")
        assert [process.wait(PATIENCE_S) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


class Client:
    """A client of one QMP socket; a context manager."""

    def __init__(self, path, process):
        self.socket = connect_when_there(path, process)
        self.file = self.socket.makefile("rb")
        self.file.readline()
        self.ask("qmp_capabilities")

    def ask(self, command, **arguments):
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.socket.sendall(json.dumps({"execute": command, "arguments": named}).encode())
        while "event" in (message := json.loads(self.file.readline())):
            pass
        return message["return"]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()
        self.socket.close()


@needs_kvm
def test_bytes_are_loaded_into_memory(directory):
    blob = directory / "blob"
    blob.write_bytes(b"hello")
    more = ["-device", f"loader,file={blob},addr=0x9000", "-device", "loader,addr=0x9010,data=0x1234,data-len=4", "-S"]
    with system(directory, "vm", *more) as vm:
        words = "xp/5bx 0x9000"
        assert vm.result("human-monitor-command", command_line=words).split()[1:] == [f"0x{byte:02x}" for byte in b"hello"]
        assert "0x00001234" in vm.result("human-monitor-command", command_line="xp/1wx 0x9010")
        vm.result("quit")
        assert vm.end()[0] == 0


@needs_kvm
def test_a_channel_may_be_described_instead_of_a_uri(directory):
    with system(directory, "vm", "-incoming", f"main,addr.transport=socket,addr.type=unix,addr.path={directory}/m") as vm:
        assert vm.result("query-migrate")["socket-address"] == [{"type": "unix", "path": f"{directory}/m"}]
        vm.result("quit")
        assert vm.end()[0] == 0
