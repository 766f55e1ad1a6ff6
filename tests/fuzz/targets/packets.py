"""Channels of multifd: who has come, their packets and the pages behind them, the sync points (multifd.md §2–§7).

    input    choices · piece · { length be16 · bytes of one connection }, folded

The connections come in this order, with all they have to say.  The main channel asks for as many sync points as are chosen.
With one channel, what was taken must be what a plain reader makes of its packets.
"""

from __future__ import annotations

import contextlib
import io
import random
import socket
import struct
import zlib
from collections.abc import Iterator, Mapping

import zstandard

from qemumig.channels.channel import Channel, QuitEvent, SocketChannel
from qemumig.errors import MigrationCancelled, StreamError
from qemumig.multifd.arrivals import MAIN, NO_UUID, Arrivals
from qemumig.multifd.methods import METHODS
from qemumig.multifd.packet import encode_header, encode_init
from qemumig.multifd.receivers import Receivers
from qemumig.options import MigrationOptions
from qemumig.ram.landing import Landing
from tests.fuzz.delivery import ROOM, piece_length, send
from tests.fuzz.folding import fold, taken_apart
from tests.fuzz.oracle import PAGE, REFUSED, TAKEN, Guarded, outcome_of

PAGES = 16
RAM = Guarded(PAGES)
METHOD_NAMES = ("none", "zlib", "zstd", "none")  # by the two lowest bits of the choices
TWO_CHANNELS, FILLED = 4, 8
HEADER_SIZE, INIT_SIZE = 1344, 64
SYNC, METHOD_FLAGS = 1, {"none": 0, "zlib": 2, "zstd": 4}
MOST_CONNECTIONS = 4


class Ready:
    """Stands in for a listener: all who will ever connect have done so."""

    takes_more = True

    def __init__(self, connections: list[Channel]) -> None:
        self._connections = connections

    @property
    def receives(self) -> bool:
        return bool(self._connections)

    def expect(self, count: int) -> None: ...

    def accept_among(self, events: Mapping[int, int], timeout_ms: int | None) -> Channel | None:
        if self._connections:
            return self._connections.pop(0)
        if timeout_ms == 0:
            return None
        raise MigrationCancelled("nobody else comes")

    def close(self) -> None:
        for connection in self._connections:
            connection.close()


def run(data: bytes) -> str:
    (choices, piece), wire = taken_apart(data, 2, ROOM)
    method, count = METHOD_NAMES[choices & 3], 2 if choices & TWO_CHANNELS else 1
    options = MigrationOptions()
    options.set_capabilities([("multifd", True)])
    options.set_parameters({"multifd-channels": count, "multifd-compression": method})
    filled = 0x5A if choices & FILLED else 0
    landing = Landing([RAM.block("ram", filled=filled)])
    said = split(wire)
    event = QuitEvent()
    ready = Ready([connection(one, piece_length(piece), event.fd) for one in said])
    arrivals = Arrivals(ready, options, None)  # type: ignore[arg-type]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # where it says whom it drops
            outcome = load(arrivals, landing, options, event, syncs=choices >> 4)
    finally:
        arrivals.close()
        if arrivals.main is not None:
            arrivals.main.close()
        ready.close()
        event.close()
    RAM.check()
    if outcome == TAKEN and count == 1:
        compare(said, method, filled, max(choices >> 4, 1))
    return outcome


def split(wire: bytes) -> list[bytes]:
    """What each connection says."""
    said, at = [], 0
    while at < len(wire) and len(said) < MOST_CONNECTIONS:
        length = int.from_bytes(wire[at : at + 2], "big")
        said.append(wire[at + 2 : at + 2 + length])
        at += 2 + length
    return said


def connection(said: bytes, piece: int, quit_fd: int) -> Channel:
    near, far = socket.socketpair()
    near.settimeout(1.0)
    with near:
        send(near, said, piece, quit_fd)
    return SocketChannel("fuzz", far, quit_fd)


def load(arrivals: Arrivals, landing: Landing, options: MigrationOptions, event: QuitEvent, syncs: int) -> str:
    try:
        arrivals.gather()
    except (StreamError, MigrationCancelled):  # one who does not belong here, or one whom it waits for does not come
        return REFUSED
    receivers = Receivers(arrivals.channels, landing, options, event.fd, lambda: None)

    def receive() -> None:
        for _ in range(syncs):
            receivers.flush()
        receivers.end_section()
        receivers.complete()

    try:
        return outcome_of(receive)
    finally:
        event.set()
        receivers.stop()


def compare(said: list[bytes], method: str, filled: int, syncs: int) -> None:
    """Fault when memory is not what the packets of the only channel say, up to the last sync of the main channel."""
    packets = next(one[INIT_SIZE:] for one in said if one[:4] == encode_init(NO_UUID, 0)[:4])
    memory, at = bytearray([filled]) * RAM.size, 0
    unpack = {"zlib": zlib.decompressobj, "zstd": lambda: zstandard.ZstdDecompressor().decompressobj()}.get(method)
    stream = unpack() if unpack is not None else None
    while at + HEADER_SIZE <= len(packets) and syncs:
        _, _, flags, _, normal, size, _, zero = struct.unpack_from(">6IQI", packets, at)
        offsets = struct.unpack_from(f">{normal + zero}Q", packets, at + 320)
        at += HEADER_SIZE
        syncs -= flags & SYNC
        if normal == 0:
            size = 0
        elif stream is None:
            size = normal * PAGE
        data = packets[at : at + size]
        pages = stream.decompress(data) if stream is not None and data else data
        at += size
        for offset in offsets[normal:]:
            memory[offset : offset + PAGE] = bytes(PAGE)
        for index, offset in enumerate(offsets[:normal]):
            memory[offset : offset + PAGE] = pages[index * PAGE : (index + 1) * PAGE]
    RAM.compare(memory, "ram")


# ---- to begin with ----


def joined(*said: bytes) -> bytes:
    return b"".join(len(one).to_bytes(2, "big") + one for one in said)


def packet(
    method: str, compressor: object, pages: dict[int, bytes], zero: tuple[int, ...] = (), *, sync: bool = False
) -> bytes:
    data = b"".join(pages.values())
    if compressor is not None and data:
        data = compressor.feed(data)  # type: ignore[attr-defined]
    flags = (METHOD_FLAGS[method] if pages or zero else 0) | (SYNC if sync else 0)
    offsets = {"normal": [page * PAGE for page in pages], "zero": [page * PAGE for page in zero]}
    return encode_header(flags=flags, data_size=len(data) if pages else 0, name=b"ram", **offsets) + data


class Stream:
    """One compressed stream, packet by packet."""

    def __init__(self, method: str) -> None:
        self._compressor = METHODS[method].compressor(1)

    def feed(self, data: bytes) -> bytes:
        return self._compressor.compress(data)


def channel(number: int, method: str, chance: random.Random) -> bytes:
    compressor = Stream(method) if method != "none" else None
    said = encode_init(NO_UUID, number)
    for _ in range(2):
        chosen = chance.sample(range(PAGES), 5)
        pages = {page: bytes([page + 1]) * PAGE for page in chosen[:3]}
        said += packet(method, compressor, pages, tuple(chosen[3:]), sync=chance.random() < 0.3)
    return said + packet(method, compressor, {}, sync=True)


def seeds() -> Iterator[bytes]:
    for seed in range(48):
        chance = random.Random(seed)
        choices = seed % 16 | chance.randrange(1, 4) << 4
        method = METHOD_NAMES[choices & 3]
        numbers = (0, 1) if choices & TWO_CHANNELS else (0,)
        said = [MAIN, *(channel(number, method, chance) for number in numbers)]
        chance.shuffle(said)
        yield bytes([choices, seed % 12]) + fold(joined(*said))
    yield b"\x10\0" + fold(joined(MAIN, encode_init(NO_UUID, 0) + encode_header(flags=1, slots=0)))
    yield b"\x10\0" + fold(joined(MAIN, b"GET / HTTP/1.1", b"", encode_init(bytes(15) + b"\1", 0)))
    for offset in ((PAGES - 1) * PAGE, PAGES * PAGE, PAGE + 1, (1 << 64) - PAGE):
        for pages in ({"normal": [offset]}, {"zero": [offset]}):
            data = b"x" * PAGE if "normal" in pages else b""
            said_by_one = (
                encode_header(data_size=len(data), name=b"ram", **pages) + data + encode_header(flags=SYNC, slots=0)
            )
            yield b"\x10\0" + fold(joined(MAIN, encode_init(NO_UUID, 0) + said_by_one))
