"""The extensions once more, for fuzzing: followed by libFuzzer, watched by the sanitizers, in a copy below .venv/.

    .venv/fuzz/qemumig/      the copy, its extensions beside their sources
    .venv/fuzz/build/        C files and objects
    .venv/fuzz/found/T/      all inputs that ever reached something new in target T
    .venv/fuzz/faults/T/     those that ended a run

The checkout itself stays as it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACE = ROOT / ".venv" / "fuzz"
SANITIZE = "fuzzer-no-link,address,undefined"
SOURCES = {".pyx", ".pxd"}


def build() -> None:
    """Bring the copy up to date; SystemExit with what is missing when that is not possible."""
    if shutil.which("clang") is None:
        raise SystemExit("no clang on PATH; on Debian: apt-get install clang libclang-rt-14-dev")
    for source in sorted((ROOT / "qemumig").rglob("*")):
        if source.is_file() and source.suffix != ".so" and "__pycache__" not in source.parts:
            target = PLACE / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    stamp = PLACE / "stamp"
    wanted = fingerprint()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print("building the extensions with coverage and sanitizers: this takes minutes", flush=True)
    shutil.copy2(ROOT / "setup.py", PLACE)
    environment = os.environ | {
        "CC": os.environ.get("CC", "clang"),
        "LDSHARED": "clang -shared",
        "QEMUMIG_SANITIZE": SANITIZE,
        "QEMUMIG_BUILD": "build",
    }
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--parallel", str(os.cpu_count() or 1)]
    done = subprocess.run(command, cwd=PLACE, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the build has failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    stamp.write_text(wanted)


def fingerprint() -> str:
    """What the extensions are made from."""
    digest = hashlib.sha256(SANITIZE.encode() + sys.version.encode())
    for source in sorted((ROOT / "qemumig").rglob("*")):
        if source.suffix in SOURCES:
            digest.update(source.read_bytes())
    digest.update((ROOT / "setup.py").read_bytes())
    return digest.hexdigest()


def environment() -> dict[str, str]:
    """What a process needs to run what was built."""
    try:
        import atheris
    except ImportError as error:
        raise SystemExit("atheris is not installed: pip install '.[fuzz]'") from error
    return os.environ | {
        "LD_PRELOAD": str(Path(atheris.path()) / "asan_with_fuzzer.so"),
        # CPython leaves much behind when it ends; its own objects come from malloc, so that what is read past them shows
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=32",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": f"{PLACE}:{ROOT}",
    }
