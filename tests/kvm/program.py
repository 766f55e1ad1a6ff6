"""qemumig-system as a process of its own, with the real guest: started, asked, ended."""

import contextlib
import json
import shlex
import socket
import subprocess
import time
from pathlib import Path

from tests.support.host import qemumig_system
from tests.support.vmm import wait_until

GUEST = Path(__file__).parents[1] / "guests" / "tinyguest.bin"
PATIENCE_S = 20
MACHINE = "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=off"
BASE = ["-M", MACHINE, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm"]
BASE += ["-cpu", "qemu64,pni=off", "-m", "32M"]


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
