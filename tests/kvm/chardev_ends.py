"""What stands at both ends of a character device in tests: a front end that remembers, and clients."""

import asyncio
import contextlib
import socket

from kvm.chardev import FrontEnd
from kvm.chardev_options import from_device

PATIENCE_S = 10


class Listener:
    """A front end that remembers what it was told and lets a test wait for it."""

    def __init__(self):
        self.data = bytearray()
        self.descriptors = []
        self.connections = 0
        self.disconnections = 0
        self._change = asyncio.Event()

    def front_end(self):
        return FrontEnd(self.received, self.connected, self.disconnected)

    def received(self, data, descriptors):
        self.data += data
        self.descriptors += descriptors
        self._change.set()

    def connected(self):
        self.connections += 1
        self._change.set()

    def disconnected(self):
        self.disconnections += 1
        self._change.set()

    async def until(self, condition):
        async with asyncio.timeout(PATIENCE_S):
            while not condition(self):
                self._change.clear()
                await self._change.wait()


@contextlib.asynccontextmanager
async def running(text, label="c0"):
    """The back end of DEV *text*, open and started, with a Listener attached."""
    backend = from_device(text, label)
    listener = Listener()
    backend.attach(listener.front_end())
    backend.open()
    try:
        await backend.start()
        yield backend, listener
    finally:
        backend.close()


async def connect(path):
    client = socket.socket(socket.AF_UNIX)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, str(path))
    return client


async def read_exactly(client, count):
    loop = asyncio.get_running_loop()
    data = b""
    async with asyncio.timeout(PATIENCE_S):
        while len(data) < count:
            piece = await loop.sock_recv(client, count - len(data))
            assert piece, f"connection ended after {data!r}"
            data += piece
    return data


async def read_to_end(client):
    loop = asyncio.get_running_loop()
    data = b""
    async with asyncio.timeout(PATIENCE_S):
        while piece := await loop.sock_recv(client, 1 << 20):
            data += piece
    return data
