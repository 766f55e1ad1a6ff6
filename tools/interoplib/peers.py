"""The two ends of a migration: qemumig and real QEMUs, and what their versions have and ask for.

Everything that depends on a version is in SINCE and RULES, and nowhere else.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from qemumig.cli.demo import default_system
from qemumig.cli.vmm import VmmError

OURS = "qemumig"

Version = tuple[int, ...]

SINCE: dict[str, Version] = {"file": (8, 2)}  # transport: the first QEMU that has it; the others are older than 7.2


@dataclass(frozen=True)
class Peer:
    """One VMM: how it is started, and the version of a real QEMU (None: qemumig)."""

    name: str
    command: str
    version: Version | None = None

    def has(self, transport: str) -> bool:
        """Whether this VMM knows the transport at all."""
        return self.version is None or self.version >= SINCE.get(transport, ())

    def is_since(self, major: int, minor: int = 0) -> bool:
        """A real QEMU of this version or a later one."""
        return self.version is not None and self.version >= (major, minor)

    def is_before(self, major: int, minor: int = 0) -> bool:
        """A real QEMU older than this version."""
        return self.version is not None and self.version < (major, minor)


@dataclass(frozen=True)
class Options:
    """What a pair of versions needs on the command line of either end."""

    source: str = ""
    destination: str = ""


def options(source: Peer, destination: Peer) -> Options:
    """The options that a user has to add for this pair (machine.md §1)."""
    if source.is_since(10) and destination.is_before(10):
        return Options(source="-global migration.send-switchover-start=off")  # a command it does not know
    return Options()


def ours(command: str | None = None) -> Peer:
    """qemumig-system; *command* instead of the one that belongs to this Python."""
    return Peer(OURS, command or default_system())


def real(command: str) -> Peer:
    """A QEMU, asked for its version; VmmError when it has none to tell."""
    try:
        told = subprocess.run([*shlex.split(command), "-version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise VmmError(f"{command} does not tell its version: {error}") from error
    found = re.search(r"version (\d+(?:\.\d+)+)", told.stdout)
    if found is None:
        raise VmmError(f"{command} says {told.stdout[:80]!r} for its version, expected 'version' and a number")
    return Peer(found[1], command, tuple(int(part) for part in found[1].split(".")))


def named_qemus(commands: Sequence[str] | None) -> list[Peer]:
    """The QEMUs of the command line, else of $QEMU_SYSTEM_X86_64, else the one on PATH; VmmError without any."""
    found = list(commands or filter(None, os.environ.get("QEMU_SYSTEM_X86_64", "").split(":")))
    if not found and (on_path := shutil.which("qemu-system-x86_64")):
        found = [on_path]
    if not found:
        raise VmmError("there is no real QEMU: --qemu or $QEMU_SYSTEM_X86_64 names one, or it is on PATH")
    return [real(command) for command in found]
