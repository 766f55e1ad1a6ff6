"""asyncio without Python's ssl, which it imports for protocols of its own that nothing here speaks.

TLS is qemumig/channels/openssl.py, which loads the library only when an object asks for it.  Python's would be 4 MiB more
in every process.  This module has to be imported first; where ssl is there already, nothing is saved and nothing is lost.
"""

import sys

if "ssl" not in sys.modules and "asyncio" not in sys.modules:
    sys.modules["ssl"] = None  # type: ignore[assignment]  # so that the import fails, as in a Python that was built without
    try:
        import asyncio  # noqa: F401
    finally:
        del sys.modules["ssl"]
