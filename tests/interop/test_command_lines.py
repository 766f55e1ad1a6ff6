"""Command lines that cannot be, told to a real QEMU and to ours: the same lines on standard error, the same exit status.

Both get the words behind a beginning that is fine for both.  What QEMU says differently from version to version is asked of
the version that says it our way.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from kvm.diagnostics import Diagnostics
from kvm.main import main

pytestmark = pytest.mark.usefixtures("no_leaks")

EMPTY = ("-M", "none", "-nodefaults", "-display", "none", "-S")
MICROVM = ("-M", "microvm", "-accel", "kvm", "-cpu", "qemu64,pni=off", "-bios", "{image}", *EMPTY[2:])
PATIENCE_S = 20

LINES = [  # words behind EMPTY
    "-nosuch",
    "--nosuch",
    "-m",
    "-m 16M,foo=1",
    "-m 16M,slots=2",
    "-m 16X",
    "-accel foo",
    "-accel kvm,foo=1",
    "-accel kvm -M none,accel=kvm",
    "-accel kvm -enable-kvm",
    "-accel kvm,dirty-ring-size=x",
    "-accel kvm,dirty-ring-size=3",
    "-smp x",
    "-smp foo=1",
    "-uuid xyz",
    "-name hugo,foo=1",
    "-name hugo,debug-threads=maybe",
    "-serial foo",
    "-monitor foo",
    "-monitor unix:{d}/no/s",
    "-qmp foo",
    "-qmp none",
    "-qtest foo",
    "-qtest none",
    "-qtest unix:{d}/no/s",
    "-mon c0",
    "-mon mode=control",
    "-mon c0,mode=foo",
    "-mon c0,foo=1",
    "-chardev null,id=c0 -mon c0,pretty=on",
    "-chardev foo,id=c0",
    "-chardev null",
    "-chardev null,id=c0 -chardev null,id=c0",
    "-chardev file,id=c0",
    "-chardev socket,id=c0,foo=1",
    "-object authz-list",
    "-object authz-list,id=a,foo=1",
    "-object authz-list,id=a,policy=foo",
    "-object foo,id=a",
    "-object authz-simple,id=a",
    "-object authz-simple,id=1a,identity=x",
    "-object authz-simple,id=a,identity=x -object authz-simple,id=a,identity=x",
    '-object \'{"qom-type":"authz-simple","id":"a"}\'',
    '-object \'{"qom-type":"authz-simple","id":"a","identity":5}\'',
    '-object \'{"qom-type":"authz-simple","id":"a","identity":"x","foo":1}\'',
    "-object memory-backend-ram,id=m",
    "-object memory-backend-ram,id=m,size=x",
    "-object memory-backend-ram,id=m,size=0",
    "-object memory-backend-ram,id=m,size=1M,share=maybe",
    "-object tls-creds-x509,id=t,dir={d}/no",
    "-object tls-creds-x509,id=t,dir={d},endpoint=foo",
    "-object tls-creds-psk,id=t,dir={d}/no",
    "-incoming unix:{d}/no/s",
    "-incoming defer -loadvm x",
    "-loadvm x",
    "-action foo=x",
    "-action panic=foo",
    "-action watchdog=foo",
    "-msg foo=on",
    "-msg guest-name=on,timestamp=off -name hugo -accel foo",
    "-global migration.foo=1",
    "-global migration.multifd-channels=300",
    "-add-fd fd=-1,set=1",
    "-add-fd fd=1,set=1",
    "-add-fd fd=77,set=1",
    "-add-fd foo=7",
    "-pidfile {d}/no/p",
    "-device nosuch",
    "-device foo=1",
    "-boot order=z",
    "-boot foo=z",
    "-overcommit foo=1",
    "-display foo",
    "-vga foo",
    "-hda {d}/no",
    "{d}/no.img",
    "-drive file={d}/no,if=none,id=d0,format=raw",
    "-drive file={image},if=foo,id=d0,format=raw",
    "-drive file={image},if=none,id=d0,format=foo",
    "-device loader",
    "-device loader,addr=0",
    "-device loader,addr=0,data=5",
    "-device loader,addr=0,data=5,data-len=9",
    "-device loader,file={image},data=5",
    "-device loader,cpu-num=5",
]
SINCE_10 = [
    "-incoming foo",
    "-incoming main",
    "-incoming main,addr.transport=socket",
    "-incoming main,addr.transport=socket,addr.type=unix",
    "-incoming main,addr.transport=foo",
    "-incoming main,addr.transport=socket,addr.type=unix,addr.path={d}/no/s",
    '-incoming \'{"channel-type":"main"}\'',
    "-m -1",
    "-machine foo",
    "-smp 0",
    "-smp 2",
    "-run-with foo=1",
    "-run-with async-teardown=maybe",
    "-audio foo",
]
ONLY_10 = ["-object {", "-incoming {"]  # 11 says where
OF_MICROVM = [
    "-M foo=1",
    "-cpu foo",
    "-cpu qemu64,foo=on",
    "-object memory-backend-ram,id=m,size=8M -M memory-backend=m -m 16M",
    "-M memory-backend=nope",
    "-device virtio-blk-device",
    "-device virtio-blk-device,drive=nope",
    "-device virtio-blk-device,foo=1",
    "-device ide-hd",
    "-bios {d}/no",
    "-kernel {d}/no",
]


@cache
def version(qemu: str) -> int:
    """The major version."""
    said = subprocess.run([qemu, "-version"], capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout
    found = re.search(r"version ([0-9]+)\.", said)
    assert found is not None
    return int(found[1])


@pytest.fixture
def interval() -> Iterator[None]:
    """Running the program in this process changes this for the process."""
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


def words(beginning: tuple[str, ...], line: str, directory: Path) -> list[str]:
    """Both, with the places of {d} and {image} filled in."""
    image = directory / "image"
    image.write_bytes(bytes(65536))

    def fill(word: str) -> str:
        return word.replace("{d}", str(directory)).replace("{image}", str(image))

    return [fill(word) for word in (*beginning, *shlex.split(line))]


def lines_for(qemu: str) -> list[tuple[tuple[str, ...], str]]:
    """What this QEMU says our way: the beginning and the words behind it."""
    newer = (SINCE_10 if version(qemu) >= 10 else []) + (ONLY_10 if version(qemu) == 10 else [])
    return [*((EMPTY, line) for line in LINES + newer), *((MICROVM, line) for line in OF_MICROVM)]


def test_mistakes_are_told_as_qemu_tells_them(
    qemu: str, directory: Path, capfd: pytest.CaptureFixture[str], interval: None
) -> None:
    """All in one test, for the sake of one process: ours is this one."""
    differences = []
    for beginning, line in lines_for(qemu):
        argv = words(beginning, line, directory)
        theirs = subprocess.run(
            [qemu, *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        capfd.readouterr()
        status = main(argv)
        ours = capfd.readouterr().err
        expected = theirs.returncode, without_name(theirs.stderr, Path(qemu).name)
        if (status, without_name(ours, Diagnostics().program)) != expected:
            differences.append((line, (status, ours), expected))
    assert differences == []


def without_name(text: str, program: str) -> str:
    """*text* without the program's name where lines begin with it, the guest's name before it or not.

    What 11 advises in the place of -mon, which goes on to work, is left out.
    """
    text = re.sub(r"(?m)^.*: warning: '-mon' is deprecated, .*\n", "", text)
    return re.sub(rf"(?m)^(hugo )?({re.escape(program)}|qemu-system-x86_64):", r"\1PROG:", text)
