from typing import Any

class ZeroCopy:
    """Sends memory over *channel* without a copy: an object with `write_fd`, `quit_fd`, `kind` and `name`.

    ChannelError when that cannot be done: another kind of descriptor than a socket, or of a family that has no such thing.
    """

    missed: int
    """Flushes before which the kernel had copied everything."""
    def __init__(self, channel: Any) -> None: ...
    def send_pages(self, memory: bytearray | memoryview) -> None:
        """Send *memory*; it may be read until the next flush."""
    def wait_sent(self) -> None:
        """Wait until the network reads nothing any more of what was sent."""
