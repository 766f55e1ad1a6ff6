"""Commands and return path messages: their bytes, and every lie a peer can tell in them (stream.md §9, §10)."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemumig.errors import StreamError
from qemumig.savevm import commands as c
from qemumig.savevm.reader import BytesReader
from qemumig.wire.format import MigCommand, MigReturnPath

END_MARK = "01 23 45 67 89 ab cd ef"

COMMANDS = [
    (c.OpenReturnPath(), "00 01 00 00"),
    (c.Ping(0x42), "00 02 00 04 00 00 00 42"),
    (c.PostcopyAdvise(), "00 03 00 00"),
    (c.PostcopyAdvise(0x201000, 4096), "00 03 00 10 00 00 00 00 00 20 10 00 00 00 00 00 00 00 10 00"),
    (c.PostcopyListen(), "00 04 00 00"),
    (c.PostcopyRun(), "00 05 00 00"),
    (
        c.PostcopyRamDiscard("ram", ((0x1000, 0x2000),)),
        "00 06 00 16 00 03 72 61 6d 00 00 00 00 00 00 00 10 00 00 00 00 00 00 00 20 00",
    ),
    (c.Packaged(0x1234), "00 07 00 04 00 00 12 34"),
    (c.EnableColo(), "00 08 00 00"),
    (c.PostcopyResume(), "00 09 00 00"),
    (c.RecvBitmap("ram"), "00 0a 00 04 03 72 61 6d"),
    (c.SwitchoverStart(), "00 0b 00 00"),
]

MESSAGES = [
    (c.Shut(0), "00 01 00 04 00 00 00 00"),
    (c.Pong(0x42), "00 02 00 04 00 00 00 42"),
    (c.ReqPagesId(0x3000, 0x1000, "ram"), "00 03 00 10 00 00 00 00 00 00 30 00 00 00 10 00 03 72 61 6d"),
    (c.ReqPages(0x3000, 0x1000), "00 04 00 0c 00 00 00 00 00 00 30 00 00 00 10 00"),
    (
        c.ReceivedBitmap("ram", b"\xff" * 8),
        f"00 05 00 04 03 72 61 6d 00 00 00 00 00 00 00 08 ff ff ff ff ff ff ff ff {END_MARK}",
    ),
    (c.ResumeAck(), "00 06 00 04 00 00 00 01"),
    (c.SwitchoverAck(), "00 07 00 00"),
]


def _name(value: object) -> str:
    return type(value).__name__ if not isinstance(value, str) else ""


@pytest.mark.parametrize(("command", "data"), COMMANDS, ids=_name)
def test_commands_go_there_and_back(command: c.Command, data: str) -> None:
    assert c.encode_command(command).hex(" ") == f"08 {data}"
    reader = BytesReader(bytes.fromhex(data) + b"rest")
    assert c.read_command(reader) == command
    assert reader.remaining == 4


@pytest.mark.parametrize(("message", "data"), MESSAGES, ids=_name)
def test_messages_go_there_and_back(message: c.ReturnMessage, data: str) -> None:
    assert c.encode_return_message(message).hex(" ") == data
    reader = BytesReader(bytes.fromhex(data) + b"rest")
    assert c.read_return_message(reader, {"ram": 8}.__getitem__) == message
    assert reader.remaining == 4


def test_every_number_of_the_wire_has_its_class() -> None:
    assert {command.type for command, _ in COMMANDS} == set(MigCommand) - {MigCommand.MIG_CMD_INVALID}
    assert {message.type for message, _ in MESSAGES} == set(MigReturnPath) - {MigReturnPath.MIG_RP_MSG_INVALID}


@pytest.mark.parametrize(("command", "data"), COMMANDS, ids=_name)
def test_a_command_cut_short_is_refused(command: c.Command, data: str) -> None:
    whole = bytes.fromhex(data)
    for length in range(len(whole)):
        with pytest.raises(StreamError, match="ends inside"):
            c.read_command(BytesReader(whole[:length]))


@pytest.mark.parametrize(("message", "data"), MESSAGES, ids=_name)
def test_a_message_cut_short_is_refused(message: c.ReturnMessage, data: str) -> None:
    whole = bytes.fromhex(data)
    for length in range(len(whole)):
        with pytest.raises(StreamError, match="ends inside"):
            c.read_return_message(BytesReader(whole[:length]), {"ram": 8}.__getitem__)


@pytest.mark.parametrize(("command", "data"), COMMANDS, ids=_name)
def test_a_command_of_another_length_is_refused(command: c.Command, data: str) -> None:
    number, length = struct.unpack(">HH", bytes.fromhex(data)[:4])
    for wrong in (length + 1, length - 1):
        if wrong < 0:
            continue
        lie = struct.pack(">HH", number, wrong) + (bytes.fromhex(data)[4:] + bytes(2))[:wrong]
        with pytest.raises(StreamError, match=r"^MIG_[A-Z_]+ at offset 0x[0-9a-f]+: |ends inside"):
            c.read_command(BytesReader(lie))


@pytest.mark.parametrize(
    ("data", "finding"),
    [
        ("0000 0000", "command at offset 0x0: unknown number 0x0, with a payload of 0 bytes"),
        ("000c 0000", "unknown number 0xc, .*; the source is of a later version"),
        ("ffff ffff", "command at offset 0x0: unknown number 0xffff, with a payload of 65535 bytes"),
        ("0001 0001 00", "MIG_CMD_OPEN_RETURN_PATH at offset 0x0: a payload of 1 bytes, expected 0"),
        ("0002 0000", "MIG_CMD_PING at offset 0x0: a payload of 0 bytes, expected 4"),
        ("0003 0008 0000000000000000", "MIG_CMD_POSTCOPY_ADVISE at offset 0x0: a payload of 8 bytes, expected 0 or 16"),
        ("0007 0004 ffffffff", "MIG_CMD_PACKAGED at offset 0x4: 4294967295 bytes announced, expected at most 268435456"),
        ("0006 0013 00 03 72616d 00" + "00" * 13, "ranges of 13 bytes, expected a positive multiple of 16"),
        ("0006 0006 00 03 72616d 00", "ranges of 0 bytes, expected a positive multiple of 16"),
        (
            "0006 0016 01 03 72616d 00" + "00" * 16,
            "RAM_DISCARD at offset 0x4: version 1 found, expected 0",
        ),
        (
            "0006 0016 00 03 72616d 01" + "00" * 16,
            "RAM_DISCARD at offset 0x9: 0x01 behind the name 'ram'",
        ),
        ("0006 0016 00 00 00 00 0000" + "00" * 16, "an empty block name, expected at least one letter"),
        ("0006 0016 00 ff 72616d 00" + "00" * 16, "ends inside MIG_CMD_POSTCOPY_RAM_DISCARD"),
        ("0006 0016 00 03 72616d 00" + "ff" * 16, "ends beyond 64 bits"),
        ("0006 0000", "ends inside MIG_CMD_POSTCOPY_RAM_DISCARD"),
        ("000a 0001 00", r"MIG_CMD_RECV_BITMAP at offset 0x\w+: an empty block name"),
        ("000a 0005 03 72616d 00", r"MIG_CMD_RECV_BITMAP at offset 0x\w+: the payload has 1 bytes more than expected"),
        ("000a 0003 03 7261", "ends inside MIG_CMD_RECV_BITMAP"),
        ("000a 0002 01 ff", "expected UTF-8 text"),
        ("000a 0000", "ends inside MIG_CMD_RECV_BITMAP"),
    ],
)
def test_a_hostile_command_is_refused(data: str, finding: str) -> None:
    with pytest.raises(StreamError, match=finding):
        c.read_command(BytesReader(bytes.fromhex(data)))


@pytest.mark.parametrize(
    ("data", "finding"),
    [
        ("0000 0000", "return path message at offset 0x0: unknown number 0x0"),
        ("0008 0000", "return path message at offset 0x0: unknown number 0x8"),
        ("0001 0000", "MIG_RP_MSG_SHUT at offset 0x0: a payload of 0 bytes, expected 4"),
        ("0002 0005 0000000000", "MIG_RP_MSG_PONG at offset 0x0: a payload of 5 bytes, expected 4"),
        ("0003 0201", "MIG_RP_MSG_REQ_PAGES_ID at offset 0x0: a payload of 513 bytes, expected at most 512"),
        ("0003 000d" + "00" * 13, r"MIG_RP_MSG_REQ_PAGES_ID at offset 0x\w+: an empty block name"),
        ("0003 0011" + "00" * 12 + "03 72616d 00", "has 1 bytes more than expected"),
        ("0003 0005 0000000000", "ends inside MIG_RP_MSG_REQ_PAGES_ID"),
        ("0004 000d" + "00" * 13, "MIG_RP_MSG_REQ_PAGES at offset 0x0: a payload of 13 bytes, expected 12"),
        ("0004 000c" + "ff" * 12, "ends beyond 64 bits"),
        ("0005 0001 00", r"MIG_RP_MSG_RECV_BITMAP at offset 0x\w+: an empty block name"),
        ("0005 0004 03 626164", "bitmap at offset 0x8: of block 'bad', which this machine does not have"),
        ("0005 0004 03 72616d 0000000000000009", "bitmap at offset 0x8: of block 'ram' with 9 bytes, expected 8"),
        ("0005 0004 03 72616d ffffffffffffffff", "with 18446744073709551615 bytes, expected 8"),
        (f"0005 0004 03 72616d 0000000000000008 {'00' * 16}", "0x0 behind that of block 'ram'"),
        ("0006 0004 00000000", "MIG_RP_MSG_RESUME_ACK at offset 0x4: value 0 found, expected 1"),
        ("0007 0001 00", "MIG_RP_MSG_SWITCHOVER_ACK at offset 0x0: a payload of 1 bytes, expected 0"),
    ],
)
def test_a_hostile_message_is_refused(data: str, finding: str) -> None:
    with pytest.raises(StreamError, match=finding):
        c.read_return_message(BytesReader(bytes.fromhex(data)), {"ram": 8}.__getitem__)


def test_a_bitmap_nobody_asked_for_is_refused() -> None:
    with pytest.raises(StreamError, match="bitmap at offset 0x8: of block 'ram', expected none"):
        c.read_return_message(BytesReader(bytes.fromhex("0005 0004 03 72616d 0000000000000008")))


def test_what_does_not_fit_the_wire_is_not_written() -> None:
    with pytest.raises(ValueError, match="does not fit 32 bits"):
        c.encode_command(c.Ping(1 << 32))
    with pytest.raises(ValueError, match="13 ranges to discard, expected 1 to 12"):
        c.encode_command(c.PostcopyRamDiscard("ram", ((0, 1),) * 13))
    with pytest.raises(ValueError, match="0 ranges to discard"):
        c.encode_command(c.PostcopyRamDiscard("ram", ()))
    with pytest.raises(ValueError, match="does not fit 32 bits"):
        c.encode_return_message(c.Shut(-1))


def test_a_discard_of_as_many_ranges_as_fit_is_taken() -> None:
    ranges = b"".join(struct.pack(">QQ", number << 12, 4096) for number in range(100))
    payload = b"\0\x03ram\0" + ranges
    command = c.read_command(BytesReader(struct.pack(">HH", 6, len(payload)) + payload))
    assert isinstance(command, c.PostcopyRamDiscard)
    assert command.ranges[99] == (99 << 12, 4096)


@given(st.binary(max_size=64))
def test_noise_is_refused_or_read_and_nothing_else(noise: bytes) -> None:
    for read in (c.read_command, c.read_return_message):
        try:
            read(BytesReader(noise))
        except StreamError as error:
            assert str(error)
