"""What this host offers to the tests, probed once: KVM, userfaultfd, real QEMUs, a C compiler.

A probe returns "" when the thing is there, else one sentence that says what is missing and how to get it.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path

SYS_USERFAULTFD = 323  # x86-64
UFFD_USER_MODE_ONLY = 1


@cache
def qemus() -> tuple[str, ...]:
    """The real QEMUs to test against: $QEMU_SYSTEM_X86_64, separated by colons, else the one on PATH."""
    named = os.environ.get("QEMU_SYSTEM_X86_64")
    if named is not None:
        return tuple(filter(None, named.split(":")))
    found = shutil.which("qemu-system-x86_64")
    return (found,) if found else ()


def missing_kvm() -> str:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm cannot be opened ({error.strerror}); a host with KVM and access to it is needed"
    return ""


def missing_qemu() -> str:
    if not qemus():
        return "no qemu-system-x86_64 on PATH nor in $QEMU_SYSTEM_X86_64; `apt-get install qemu-system-x86` brings it"
    for path in qemus():
        if not os.access(path, os.X_OK):
            return f"{path} is no program that can be run; $QEMU_SYSTEM_X86_64 names it"
    return ""


def missing_userfaultfd() -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | UFFD_USER_MODE_ONLY)
    if fd < 0:
        return f"userfaultfd is refused ({os.strerror(ctypes.get_errno())}); a kernel with it is needed"
    os.close(fd)
    return ""


def missing_huge_pages() -> str:
    wanted = 64 + 4  # of 2 MiB: two guests of 64 MiB, and a few that the kernel holds back
    try:
        with open("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages") as file:
            free = int(file.read())
    except OSError:
        return "this kernel has no huge pages of 2 MiB"
    return "" if free >= wanted else f"{free} huge pages of 2 MiB are free; `sysctl vm.nr_hugepages={wanted}` reserves them"


def missing_compiler() -> str:
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return "no C compiler on PATH; `apt-get install gcc` brings one"
    return ""


PROBES = {
    "kvm": missing_kvm,
    "qemu": missing_qemu,
    "userfaultfd": missing_userfaultfd,
    "huge pages": missing_huge_pages,
    "compiler": missing_compiler,
}


@cache
def missing(name: str) -> str:
    """ "" when the host has *name* (a key of PROBES), else what is missing."""
    return PROBES[name]()


def qemumig_system() -> str:
    """The command that starts our own VMM out of this tree."""
    beside = Path(sys.executable).parent / "qemumig-system"
    start = "from kvm.main import run; run()"
    return str(beside) if beside.exists() else shlex.join([sys.executable, "-c", start])
