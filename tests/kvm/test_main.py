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
import time
from pathlib import Path

import pytest

from tests.support.host import qemumig_system
from tests.support.vmm import open_files, thread_names, wait_until

GUEST = Path(__file__).parents[1] / "guests" / "tinyguest.bin"
PATIENCE_S = 20
MACHINE = "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=off"
BASE = ["-M", MACHINE, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm"]
BASE += ["-cpu", "qemu64,pni=off", "-m", "32M"]

needs_kvm = pytest.mark.needs("kvm")


class System:
    """One running qemumig-system with a QMP socket and its serial port in a file."""

    def __init__(self, directory, name="vm", *argv, guest=GUEST):
        self.directory = directory
        self.qmp_path = directory / f"{name}.qmp"
        self.serial_path = directory / f"{name}.serial"
        self.process = start(
            *BASE,
            *("-bios", guest),
            *("-serial", f"file:{self.serial_path}"),
            *("-qmp", f"unix:{self.qmp_path},server=on,wait=off"),
            *argv,
        )
        self.events = []

    def connect(self):
        """Negotiate on the QMP socket."""
        self.socket = connect_when_there(self.qmp_path, self.process)
        self.file = self.socket.makefile("rb")
        self.greeting = self.message()
        self.result("qmp_capabilities")
        return self

    def message(self):
        return json.loads(self.file.readline())

    def ask(self, command, **arguments):
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.socket.sendall(json.dumps({"execute": command, "arguments": named}).encode())
        while "event" in (message := self.message()):
            self.events.append(message)
        return message

    def result(self, command, **arguments):
        response = self.ask(command, **arguments)
        assert "return" in response, response
        return response["return"]

    def event(self, name):
        """The next event of that name; others before it are dropped."""
        while True:
            message = self.events.pop(0) if self.events else self.message()
            if message.get("event") == name:
                return message

    def printed(self):
        return self.serial_path.read_bytes()

    def until_printed(self, count):
        wait_until(lambda: len(self.printed()) >= count, "the guest prints", PATIENCE_S)

    def end(self):
        """Wait for the process; its exit status and what it said on stderr."""
        _, said = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, said

    def close(self):
        if hasattr(self, "socket"):
            self.file.close()
            self.socket.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def start(*argv):
    command = [*shlex.split(qemumig_system()), *map(str, argv)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*argv):
    """Run to the end: exit status, stdout, stderr."""
    process = start(*argv)
    said, complained = process.communicate(timeout=PATIENCE_S)
    return process.returncode, said, complained


def connect_when_there(path, process):
    deadline = time.monotonic() + PATIENCE_S
    while True:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(PATIENCE_S)
        try:
            client.connect(str(path))
            return client
        except OSError:
            client.close()
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no QMP socket"
            time.sleep(0.01)  # there is nothing to wait on before the file exists


@contextlib.contextmanager
def system(directory, name="vm", *argv, **options):
    instance = System(directory, name, *argv, **options)
    try:
        yield instance.connect()
    finally:
        instance.close()


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


# ---- what cannot be ----


def program():
    return Path(shlex.split(qemumig_system())[0]).name if "-c" not in shlex.split(qemumig_system()) else "-c"


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        (["-nosuch"], ["-nosuch: invalid option"]),
        (
            ["-serial", "foo"],
            [
                "-serial foo: 'foo' is not a valid char driver",
                "-serial foo: could not connect serial device to character backend 'foo'",
            ],
        ),
        (["-qmp", "none"], ["-qmp none: 'none' is not a valid char driver"]),
        (["-mon", "nope,mode=control"], ['-mon nope,mode=control: chardev "nope" not found']),
        (["-pidfile", "{d}/no/pid"], ["cannot create PID file: Could not create '{d}/no/pid': No such file or directory"]),
        (
            ["-object", "memory-backend-ram,id=m0,size=8M", "-M", "memory-backend=m0"],
            ["Machine memory size does not match the size of the memory backend"],
        ),
        (
            ["-object", "memory-backend-file,id=m0,size=8M,mem-path={d}/no/ram"],
            ["can't open backing store {d}/no/ram for guest RAM: No such file or directory"],
        ),
    ],
)
def test_a_start_that_fails_says_why_and_leaves_nothing(directory, argv, lines):
    filled = [word.format(d=directory) for word in argv]
    status, said, complained = run(*BASE, "-bios", GUEST, *filled)
    assert (status, said) == (1, "")
    assert complained.splitlines() == [f"{program()}: {line.format(d=directory)}" for line in lines]
    assert os.listdir(directory) == []


@needs_kvm
@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["-cpu", "foo"], "unable to find CPU model 'foo'"),
        (["-incoming", "foo:bar"], "-incoming foo:bar: unknown migration protocol: foo:bar"),
        (
            ["-incoming", "unix:{d}/no/s"],
            "-incoming unix:{d}/no/s: Failed to bind socket to {d}/no/s: No such file or directory",
        ),
        (["-global", "migration.foo=1"], "can't apply global migration.foo=1: Property 'migration.foo' not found"),
    ],
)
def test_a_machine_or_migration_that_cannot_be_says_why_and_leaves_nothing(directory, argv, line):
    filled = [word.format(d=directory) for word in argv]
    sockets = ["-qmp", f"unix:{directory}/qmp,server=on,wait=off"]
    status, _, complained = run(*BASE, "-bios", GUEST, *sockets, *filled)
    assert status == 1
    assert complained == f"{program()}: {line.format(d=directory)}\n"
    assert os.listdir(directory) == []


@needs_kvm
def test_firmware_that_cannot_be_loaded_is_named_as_qemu_names_it(directory):
    short = directory / "short"
    short.write_bytes(b"x" * 100)
    for path in (directory / "missing", short):
        assert run(*BASE, "-bios", path) == (1, "", f"qemu: could not load PC BIOS '{path}'\n")


def test_messages_carry_the_time_on_request():
    status, _, complained = run(*BASE, "-bios", GUEST, "-msg", "timestamp=on", "-qmp", "none")
    assert status == 1
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z \S+: -qmp none: ", complained)


@pytest.mark.parametrize(("option", "text"), [("-version", "QEMU emulator version"), ("-help", "usage: ")])
def test_help_goes_to_stdout_with_status_0(option, text):
    status, said, complained = run(option)
    assert (status, complained) == (0, "")
    assert text in said


def test_importing_the_command_line_does_not_load_the_machine():
    code = "import sys, kvm.main; print(sorted(n for n in sys.modules if n.startswith('qemumig.') and '.so' not in n))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "qemumig.savevm" not in loaded
    assert "qemumig.source" not in loaded


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
