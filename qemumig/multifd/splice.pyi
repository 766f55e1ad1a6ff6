from typing import Any

class Splice:
    """Sends memory over *channel*: an object with `write_fd`, a socket of TCP or Unix, `quit_fd`, `kind` and `name`.

    ChannelError when there is no pipe to be had.
    """

    def __init__(self, channel: Any) -> None: ...
    def send_pages(self, header: bytes, memory: bytearray | memoryview) -> None:
        """Send *header*, at most a page, and *memory*, which may be read until the other end has taken it."""
    def close(self) -> None:
        """Give the pipe back, and what is left in it."""
