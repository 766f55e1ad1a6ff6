"""The return path as the source reads it: page requests, bitmaps, pongs, SHUT (stream.md §10, postcopy.md §1, §2).

    input    choices · piece · messages, folded

TAKEN is what ends with SHUT 0.  Whatever is asked for, each page leaves exactly once, with its contents.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator

from qemumig.errors import MigrationError, StreamError
from qemumig.postcopy.requests import RequestReader
from qemumig.postcopy.serve import PageServer
from qemumig.ram.dirty import DirtyPages
from qemumig.savevm import commands
from qemumig.source.return_path import ReturnPath, Verdict
from qemumig.wire.stream import InputStream, OutputStream
from tests.fuzz.delivery import ROOM, delivered, piece_length
from tests.fuzz.folding import fold, taken_apart
from tests.fuzz.oracle import PAGE, REFUSED, TAKEN, Fault, Guarded
from tests.support.memory import QuietLog, channel_pair

PAGES = 16
RAM = Guarded(PAGES)
POSTCOPY = 1  # bit of the choices: somebody hears what postcopy is told
BITMAP_SIZE = 24


class Listener:
    """What postcopy hears: takes requests to a server of pages."""

    def __init__(self, server: PageServer) -> None:
        self._server = server
        self.bitmaps: list[commands.ReceivedBitmap] = []

    def read_requests(self, stream: InputStream) -> None:
        RequestReader(self._server, stream).read()

    def bitmap_size(self, block: str) -> int:
        return {"ram": BITMAP_SIZE}[block]

    def take_bitmap(self, message: commands.ReceivedBitmap) -> None:
        self.bitmaps.append(message)

    def take_pong(self, value: int) -> None: ...
    def take_resume_ack(self) -> None: ...
    def take_end(self) -> None: ...


def run(data: bytes) -> str:
    (choices, piece), wire = taken_apart(data, 2, ROOM)
    block = RAM.block("ram")
    for page in range(1, PAGES):
        RAM.contents()[page * PAGE] = page
    with channel_pair() as (main, far), delivered(wire, piece_length(piece)) as channel:
        dirty = DirtyPages([block], QuietLog())
        server = PageServer(dirty)
        server.connect(OutputStream(main), None)
        path = ReturnPath(channel)
        path.talk = Listener(server) if choices & POSTCOPY else None
        path.start()
        path.join()
        if not server.serve(1 << 30, 1 << 20) or server.dirty.remaining:
            raise Fault(f"{server.dirty.remaining} pages do not leave")
        main.finish()
        check_pages(InputStream(far))
        server.close()
        dirty.close()
    RAM.check()
    return judged(path)


def judged(path: ReturnPath) -> str:
    if path.verdict is None or not isinstance(path.error, MigrationError | None):
        raise Fault(f"the return path ended with {path.verdict} and {path.error!r}")
    if path.verdict is Verdict.TAKEN:
        return TAKEN
    if path.verdict is Verdict.UNKNOWN and not isinstance(path.error, StreamError):
        raise Fault(f"nobody can tell, because of {path.error!r}")
    return REFUSED


def check_pages(stream: InputStream) -> None:
    """Fault unless each page comes once, as it is."""
    pages: Counter[int] = Counter()
    while head := stream.peek(8):
        page, flags = divmod(int.from_bytes(head, "big"), PAGE)
        stream.read(8)
        if not flags & 0x20:
            stream.read(stream.read_u8())
        contents = stream.read(PAGE) if flags & 0x8 else stream.read(1)
        if contents != (bytes([page]).ljust(PAGE, b"\0") if page else b"\0"):
            raise Fault(f"page {page} left with other contents")
        pages[page] += 1
    if pages != Counter(range(PAGES)):
        raise Fault(f"pages left as often as this: {pages}")


# ---- to begin with ----


def message(kind: int, body: bytes) -> bytes:
    return struct.pack(">HH", kind, len(body)) + body


def request(page: int, count: int = 1, name: bytes = b"") -> bytes:
    where = struct.pack(">QI", page * PAGE, count * PAGE)
    return message(3, where + bytes([len(name)]) + name) if name else message(4, where)


def bitmap(name: bytes = b"ram", size: int = BITMAP_SIZE, end: int = 0x0123456789ABCDEF) -> bytes:
    return message(5, bytes([len(name)]) + name) + struct.pack(">Q", size) + bytes(size) + struct.pack(">Q", end)


def seeds() -> Iterator[bytes]:
    said = {
        "shut": message(1, bytes(4)),
        "refused": message(1, bytes([0, 0, 0, 1])),
        "pong": message(2, bytes([0, 0, 0, 7])),
        "named": request(3, 2, b"ram") + request(3) + request(9, 4),
        "nameless": request(3),
        "other": request(0, 1, b"rom"),
        "beyond": request(PAGES, 1, b"ram") + request(1, 1 << 19),
        "past the end": request(PAGES - 1, 2, b"ram"),
        "the end": request(PAGES - 1, 1, b"ram"),
        "bitmap": bitmap(),
        "bad bitmap": bitmap(b"rom") + bitmap(size=8) + bitmap(end=0),
        "ack": message(6, bytes(4)),
        "switchover": message(7, b""),
    }
    for index, one in enumerate(said.values()):
        for choices in range(2):
            yield bytes([choices, index]) + fold(one)
            yield bytes([choices, 0]) + fold(one + said["shut"])
    yield b"\1\0" + fold(b"".join(said[name] for name in ("pong", "named", "bitmap", "named", "switchover", "shut")))
