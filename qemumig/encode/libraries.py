"""The system's compression libraries: their functions, by address, for engines that call them without the GIL.

Both are stable interfaces that nearly every Linux has for its package manager's sake, so nothing has to be built against
their headers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from ..errors import OptionError


@dataclass(frozen=True)
class Library:
    """A library: what `multifd-compression` calls it, the file's name, the package that has it, what is needed of it."""

    method: str
    soname: str
    package: str
    functions: tuple[str, ...]


ZLIB = Library(
    "zlib",
    "libz.so.1",
    "zlib1g",
    (
        *("deflateInit_", "deflateParams", "deflate", "deflateReset", "deflateEnd"),
        *("inflateInit_", "inflate", "inflateEnd"),
    ),
)
ZSTD = Library(
    "zstd",
    "libzstd.so.1",
    "libzstd1",
    (
        *("ZSTD_createCCtx", "ZSTD_freeCCtx", "ZSTD_CCtx_setParameter", "ZSTD_compressStream2", "ZSTD_compress2"),
        *("ZSTD_createDCtx", "ZSTD_freeDCtx", "ZSTD_decompressStream", "ZSTD_isError", "ZSTD_getErrorName"),
    ),
)


@cache
def functions_of(library: Library) -> Mapping[str, int]:
    """The addresses of the functions of *library*, which stays loaded; OptionError when it is missing."""
    try:
        loaded = ctypes.CDLL(library.soname)
        found = {name: ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value or 0 for name in library.functions}
    except (OSError, AttributeError) as error:
        text = (
            f"multifd-compression {library.method} needs {library.soname} ({error}); "
            f"on Debian: apt-get install {library.package}"
        )
        raise OptionError(text, name="multifd-compression", value=library.method) from error
    return found
