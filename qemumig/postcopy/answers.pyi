from typing import Any

class Answers:
    """The return path towards *channel*, for several writers; without one until `attach`."""

    requests: int
    """Page requests sent."""
    def __init__(self, channel: Any = None) -> None: ...
    @property
    def is_open(self) -> bool:
        """Whether there is a connection to write to."""
    def attach(self, channel: Any) -> None:
        """Write to *channel* from now on."""
    def detach(self) -> None:
        """Write nowhere; whoever is in the middle of a write has been woken by the end of the channel."""
    def send(self, message: bytes | bytearray | memoryview) -> None:
        """Write one message, or several; ChannelError when that is not possible."""
