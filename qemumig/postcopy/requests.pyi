from ..wire.stream import InputStream
from .serve import PageServer

class RequestReader:
    """Takes the page requests that come on *stream*, one return path, to *server*."""

    server: PageServer
    stream: InputStream
    def __init__(self, server: PageServer, stream: InputStream) -> None: ...
    def read(self) -> None:
        """Take page requests off the stream, until another message waits there, or its end.

        Raises StreamError for a request that is refused, ChannelError when the return path breaks, or the channel of
        urgent pages.
        """
