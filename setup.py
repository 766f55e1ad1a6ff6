"""Build: every .pyx under qemumig/ becomes one extension module; all else is in pyproject.toml.

    QEMUMIG_DEBUG=1                     bounds and overflow checks on, `if DEBUG:` truths compiled in, no optimisation
    QEMUMIG_SANITIZE=address,undefined  the C compiler's own checks compiled in (-fsanitize=…).  What is built so runs with
                                        LD_PRELOAD="$(gcc -print-file-name=libasan.so)" and
                                        ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1

Compiler directives live here and not on top of files, so that one switch reaches every room.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("QEMUMIG_DEBUG", "") not in ("", "0")
SANITIZE = os.environ.get("QEMUMIG_SANITIZE", "")

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": False,
    "cdivision": not DEBUG,
    "initializedcheck": DEBUG,
    "overflowcheck": DEBUG,
    "embedsignature": True,
}


def flags() -> list[str]:
    """How to compile."""
    if SANITIZE:
        return ["-O1", "-g", f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    return ["-O0", "-g"] if DEBUG else ["-O3", "-g0", "-fno-plt"]


def extension(path: Path) -> Extension:
    return Extension(
        ".".join(path.with_suffix("").parts),
        [str(path)],
        define_macros=[("QEMUMIG_DEBUG", "1" if DEBUG else "0"), ("_GNU_SOURCE", "1")],
        extra_compile_args=flags(),
        extra_link_args=[f"-fsanitize={SANITIZE}"] if SANITIZE else [],
    )


# What is made on the way goes into .venv/, which ignores itself: the top of the tree stays clean.
BUILD = Path(os.environ.get("QEMUMIG_BUILD", ".venv/build"))
BUILD.mkdir(parents=True, exist_ok=True)
if BUILD.parts[0] == ".venv":
    Path(".venv/.gitignore").write_text("*\n")

sources = sorted(Path("qemumig").rglob("*.pyx"))
setup(
    ext_modules=cythonize(
        [extension(path) for path in sources],
        compiler_directives=DIRECTIVES,
        build_dir=str(BUILD),
        nthreads=os.cpu_count() or 1,
        force=DEBUG or bool(SANITIZE),
    ),
    options={"build": {"build_base": str(BUILD)}, "egg_info": {"egg_base": str(BUILD)}},
)
