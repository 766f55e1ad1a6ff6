from ..wire.stream import OutputStream

class Splice:
    """Sends memory over the channel of *out*, a socket of TCP or Unix; its errors are those of *out*.

    ChannelError when there is no pipe to be had.
    """

    def __init__(self, out: OutputStream) -> None: ...
    def send_pages(self, header: bytes, memory: bytearray | memoryview) -> None:
        """Send *header*, at most a page, and *memory*, which may be read until the other end has taken it.

        ChannelError when the connection breaks, MigrationCancelled when told to quit.
        """
    def close(self) -> None:
        """Give the pipe back, and what is left in it."""
