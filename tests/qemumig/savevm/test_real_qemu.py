"""A real QEMU, with emulated CPUs, as the judge of layouts that no recording shows.

Records in which every number is different go to a stopped QEMU, which then migrates to a file: what it wrote must
load as the same records, and its description must be ours.  KVM is not needed: an emulated CPU keeps what it is
given, also registers that the host does not have.
"""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qemumig.savevm import sections, vmdesc
from qemumig.savevm.devices.apic import APIC, ApicSipi, ApicState
from qemumig.savevm.devices.cpu import CPU
from qemumig.savevm.devices.cpu_common import CPU_COMMON, CpuCommonState
from qemumig.savevm.devices.cpu_state import CpuState
from qemumig.savevm.devices.fw_cfg import FW_CFG, FwCfgState
from qemumig.savevm.devices.serial import SERIAL, Fifo8, Poll, SerialState, Transmitter, Uart
from qemumig.savevm.devices.timer import TIMER, Icount, IcountShift, IcountTimers, IcountWarp, TimerState
from qemumig.savevm.reader import BytesReader
from qemumig.savevm.sections import Configuration, SectionHeader
from qemumig.savevm.vmstate import VMState
from qemumig.wire.format import SectionType
from tests.qemumig.savevm.devices.test_cpu import SUBSECTIONS, filled
from tests.support import host

pytestmark = pytest.mark.needs("qemu")

PATIENCE_S = 30
BIOS = Path(__file__).parents[2] / "guests" / "tinyguest.bin"
MACHINE = "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=off"
FAR_AWAY_NS = 1 << 62

# what QEMU sends only for CPU models that have the feature, or in states a stopped CPU is not in
CONDITIONAL = {
    *("error_code", "exception_info", "amd_tsc_scale_msr", "mcg_ext_ctl", "svn_npt", "nested_state", "msr_tsx_ctrl"),
    *("intel_sgx", "msr_xfd", "msr_hwcr", "intel_amx_xtile", "fred", "arch_lbr", "msr_hyperv_runtime"),
}


class Monitor:
    """A QMP connection that waits for events, never for time."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rw", encoding="utf-8")
        self._file.readline()
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: Any) -> None:
        self._file.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self._file.flush()
        while "return" not in (reply := self._read()):
            assert "error" not in reply, reply

    def await_migration(self) -> None:
        """Until a migration, in either direction, has completed."""
        while (event := self._read()).get("data", {}).get("status") != "completed":
            assert event.get("data", {}).get("status") != "failed", event

    def _read(self) -> dict[str, Any]:
        line = self._file.readline()
        assert line, "QEMU has gone"
        return json.loads(line)


@contextmanager
def _qemu(system: str, directory: Path, *extra: str) -> Iterator[Monitor]:
    """A stopped machine that waits for a migration."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "qmp"))
    listener.listen()
    listener.settimeout(PATIENCE_S)
    command = f"-M {MACHINE} -accel tcg -cpu qemu64 -m 32M -nodefaults -no-user-config -display none -serial null -S"
    command += f" -bios {shlex.quote(str(BIOS))} -incoming defer -qmp unix:{directory / 'qmp'}"
    log = (directory / "log").open("wb")
    process = subprocess.Popen([system, *shlex.split(command), *extra], stdout=log, stderr=log)
    try:
        connection, _ = listener.accept()
        connection.settimeout(PATIENCE_S)
        yield Monitor(connection)
    finally:
        process.kill()
        process.wait()
        listener.close()
        log.close()


def _stream(vmstate: VMState, record: Any) -> bytes:
    """The shortest stream that carries *record*."""
    header = SectionHeader(SectionType.QEMU_VM_SECTION_FULL, 9, vmstate.name, 0, vmstate.version_id)
    parts = (
        sections.encode_file_header(),
        sections.encode_configuration(Configuration.of("microvm"))[0],
        sections.encode_section_header(header),
        vmstate.save(record)[0],
        sections.encode_section_footer(9),
        bytes([SectionType.QEMU_VM_EOF]),
        sections.encode_vmdescription(b"{}"),
    )
    return b"".join(parts)


def _through_qemu(system: str, directory: Path, vmstate: VMState, record: Any, *extra: str) -> tuple[Any, Any]:
    """The record as *system* sends it on, and how it describes it."""
    (directory / "in").write_bytes(_stream(vmstate, record))
    with _qemu(system, directory, *extra) as monitor:
        capability = [{"capability": "events", "state": True}]
        monitor.command("migrate-set-capabilities", capabilities=capability)
        monitor.command("migrate-incoming", uri=f"exec:cat {directory / 'in'}")
        monitor.await_migration()
        return _find_section(_outgoing_stream(monitor, directory / "out"), vmstate)


def _outgoing_stream(monitor: Monitor, path: Path) -> bytes:
    """Everything that QEMU sends when it is told to migrate."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(PATIENCE_S)
        monitor.command("migrate", uri=f"unix:{path}")
        connection, _ = listener.accept()
    with connection:
        connection.settimeout(PATIENCE_S)
        return b"".join(iter(lambda: connection.recv(1 << 20), b""))


def _find_section(data: bytes, vmstate: VMState) -> tuple[Any, Any]:
    """The first section of that name, found by its header, and its description, found at the end."""
    name = vmstate.name.encode()
    identity = bytes([len(name)]) + name + bytes(4) + vmstate.version_id.to_bytes(4, "big")
    place = data.index(identity)
    reader = BytesReader(data)
    reader.read(place - 4)
    header = sections.read_section_header(reader, SectionType.QEMU_VM_SECTION_FULL)
    record = vmstate.load(reader, header.version_id)
    sections.read_section_footer(reader, header.section_id, header.idstr)
    (device,) = (one for one in _description(data)["devices"] if (one["name"], one["instance_id"]) == (vmstate.name, 0))
    return record, device


def _description(data: bytes) -> Any:
    """The description: it ends the stream, so its length tells where it begins."""
    start = next(
        at
        for at in range(len(data))
        if data[at] == 6 and int.from_bytes(data[at + 1 : at + 5], "big") == len(data) - at - 5
    )
    return vmdesc.parse(data[start + 5 :])


def _uart() -> Uart:
    fifos = {"recv_fifo": Fifo8.holding(b"abc"), "xmit_fifo": Fifo8(b"0123456789abcdef", 15, 2)}
    timers = {"fifo_timeout_timer": FAR_AWAY_NS, "poll": Poll(1, FAR_AWAY_NS + 1)}
    return Uart(
        lsr=0x20, ier=2, iir=0xC1, fcr=1, thr_ipending=1, tsr=Transmitter(1, 2, 3), timeout_ipending=1, **fifos, **timers
    )


CASES = {
    "serial": (SERIAL, SerialState(_uart()), ()),
    "timer": (
        TIMER,
        TimerState(
            1,
            2,
            Icount(5, 6, IcountWarp(7, FAR_AWAY_NS), IcountTimers(FAR_AWAY_NS, FAR_AWAY_NS), IcountShift(3, 9)),
        ),
        ("-icount", "shift=auto"),
    ),
    "apic": (APIC, ApicState(apic_sipi=ApicSipi(3, 1)), ()),
    "cpu_common": (CPU_COMMON, CpuCommonState(1, 0, 3, True), ()),
    "fw_cfg": (FW_CFG, FwCfgState(1, 2, 3), ()),
    "cpu": (
        CPU,
        CpuState(v_tpr=2, **{attr: filled(attr) for attr in SUBSECTIONS if attr not in CONDITIONAL}),  # 2: svm_guest's
        (),
    ),
}


@pytest.mark.parametrize("system", host.qemus() or ("",), ids=lambda name: Path(name).name)
@pytest.mark.parametrize("name", CASES)
def test_a_real_qemu_describes_what_we_sent_as_we_do(name: str, system: str, directory: Path) -> None:
    vmstate, record, extra = CASES[name]
    received, described = _through_qemu(system, directory, vmstate, record, *extra)
    ours = vmdesc.device(vmstate.name, 0, vmstate.save(record)[1])
    assert described == json.loads(json.dumps(ours))
    assert received == record
