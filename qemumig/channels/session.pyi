from collections.abc import Callable, Mapping
from typing import Any

from ..wire.stream import Carrier

CUT_OFF: str

class TlsSession(Carrier):
    """A TLS connection whose handshake is done, as a carrier of an InputStream and an OutputStream.

    *ssl* is the address of the library's object, which *owner* keeps alive; *functions* are addresses by name; *describe*
    turns an error code of the library into text.  The descriptors are non-blocking and belong to the caller.
    """

    def __init__(
        self,
        owner: Any,
        ssl: int,
        functions: Mapping[str, int],
        describe: Callable[[int], str],
        read_fd: int,
        write_fd: int,
        quit_fd: int,
    ) -> None: ...
    def try_read(self, target: bytearray | memoryview) -> int:
        """Read what is there into *target*, without waiting.

        Returns how many bytes; 0 at the announced end; −POLLIN or −POLLOUT when that has to be waited for first.  OSError
        when the connection is broken.
        """
    def try_write(self, source: bytes | bytearray | memoryview) -> int:
        """Write at most one record of *source*, without waiting.

        Returns how many bytes, or −POLLIN or −POLLOUT when that has to be waited for first: then call again with the
        same bytes.  OSError when the connection is broken.
        """
    def is_silent(self) -> int:
        """0 when the peer's first byte is there; else POLLIN or POLLOUT, to be waited for.

        OSError when the peer has ended the connection without a word, or broke it.
        """
    def announce_end(self) -> int:
        """Tell the peer that nothing more will be written.

        Returns 0 when that is done, or cannot be done any more; POLLOUT when it has to be waited for.
        """
