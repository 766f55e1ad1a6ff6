"""Commands of the source and messages of the destination (stream.md §9, §10).

    command = 0x08  be16 type  be16 length  payload             on the main channel, between sections
    message =       be16 type  be16 length  payload             on the return path

Each kind is a small class; `type` is its number on the wire.  Every length is compared with what its type allows
before the payload is read, and every payload is read to its end.  Whether a command is legal at that moment, and
whether a block exists, is for the caller to judge.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NoReturn

from .. import trace
from ..errors import StreamError
from ..wire.format import MIG_RP_MAX_LENGTH, MigCommand, MigReturnPath, SectionType
from .reader import BytesReader, Reader, counted_string, read_counted_string

PACKAGE_LIMIT = 256 << 20
"""Bytes a package may have; it is read whole, and holds device state only."""

DISCARD_RANGES_LIMIT = 12
"""Ranges a sender puts into one discard command; a receiver takes as many as fit."""

_RECV_BITMAP_END = 0x0123456789ABCDEF
_DISCARD_VERSION = 0
_NEWER_SOURCE = "the source is of a later version, or the bytes before were not what they seemed"
_RESUME_ACK_VALUE = 1


# -- commands


@dataclass(frozen=True)
class Command:
    """A command of the source; this class alone stands for none of them."""

    type: ClassVar[MigCommand]
    lengths: ClassVar[tuple[int, ...] | None] = (0,)  # bytes the payload may have; None: it says so itself

    def payload(self) -> bytes:
        """What follows the length."""
        return b""

    @classmethod
    def read(cls, payload: BytesReader) -> Command:
        """Take the payload apart; what is left of it afterwards is refused by the caller."""
        return cls()


@dataclass(frozen=True)
class OpenReturnPath(Command):
    """The destination may talk back from now on."""

    type = MigCommand.MIG_CMD_OPEN_RETURN_PATH


PING_DRAINED = 0x41
"""The value of a Ping by which a source asks whether all is there that is under way, before it stops its guest."""


@dataclass(frozen=True)
class Ping(Command):
    """To be answered by a Pong of the same value."""

    type = MigCommand.MIG_CMD_PING
    lengths = (4,)
    value: int

    def payload(self) -> bytes:
        return _be32(self.value)

    @classmethod
    def read(cls, payload: BytesReader) -> Ping:
        return cls(payload.read_be32())


@dataclass(frozen=True)
class PostcopyAdvise(Command):
    """Postcopy may come; of RAM: the OR of the page sizes of all blocks, and the target page size, both in bytes.

    Both are None when only dirty bitmaps will be postcopied.
    """

    type = MigCommand.MIG_CMD_POSTCOPY_ADVISE
    lengths = (0, 16)
    page_size_summary: int | None = None
    target_page_size: int | None = None

    def payload(self) -> bytes:
        if self.page_size_summary is None or self.target_page_size is None:
            return b""
        return struct.pack(">QQ", self.page_size_summary, self.target_page_size)

    @classmethod
    def read(cls, payload: BytesReader) -> PostcopyAdvise:
        return cls(payload.read_be64(), payload.read_be64()) if payload.remaining else cls()


@dataclass(frozen=True)
class PostcopyListen(Command):
    """Device state follows; page faults are served from now on."""

    type = MigCommand.MIG_CMD_POSTCOPY_LISTEN


@dataclass(frozen=True)
class PostcopyRun(Command):
    """The guest runs at the destination from now on."""

    type = MigCommand.MIG_CMD_POSTCOPY_RUN


@dataclass(frozen=True)
class PostcopyRamDiscard(Command):
    """Ranges (start, length), in bytes inside *block*, whose pages are stale."""

    type = MigCommand.MIG_CMD_POSTCOPY_RAM_DISCARD
    lengths = None
    block: str
    ranges: tuple[tuple[int, int], ...]

    def payload(self) -> bytes:
        if not 1 <= len(self.ranges) <= DISCARD_RANGES_LIMIT:
            raise ValueError(f"{len(self.ranges)} ranges to discard, expected 1 to {DISCARD_RANGES_LIMIT}")
        ranges = b"".join(struct.pack(">QQ", start, length) for start, length in self.ranges)
        return bytes([_DISCARD_VERSION]) + counted_string(self.block) + b"\0" + ranges

    @classmethod
    def read(cls, payload: BytesReader) -> PostcopyRamDiscard:
        what = cls.type.name
        version = payload.read_u8(what)
        if version != _DISCARD_VERSION:
            _refuse(what, payload.offset - 1, f"version {version} found, expected {_DISCARD_VERSION}")
        block = _read_block_name(payload, what)
        terminator = payload.read_u8(what)
        if terminator != 0:
            _refuse(what, payload.offset - 1, f"{terminator:#04x} behind the name {block!r}, expected 0x00")
        if payload.remaining == 0 or payload.remaining % 16:
            _refuse(what, payload.offset, f"ranges of {payload.remaining} bytes, expected a positive multiple of 16")
        return cls(block, tuple(_read_range(payload, what) for _ in range(payload.remaining // 16)))


@dataclass(frozen=True)
class Packaged(Command):
    """*length* bytes follow the command: a sequence of sections and commands, to be read whole before any is obeyed."""

    type = MigCommand.MIG_CMD_PACKAGED
    lengths = (4,)
    length: int

    def payload(self) -> bytes:
        return _be32(self.length)

    @classmethod
    def read(cls, payload: BytesReader) -> Packaged:
        length = payload.read_be32()
        if length > PACKAGE_LIMIT:
            _refuse(cls.type.name, payload.offset - 4, f"{length} bytes announced, expected at most {PACKAGE_LIMIT}")
        return cls(length)


@dataclass(frozen=True)
class EnableColo(Command):
    """The guest will run on both sides."""

    type = MigCommand.MIG_CMD_ENABLE_COLO


@dataclass(frozen=True)
class PostcopyResume(Command):
    """Recovery is done; postcopy goes on."""

    type = MigCommand.MIG_CMD_POSTCOPY_RESUME


@dataclass(frozen=True)
class RecvBitmap(Command):
    """To be answered, in a recovery, by the pages of *block* that have arrived."""

    type = MigCommand.MIG_CMD_RECV_BITMAP
    lengths = None
    block: str

    def payload(self) -> bytes:
        return counted_string(self.block)

    @classmethod
    def read(cls, payload: BytesReader) -> RecvBitmap:
        return cls(_read_block_name(payload, cls.type.name))


@dataclass(frozen=True)
class SwitchoverStart(Command):
    """The switchover begins (since 10.0)."""

    type = MigCommand.MIG_CMD_SWITCHOVER_START


TAKEN_IN_PRECOPY = (OpenReturnPath, Ping, SwitchoverStart)
"""The commands that belong to no capability that a source has to have on: every destination takes them."""

_COMMANDS: dict[int, type[Command]] = {one.type: one for one in Command.__subclasses__()}


def encode_command(command: Command) -> bytes:
    """A whole COMMAND element.  The bytes behind a Packaged command are not part of it."""
    payload = command.payload()
    trace.savevm_command_send(command.type, len(payload))
    return struct.pack(">BHH", SectionType.QEMU_VM_COMMAND, command.type, len(payload)) + payload


def read_command(reader: Reader) -> Command:
    """The command behind the byte QEMU_VM_COMMAND, which has been read.

    Raises StreamError for an unknown command, a length it cannot have, and a payload that is malformed.
    """
    offset = reader.offset
    number = reader.read_be16("a command")
    length = reader.read_be16("a command")
    kind = _COMMANDS.get(number)
    if kind is None:
        _refuse("command", offset, f"unknown number {number:#x}, with a payload of {length} bytes", _NEWER_SOURCE)
    if kind.lengths is not None and length not in kind.lengths:
        expected = " or ".join(map(str, kind.lengths))
        _refuse(kind.type.name, offset, f"a payload of {length} bytes, expected {expected}")
    payload = BytesReader(reader.read(length, kind.type.name), offset + 4)
    trace.loadvm_process_command(kind.type.name.removeprefix("MIG_CMD_"), length)
    command = kind.read(payload)
    _check_consumed(payload, kind.type.name)
    return command


# -- messages of the return path


@dataclass(frozen=True)
class ReturnMessage:
    """A message of the destination; this class alone stands for none of them."""

    type: ClassVar[MigReturnPath]
    length: ClassVar[int | None] = 0  # of the payload, in bytes; None: it says so itself

    def payload(self) -> bytes:
        """What follows the length and is counted by it."""
        return b""

    @classmethod
    def read(cls, payload: BytesReader) -> ReturnMessage:
        """Take the payload apart; what is left of it afterwards is refused by the caller."""
        return cls()


@dataclass(frozen=True)
class Shut(ReturnMessage):
    """The last message: *value* 0 when the guest has been taken, anything else when it has not."""

    type = MigReturnPath.MIG_RP_MSG_SHUT
    length = 4
    value: int

    def payload(self) -> bytes:
        return _be32(self.value)

    @classmethod
    def read(cls, payload: BytesReader) -> Shut:
        return cls(payload.read_be32())


@dataclass(frozen=True)
class Pong(ReturnMessage):
    """The answer to a Ping."""

    type = MigReturnPath.MIG_RP_MSG_PONG
    length = 4
    value: int

    def payload(self) -> bytes:
        return _be32(self.value)

    @classmethod
    def read(cls, payload: BytesReader) -> Pong:
        return cls(payload.read_be32())


@dataclass(frozen=True)
class ReqPages(ReturnMessage):
    """A vCPU waits for *size* bytes from *start* on, in the block of the request before."""

    type = MigReturnPath.MIG_RP_MSG_REQ_PAGES
    length = 12
    start: int
    size: int

    def payload(self) -> bytes:
        return struct.pack(">QI", self.start, self.size)

    @classmethod
    def read(cls, payload: BytesReader) -> ReqPages:
        return cls(*_read_range(payload, cls.type.name, size_bytes=4))


@dataclass(frozen=True)
class ReqPagesId(ReturnMessage):
    """The same in *block*, which the requests that follow refer to."""

    type = MigReturnPath.MIG_RP_MSG_REQ_PAGES_ID
    length = None
    start: int
    size: int
    block: str

    def payload(self) -> bytes:
        return struct.pack(">QI", self.start, self.size) + counted_string(self.block)

    @classmethod
    def read(cls, payload: BytesReader) -> ReqPagesId:
        start, size = _read_range(payload, cls.type.name, size_bytes=4)
        return cls(start, size, _read_block_name(payload, cls.type.name))


@dataclass(frozen=True)
class ReceivedBitmap(ReturnMessage):
    """One bit for each target page of *block*, 1 for received; little-endian bit order, padded to 8 bytes."""

    type = MigReturnPath.MIG_RP_MSG_RECV_BITMAP
    length = None
    block: str
    bitmap: bytes = b""

    def payload(self) -> bytes:
        return counted_string(self.block)

    @classmethod
    def read(cls, payload: BytesReader) -> ReceivedBitmap:
        return cls(_read_block_name(payload, cls.type.name))


@dataclass(frozen=True)
class ResumeAck(ReturnMessage):
    """Recovery is done on this side, too."""

    type = MigReturnPath.MIG_RP_MSG_RESUME_ACK
    length = 4

    def payload(self) -> bytes:
        return _be32(_RESUME_ACK_VALUE)

    @classmethod
    def read(cls, payload: BytesReader) -> ResumeAck:
        value = payload.read_be32()
        if value != _RESUME_ACK_VALUE:
            _refuse(cls.type.name, payload.offset - 4, f"value {value} found, expected {_RESUME_ACK_VALUE}")
        return cls()


@dataclass(frozen=True)
class SwitchoverAck(ReturnMessage):
    """Nothing here speaks against the switchover (since 8.1)."""

    type = MigReturnPath.MIG_RP_MSG_SWITCHOVER_ACK


_MESSAGES: dict[int, type[ReturnMessage]] = {one.type: one for one in ReturnMessage.__subclasses__()}


def encode_return_message(message: ReturnMessage) -> bytes:
    """A whole message, with the bitmap that follows the counted payload of a ReceivedBitmap."""
    payload = message.payload()
    trace.migrate_send_rp_message(message.type, len(payload))
    data = struct.pack(">HH", message.type, len(payload)) + payload
    if not isinstance(message, ReceivedBitmap):
        return data
    return b"".join((data, struct.pack(">Q", len(message.bitmap)), message.bitmap, struct.pack(">Q", _RECV_BITMAP_END)))


def read_return_message(reader: Reader, bitmap_size: Callable[[str], int] | None = None) -> ReturnMessage:
    """The next message of the destination.

    *bitmap_size* tells how many bytes the bitmap of a block has, and raises KeyError for a block that does not exist;
    None: nobody has asked for bitmaps, and one that comes is refused.
    Raises StreamError for an unknown message, a length it cannot have, and a payload that is malformed.
    """
    offset = reader.offset
    number = reader.read_be16("a return path message")
    length = reader.read_be16("a return path message")
    kind = _MESSAGES.get(number)
    if kind is None:
        _refuse("return path message", offset, f"unknown number {number:#x}, with a payload of {length} bytes")
    if length > MIG_RP_MAX_LENGTH or (kind.length is not None and length != kind.length):
        expected = f"at most {MIG_RP_MAX_LENGTH}" if kind.length is None else str(kind.length)
        _refuse(kind.type.name, offset, f"a payload of {length} bytes, expected {expected}")
    payload = BytesReader(reader.read(length, kind.type.name), offset + 4)
    message = kind.read(payload)
    _check_consumed(payload, kind.type.name)
    if isinstance(message, ReceivedBitmap):
        return ReceivedBitmap(message.block, _read_bitmap(reader, message.block, bitmap_size))
    return message


def _read_bitmap(reader: Reader, block: str, bitmap_size: Callable[[str], int] | None) -> bytes:
    """The bitmap behind the counted payload."""
    offset = reader.offset
    if bitmap_size is None:
        _refuse("bitmap", offset, f"of block {block!r}, expected none: nobody has asked for it")
    try:
        expected = bitmap_size(block)
    except KeyError:
        _refuse("bitmap", offset, f"of block {block!r}, which this machine does not have")
    size = reader.read_be64("the size of a bitmap")
    if size != expected:
        _refuse("bitmap", offset, f"of block {block!r} with {size} bytes, expected {expected}")
    bitmap = reader.read(size, f"the bitmap of block {block!r}")
    end = reader.read_be64("the end mark of a bitmap")
    if end != _RECV_BITMAP_END:
        _refuse("bitmap", reader.offset - 8, f"{end:#x} behind that of block {block!r}, expected {_RECV_BITMAP_END:#x}")
    return bitmap


# -- both


def _read_range(payload: BytesReader, what: str, size_bytes: int = 8) -> tuple[int, int]:
    """A start and a length whose end can be told in 64 bits."""
    offset = payload.offset
    start = payload.read_be64(what)
    length = int.from_bytes(payload.read(size_bytes, what), "big")
    if start + length > 1 << 64:
        _refuse(what, offset, f"range {start:#x} + {length:#x} ends beyond 64 bits")
    return start, length


def _read_block_name(payload: BytesReader, what: str) -> str:
    offset = payload.offset
    name = read_counted_string(payload, what)
    if not name:
        _refuse(what, offset, "an empty block name, expected at least one letter")
    return name


def _check_consumed(payload: BytesReader, what: str) -> None:
    if payload.remaining:
        _refuse(what, payload.offset, f"the payload has {payload.remaining} bytes more than expected")


def _be32(value: int) -> bytes:
    if not 0 <= value < 1 << 32:
        raise ValueError(f"{value} does not fit 32 bits")
    return struct.pack(">I", value)


def _refuse(what: str, offset: int, finding: str, remedy: object = "") -> NoReturn:
    raise StreamError(f"{what} at offset {offset:#x}: {finding}", offset=offset, remedy=remedy)
