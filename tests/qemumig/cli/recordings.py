"""Recorded and made-up streams as files for `qemumig analyze`, and its answers as objects."""

from __future__ import annotations

import json
import struct
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import zstandard

from qemumig import cli

STREAMS = Path(__file__).parents[2] / "streams"
MICROVM = sorted(path.name.removesuffix(".mig.zst") for path in (STREAMS / "microvm").glob("*.mig.zst"))


@cache
def unpacked(name: str) -> bytes:
    """The bytes of a recording by its path below tests/streams/, without `.zst`."""
    return zstandard.ZstdDecompressor().decompressobj().decompress((STREAMS / f"{name}.zst").read_bytes())


def stored(directory: Path, data: bytes, name: str = "stream") -> str:
    """*data* in a file; returns its name."""
    path = directory / name
    path.write_bytes(data)
    return str(path)


def analyze(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command."""
    status = cli.main(["analyze", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and the object that `--json` prints."""
    status, out, _ = analyze(capsys, "--json", *arguments)
    document: dict[str, Any] = json.loads(out)
    return status, document


def full_sections(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in document["elements"] if one["type"] == "full"]


def small_stream(*records: bytes, length: int = 0x10000, name: bytes = b"pc.ram") -> bytes:
    """A stream with one RAM block, with *records* in one END section (stream.md §12)."""
    eos = struct.pack(">Q", 0x10)
    entry = bytes([len(name)]) + name + struct.pack(">Q", length)
    return b"".join(
        (
            b"QEVM\0\0\0\3\7\0\0\0\4none",
            b"\1\0\0\0\1\3ram\0\0\0\0\0\0\0\4" + struct.pack(">Q", length | 4) + entry + eos + b"\x7e\0\0\0\1",
            b"\3\0\0\0\1" + b"".join(records) + eos + b"\x7e\0\0\0\1",
            b"\0\6\0\0\0\x0f" + b'{"devices": []}',
        )
    )


def record(head: int, rest: bytes = b"", name: bytes | None = b"pc.ram") -> bytes:
    """A RAM record; *name* None: of the same block as before."""
    named = b"" if name is None else bytes([len(name)]) + name
    return struct.pack(">Q", head | (0x20 if name is None else 0)) + named + rest


class RealQemu:
    """A real QEMU with emulated CPUs, stopped, that writes its state to a file; its monitor is its standard output."""

    def __init__(self, system: str, *options: str) -> None:
        command = [system, *options, "-S", "-display", "none", "-nodefaults", "-accel", "tcg", "-qmp", "stdio"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def migrate(self, path: Path) -> None:
        """Write the stream to *path*, and end."""
        capability = [{"capability": "events", "state": True}]
        self._command("qmp_capabilities")
        self._command("migrate-set-capabilities", capabilities=capability)
        self._command("migrate", uri=f"exec:cat > {path}")
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            assert "error" not in answer, answer
            status = answer.get("data", {}).get("status")
            if answer.get("event") == "MIGRATION" and status in ("completed", "failed"):
                assert status == "completed"
                break
        self._command("quit")
        self._process.communicate(timeout=30)  # the file is whole when QEMU has waited for its child

    def _command(self, name: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End it, however it is."""
        self._process.kill()
        self._process.wait()
