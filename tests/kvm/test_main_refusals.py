"""kvm.main without a life: what cannot be started says why in QEMU's words and leaves nothing behind; help."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.host import qemumig_system

from .program import BASE, GUEST, run

needs_kvm = pytest.mark.needs("kvm")


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
        (["-qmp", "none"], ["-qmp none: 'none' is not a valid char driver", "-qmp none: parse error: none"]),
        (
            ["-monitor", "unix:{d}/no/s"],
            ["-monitor unix:{d}/no/s: Failed to connect to '{d}/no/s': No such file or directory"],
        ),
        (
            ["-qtest", "unix:{d}/no/s"],
            [
                "Failed to connect to '{d}/no/s': No such file or directory",
                'Failed to initialize device for qtest: "unix:{d}/no/s"',
            ],
        ),
        (
            ["-object", "tls-creds-x509,id=t,dir={d}/no"],
            ["Unable to access credentials {d}/no/ca-cert.pem: No such file or directory"],
        ),
        (["-object", "memory-backend-ram,id=m,size=0"], ["property 'size' of memory-backend-ram doesn't take value '0'"]),
        (["-add-fd", "fd=77,set=1"], ["-add-fd fd=77,set=1: fd is not valid or already in use"]),
        (
            ["-device", "loader,file={d}/no,addr=0"],
            ["-device loader,file={d}/no,addr=0: Cannot load specified image {d}/no: No such file or directory"],
        ),
        (["-device", "ide-hd,drive=d0"], ["-device ide-hd,drive=d0: No 'IDE' bus found for device 'ide-hd'"]),
        (["-hda", "{d}/no"], ["-hda {d}/no: Could not open '{d}/no': No such file or directory"]),
        (
            ["-drive", f"file={GUEST},format=raw,if=ide"],
            [f"-drive file={GUEST},format=raw,if=ide: machine type does not support if=ide,bus=0,unit=0"],
        ),
        (
            ["-kernel", str(GUEST)],
            [f"-kernel {GUEST}: kernels are not loaded here; a firmware image is (-bios), or a boot sector (-hda)"],
        ),
        (
            ["-device", "loader,addr=0x1000,data=1,data-len=8", "-device", "loader,addr=0x1004,data=2,data-len=8"],
            ["-device loader: 0x1000 … 0x1008 and 0x1004 … 0x100c overlap"],
        ),
        (["-vga", "std"], ["-vga std: there is no display here: leave it out or say -vga none"]),
        (["-D", "{d}/no/log"], ["Error opening logfile {d}/no/log: No such file or directory"]),
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
        (
            ["-device", "loader,addr=0xffffffff,data=1,data-len=2"],
            "-device loader: 0xffffffff … 0x100000001 is not all RAM of this machine",
        ),
        (
            ["-cpu", "host,invtsc=on", "-only-migratable"],
            "disallowing migration blocker (--only-migratable) for: "
            "State blocked by non-migratable CPU device (invtsc flag)",
        ),
        (["-run-with", "user=no-such-user"], 'User "no-such-user" doesn\'t exist (and is not <uid>:<gid>)'),
        (["-run-with", "chroot={d}/no"], "chroot failed: '{d}/no': No such file or directory"),
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


@pytest.mark.parametrize(("first", "has_ssl"), [("", False), ("import ssl, asyncio; ", True)])
def test_importing_the_command_line_loads_no_tls_that_nobody_asked_for(first, has_ssl):
    code = (
        f"{first}import sys, kvm.main, asyncio.sslproto as sslproto; print('_ssl' in sys.modules, sslproto.ssl is not None)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded == f"{has_ssl} {has_ssl}\n"


def test_python_has_its_tls_for_who_asks_later():
    code = "import kvm.main, ssl; print(ssl.create_default_context().protocol.name)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "PROTOCOL_TLS_CLIENT\n"
