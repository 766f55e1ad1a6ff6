from typing import Any

class Carrier:
    """What a channel's bytes go through when its descriptors do not carry them as they are; compiled rooms make them."""

class OutputStream:
    """Bytes towards *channel*: an object with `write_fd`, `quit_fd` (an eventfd), `kind` and `name`.

    Writing raises ChannelError when the channel breaks and MigrationCancelled when it was told to quit.
    """

    channel: Any
    offset: int
    """Bytes put so far, the pending ones included."""
    def __init__(self, channel: Any) -> None: ...
    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Put *data* behind what is pending; it leaves with the next flush, or when the buffer is full."""
    def flush(self) -> None:
        """Hand everything that is pending to the kernel."""
    def file_position(self) -> int:
        """Where in the file the next byte goes; flushes.  ChannelError when the channel cannot be sought."""
    def go_to(self, position: int) -> None:
        """Let the next byte go to *position* of the file; what is passed over counts as nothing put."""
    def accepted_bytes(self) -> int:
        """Bytes that the kernel has taken."""
    def pending_bytes(self) -> int:
        """Bytes that were put and that the kernel has not taken, as after a flush that failed."""
    def write_u8(self, value: int) -> None: ...
    def write_be16(self, value: int) -> None: ...
    def write_be32(self, value: int) -> None: ...
    def write_be64(self, value: int) -> None: ...

class InputStream:
    """Bytes from *channel*: an object with `read_fd`, `quit_fd` (an eventfd), `kind` and `name`.

    Reading raises StreamError when the stream ends inside what is read, ChannelError when the channel breaks and
    MigrationCancelled when it was told to quit; *what* names the place in the message.

    *eager*: what comes next is on its way already, so reading is tried again for a moment before going to sleep.
    """

    channel: Any
    def __init__(self, channel: Any, *, eager: bool = True) -> None: ...
    @property
    def offset(self) -> int:
        """Bytes consumed so far."""
    def file_position(self) -> int:
        """Where in the file the next byte lies.  ChannelError when the channel cannot be sought."""
    def go_to(self, position: int) -> None:
        """Go on at *position* of the file; what is passed over counts as consumed."""
    def read(self, length: int, what: str = "a field") -> bytes:
        """Exactly *length* bytes."""
    def fill(self, target: bytearray | memoryview, what: str = "a field") -> None:
        """As many bytes as *target* has, straight into it."""
    def give_back(self, data: bytes) -> None:
        """Let *data*, which somebody has read from the channel before the stream was made, come first."""
    def peek(self, length: int) -> bytes:
        """Up to *length* bytes (at most 4096) without consuming them; fewer only at the end of the stream."""
    def read_u8(self, what: str = "a field") -> int: ...
    def read_be16(self, what: str = "a field") -> int: ...
    def read_be32(self, what: str = "a field") -> int: ...
    def read_be64(self, what: str = "a field") -> int: ...
