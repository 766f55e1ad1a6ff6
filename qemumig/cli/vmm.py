"""A VMM process under our control: QMP on a Unix socket, serial port on a FIFO, everything in one directory.

Any program that takes QEMU's options and QMP commands will do, qemumig-system as well as a real QEMU.

Threads   `serial/NAME`, one per VMM: reads the FIFO and notes when each piece came.  `Vmm` starts it, `close`
          wakes and joins it.
Holds     (1) `close` ends the process, whatever state it is in, and leaves no thread, descriptor or child
          (2) the process dies with the one that started it, even when that one is killed
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import select
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .guest import CLOCK_PAGE, PAGE_SIZE, STATUS_ADDRESS, STATUS_SIZE, GuestStatus, parse_status
from .qmp import QmpClient, QmpEnded, QmpError

GIB = 1 << 30
LOW_MEMORY_END = 3 * GIB  # machine.md §2: what is above goes to 4 GiB
HIGH_MEMORY = 4 * GIB

MACHINE = "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=off"
START_TIMEOUT = 30.0
DYING_S = 2.0  # at most, from the end of a VMM's monitor to its own
QUIT_TIMEOUT = 5.0
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


class VmmError(Exception):
    """A VMM did not start, died, or did not do what it should."""


@dataclass(frozen=True)
class MachineShape:
    """What both ends of a migration must agree on; *memory* in bytes."""

    memory: int
    cpus: int
    image: Path  # the guest
    extra: tuple[str, ...] = ()

    def options(self) -> list[str]:
        """The command line after the program's name, without monitor and serial port."""
        return [
            *("-M", MACHINE, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm"),
            *("-cpu", "qemu64,pni=off", "-smp", str(self.cpus), "-m", f"{self.memory >> 10}k"),
            *("-bios", str(self.image)),
            *self.extra,
        ]

    def ranges(self) -> list[tuple[int, int]]:
        """Guest-physical (address, size) of all of RAM."""
        high = max(0, self.memory - LOW_MEMORY_END)
        low = [(0, self.memory - high)]
        return [*low, (HIGH_MEMORY, high)] if high else low


class SerialLog:
    """What a guest printed, and when; one thread adds, any may read."""

    def __init__(self, name: str, path: Path) -> None:
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDWR)  # also a writer: the other end may come and go without an EOF
        self._closing = False
        self._pieces: list[tuple[float, bytes]] = []
        self._arrival = threading.Condition()
        self._thread = threading.Thread(target=self._read, name=f"serial/{name}"[:15], daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while data := os.read(self._fd, 65536):
            now = time.monotonic()
            if self._closing:
                return
            with self._arrival:
                self._pieces.append((now, data))
                self._arrival.notify_all()

    def pieces(self) -> list[tuple[float, bytes]]:
        """(monotonic seconds, bytes) of everything so far."""
        with self._arrival:
            return list(self._pieces)

    def output(self) -> bytes:
        return b"".join(data for _, data in self.pieces())

    def wait_more(self, count: int, timeout: float) -> bool:
        """Wait until *count* further bytes have come; False when they did not within *timeout* seconds."""
        with self._arrival:
            start = len(self._pieces)
            return self._arrival.wait_for(lambda: sum(len(data) for _, data in self._pieces[start:]) >= count, timeout)

    def close(self) -> None:
        """End the thread; the writing process is gone."""
        self._closing = True
        os.write(self._fd, b"\0")
        self._thread.join()
        os.close(self._fd)


class Vmm:
    """One VMM process; *command* is the program, with options of its own if need be."""

    def __init__(
        self,
        name: str,
        command: str,
        directory: Path,
        shape: MachineShape,
        *,
        incoming: bool = False,
        stopped: bool = False,
    ) -> None:
        self.name = name
        self.shape = shape
        self.directory = directory
        self._log = directory / f"{name}.log"
        self._monitor = directory / f"{name}.qmp"
        self._qmp: QmpClient | None = None
        self._closed = False
        serial = directory / f"{name}.serial"
        self.argv = [*shlex.split(command), *shape.options()]
        self.argv += ["-serial", f"file:{serial}", "-qmp", f"unix:{self._monitor},server=on,wait=off"]
        self.argv += ["-incoming", "defer"] if incoming else []
        self.argv += ["-S"] if stopped else []
        self.serial = SerialLog(name, serial)
        try:
            self.process = self._spawn()
        except OSError as error:
            self.serial.close()
            raise VmmError(f"{name}: {self.argv[0]} cannot be started: {error.strerror}") from error

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._log.open("wb") as log:
            return subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # a Ctrl-C on the terminal is for us; we end the VMMs in order
                preexec_fn=_die_with_parent(os.getpid()),
            )

    def connect(self) -> None:
        """Wait for the monitor and negotiate."""
        connection = self._connection()
        try:
            self._qmp = QmpClient(self.name, connection)
        except QmpError as error:
            connection.close()
            raise self._broken(error) from error

    def _connection(self) -> socket.socket:
        deadline = time.monotonic() + START_TIMEOUT
        connection = socket.socket(socket.AF_UNIX)
        while True:
            try:
                connection.connect(str(self._monitor))
                return connection
            except OSError as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    connection.close()
                    raise VmmError(self._no_start(error)) from error
                time.sleep(0.01)  # there is no event for "it listens now"

    def _no_start(self, error: OSError) -> str:
        if self.process.poll() is not None:
            return f"{self.name} did not start, it {self.obituary()}"
        return f"{self.name} has no monitor after {START_TIMEOUT:.0f} s: {error.strerror}"

    # --- the monitor

    @property
    def qmp(self) -> QmpClient:
        if self._qmp is None:
            raise VmmError(f"{self.name} is not connected yet")
        return self._qmp

    def command(self, command: str, /, **arguments: Any) -> Any:
        """Execute a QMP command; a VMM that dies of it is told with its last words."""
        try:
            return self.qmp.command(command, **arguments)
        except QmpError as error:
            raise self._broken(error) from error

    def wait_event(self, name: str, timeout: float, **data: Any) -> dict[str, Any]:
        """The first event *name* whose data has all of *data*."""
        try:
            return self.qmp.wait_event(name, timeout, **data)
        except QmpError as error:
            raise self._broken(error) from error

    def _broken(self, error: QmpError) -> VmmError:
        has_died = isinstance(error, QmpEnded) and self.has_died()
        return VmmError(f"{self.name} {self.obituary()}" if has_died else str(error))

    def wait_runstate(self, wanted: str, timeout: float = 30) -> None:
        """Wait until `query-status` says *wanted*."""
        deadline = time.monotonic() + timeout
        while (status := self.command("query-status")["status"]) != wanted:
            if time.monotonic() > deadline:
                raise VmmError(f"{self.name} is {status}, expected {wanted} within {timeout:.0f} s")
            time.sleep(0.01)

    def last_words(self) -> str:
        """The last line that the process printed."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def has_died(self) -> bool:
        """Whether the process is gone, or about to go: its monitor closes a moment before."""
        try:
            self.process.wait(DYING_S)
        except subprocess.TimeoutExpired:
            return False
        return True

    def obituary(self) -> str:
        """How a process that is gone ended, as the end of a sentence."""
        words = self.last_words()
        return f"ended with status {self.process.returncode}" + (f": {words}" if words else "")

    # --- the guest

    def guest_status(self) -> list[GuestStatus]:
        """The status blocks of all vCPUs, read from guest memory."""
        data = bytearray()
        self.save_memory(STATUS_ADDRESS, STATUS_SIZE * self.shape.cpus, data.extend)
        return parse_status(bytes(data), self.shape.cpus)

    def memory_digest(self) -> str:
        """SHA-256 over all of guest RAM but the paravirtual clock's page; meaningful while the guest is stopped.

        Loading a stream makes the host's kernel write that page anew, with QEMU as with any other VMM.
        """
        digest = hashlib.sha256()
        for address, size in self.shape.ranges():
            if address <= CLOCK_PAGE < address + size:
                self.save_memory(address, CLOCK_PAGE - address, digest.update)
                address, size = CLOCK_PAGE + PAGE_SIZE, size - (CLOCK_PAGE - address) - PAGE_SIZE
            self.save_memory(address, size, digest.update)
        return digest.hexdigest()

    def save_memory(self, address: int, size: int, consume: Callable[[memoryview], Any]) -> None:
        """Let the VMM write guest memory into a FIFO, and hand the bytes on piece by piece."""
        fifo = self.directory / f"{self.name}.memory"
        os.mkfifo(fifo)
        reader = FifoReader(fifo, size, consume, self.name)
        try:
            self.command("pmemsave", val=address, size=size, filename=str(fifo))
        finally:
            got = reader.finish()
            fifo.unlink()
        if got != size:
            raise VmmError(f"{self.name}: pmemsave at {address:#x} gave {got} bytes, expected {size}")

    # --- the end

    def close(self) -> None:
        """End the process and let go of everything, in whatever state it is; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._qmp is not None and self.process.poll() is None:
            self._qmp.timeout = QUIT_TIMEOUT
            try:
                self._qmp.command("quit")
            except QmpError:
                self.process.terminate()
        else:
            self.process.terminate()
        try:
            self.process.wait(QUIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self._qmp is not None:
            self._qmp.close()
        self.serial.close()


class FifoReader:
    """Reads what another process writes into a FIFO, until *size* bytes or `finish`.

    Threads   one, `memory/NAME`; `finish` wakes and joins it.
    """

    def __init__(self, path: Path, size: int, consume: Callable[[memoryview], Any], name: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._size = size
        self._got = 0
        self._consume = consume
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._read, name=f"memory/{name}"[:15], daemon=True)
        self._thread.start()

    def _read(self) -> None:
        buffer = memoryview(bytearray(1 << 20))
        while self._got < self._size:
            ready, _, _ = select.select([self._fd, self._wake_read], [], [])
            if self._fd not in ready:
                return  # the writer is done, and the FIFO is empty
            count = os.readv(self._fd, [buffer[: self._size - self._got]])
            self._consume(buffer[:count])
            self._got += count

    def finish(self) -> int:
        """The writer is done: take what is left, end, and return how many bytes came."""
        os.write(self._wake_write, b"\0")
        self._thread.join()
        for fd in (self._fd, self._wake_read, self._wake_write):
            os.close(fd)
        return self._got


def _die_with_parent(parent: int) -> Callable[[], None]:
    """What a child does between fork and exec: ask the kernel to be killed when *parent* is gone."""

    def ask() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            os.kill(os.getpid(), signal.SIGKILL)

    return ask


# --- one migration

FINAL = ("completed", "failed", "cancelled")
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class MigrationOutcome:
    """A completed migration: times in monotonic seconds, *report* is the source's last `query-migrate`."""

    started: float
    ended: float
    report: dict[str, Any]


class Commanded(Protocol):
    """A VMM that takes QMP commands."""

    def command(self, command: str, /, **arguments: Any) -> Any: ...


def listen(destination: Commanded, uri: str = "tcp:127.0.0.1:0") -> str:
    """Let *destination* wait for a migration; returns the URI that reaches it."""
    destination.command("migrate-incoming", uri=uri)
    addresses = destination.command("query-migrate").get("socket-address", [])
    if not uri.startswith("tcp:") or not addresses:
        return uri
    return f"tcp:{addresses[0]['host']}:{addresses[0]['port']}"


def migrate(
    source: Vmm,
    destination: Vmm,
    uri: str = "tcp:127.0.0.1:0",
    *,
    progress: Progress = lambda report: None,
    timeout: float = 120,
    poll: float = 0.05,
) -> MigrationOutcome:
    """Migrate the guest and wait until the source says that it is done.

    *progress* gets every answer of the source's `query-migrate`, one each *poll* seconds.  VmmError tells in one
    sentence why it failed, with the words of the side that knows.
    """
    uri = listen(destination, uri)
    started = time.monotonic()
    source.command("migrate", uri=uri)
    while True:
        report = source.command("query-migrate")
        progress(report)
        if report.get("status") in FINAL:
            break
        if time.monotonic() - started > timeout:
            source.command("migrate_cancel")
            raise VmmError(_too_slow(report, timeout))
        time.sleep(poll)
    ended = time.monotonic()
    if report["status"] != "completed":
        raise VmmError(_failure(source, destination, report))
    return MigrationOutcome(started, ended, report)


def _too_slow(report: dict[str, Any], timeout: float) -> str:
    ram = report.get("ram", {})
    rate = ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096) / 1e6
    return (
        f"the migration was still {report.get('status')} after {timeout:.0f} s with "
        f"{ram.get('remaining', 0) / 1e6:.0f} MB left: the guest dirties {rate:.0f} MB/s and "
        f"{ram.get('mbps', 0) / 8:.0f} MB/s are sent"
    )


def _failure(source: Vmm, destination: Vmm, report: dict[str, Any]) -> str:
    reasons = [report.get("error-desc", "")]
    if destination.has_died():
        reasons.append(f"{destination.name} {destination.obituary()}")
    else:
        reasons.append(destination.command("query-migrate").get("error-desc", ""))
    reasons.append(source.last_words() if not any(reasons) else "")
    return f"the migration {report['status']}: " + ("; ".join(r for r in reasons if r) or "no side says why")


def with_capabilities(vmms: Sequence[Vmm], **capabilities: bool) -> None:
    """Set the same capabilities on all of *vmms*; underscores become dashes."""
    wanted = [{"capability": k.replace("_", "-"), "state": v} for k, v in capabilities.items()]
    for vmm in vmms:
        vmm.command("migrate-set-capabilities", capabilities=wanted)
