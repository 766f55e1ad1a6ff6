"""`qemumig analyze` on recordings that are cut, damaged or made up to hurt: it says where and why, and never breaks."""

from __future__ import annotations

import json
import random
import re
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest

from qemumig.cli.analyze import as_json, table
from qemumig.cli.analyze.model import Stream
from qemumig.cli.analyze.reading import read_stream
from qemumig.cli.analyze.recording import Recording
from tests.qemumig.cli.recordings import analyze, record, small_stream, stored, unpacked

SEED = 20260728
DAMAGED = ["microvm/q100-acpi", "ram/q72-compress-xbzrle", "ram/q100-xbzrle", "ram/q100-postcopy.ch0"]
OVERFLOW = (1 << 64) - 4096


def read(data: bytes) -> Stream:
    """The analysis of *data*, every line and every key of it made once."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        stream = read_stream(Recording("a recording", file), lambda done, total: None, keep_pages=True)
    if stream.scratch is not None:
        stream.scratch.close()
    assert "".join(table.lines(stream, fields=True))
    assert json.dumps(as_json.document(stream, fields=True))
    return stream


def places(data: bytes, count: int) -> list[int]:
    """Offsets all over *data*: the head, the device sections and the description most of all."""
    rng = random.Random(SEED)
    devices = data.rindex(b"\x05timer")
    ranges = [(0, 300), (0, len(data)), (devices, len(data))]
    return sorted({rng.randrange(*ranges[number % 3]) for number in range(count)})


def problem(*records: bytes, **shape: Any) -> tuple[int, str]:
    """Where and why a small stream with those records does not make sense."""
    (found,) = read(small_stream(*records, **shape)).problems
    return found.offset, found.message


@pytest.mark.parametrize("name", DAMAGED)
def test_a_cut_recording_is_never_whole_and_its_problem_lies_inside(name: str) -> None:
    data = unpacked(f"{name}.mig")
    for length in places(data, 40):
        (found,) = read(data[:length]).problems
        assert found.offset <= length, f"cut at {length:#x}: {found}"
        assert found.message


def test_a_cut_inside_a_known_device_names_the_offset_and_what_was_expected() -> None:
    data = unpacked("microvm/q100-1cpu.mig")
    frame = data.index(b"\x03cpu\0\0\0\0\0\0\0\x0c") + 12
    (found,) = read(data[: frame + 20]).problems
    assert found.offset == frame + 16
    assert "4 bytes left, 8 expected" in found.message


@pytest.mark.parametrize("name", DAMAGED)
def test_a_flipped_bit_never_breaks_the_analysis(name: str) -> None:
    data = bytearray(unpacked(f"{name}.mig"))
    for place in places(bytes(data), 40):
        data[place] ^= 0x10
        assert all(0 <= one.offset <= len(data) for one in read(bytes(data)).problems)
        data[place] ^= 0x10


def test_bits_that_matter_are_noticed_where_they_are() -> None:
    stream = read(unpacked("microvm/q100-1cpu.mig"))
    data = unpacked("microvm/q100-1cpu.mig")
    devices = [one for one in stream.sections if one.fields]
    assert len(devices) > 8
    for section in devices:
        end = section.payload_offset + section.payload_length
        for place in (end, end + 4):  # the footer's marker, the footer's id
            damaged = bytearray(data)
            damaged[place] ^= 1
            (found,) = read(bytes(damaged)).problems
            assert found.offset == end, section.idstr
            assert repr(section.idstr) in found.message
            assert "expected the footer" in found.message


def test_a_description_that_lies_about_a_section_is_noticed_and_the_walk_goes_on() -> None:
    data = unpacked("ram/q100-precopy.mig")
    at = data.index(b'"size": ', data.index(b'"i8254"'))
    lying = data[: at + 8] + (b"7" if data[at + 8 : at + 9] != b"7" else b"3") + data[at + 9 :]
    stream = read(lying)
    (found,) = stream.problems
    assert "'i8254'" in found.message
    assert stream.end == stream.size
    (section,) = [one for one in stream.sections if one.idstr == "i8254"]
    assert section.split_by == "known layout"


def test_sections_without_description_end_at_their_footers() -> None:
    data = unpacked("ram/q100-precopy.mig")
    described = read(data)
    assert described.description is not None
    bare = read(data[: described.description[0] - 5])
    assert (bare.problems, bare.notes) == ([], ["there is no VM description behind the end mark"])
    shape = [(one.idstr, one.payload_offset, one.payload_length) for one in described.sections]
    assert [(one.idstr, one.payload_offset, one.payload_length) for one in bare.sections] == shape


FIRST = len(small_stream()) - 8 - 5 - 21  # where the first record of the END section stands
REFUSED = {
    "flags": (record(0x1000 | 0x001), "flags 0x1, expected one of ZERO"),
    "two kinds": (record(0x1000 | 0x00A), "flags 0xa"),
    "no name yet": (record(0x0008, bytes(4096), None), "expected a name"),
    "unknown block": (record(0x0008, bytes(4096), b"vga"), "block 'vga' is not on the stream's list of blocks"),
    "past the end": (record(0x10008, bytes(4096)), "offset 0x10000 in block 'pc.ram', expected one below 0x10000"),
    "fill byte": (record(0x0002, b"\x55"), "fill byte 0x55 of a zero page, expected 0"),
    "encoding": (record(0x0040, b"\2\0\0"), "encoding 0x2, expected 0x1"),
    "long delta": (record(0x0040, b"\1\x10\1" + bytes(4097)), "delta of 4097 bytes, expected at most 4096"),
    "bad delta": (record(0x0040, b"\1\0\2" + b"\5\0"), "malformed XBZRLE delta"),
    "no zlib": (record(0x0100, b"\0\0\0\4abcd"), "expected a zlib stream"),
    "long zlib": (record(0x0100, b"\0\0\xff\xff"), "compressed page of 65535 bytes, expected at most 4110"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_record_that_lies_is_refused_at_its_own_offset(name: str) -> None:
    data, expected = REFUSED[name]
    offset, message = problem(data)
    assert offset == FIRST
    assert expected in message


@pytest.mark.parametrize("length", [OVERFLOW, 1 << 62, 1 << 50])
def test_a_block_too_large_for_any_host_is_one_sentence(length: int) -> None:
    stream = read(small_stream(length=length))
    assert all("pages" in one.message for one in stream.problems)
    assert len(stream.problems) <= 1


def _mapped(bitmap: int, pages: int, *, version: int = 1, page_size: int = 4096, length: int = 0x2000) -> bytes:
    capabilities = b"\5\x1aconfiguration/capabilities\0\0\0\1\0\0\0\1\x0amapped-ram"
    head = b"QEVM\0\0\0\3\7\0\0\0\4none" + capabilities + b"\1\0\0\0\1\3ram\0\0\0\0\0\0\0\4"
    head += struct.pack(">Q", length | 4) + b"\1r" + struct.pack(">Q", length)
    place = len(head) + 28
    head += struct.pack(">IQQQ", version, page_size, place + bitmap, pages)
    return head.ljust(0x1000, b"\1") + bytes(0x2000) + struct.pack(">Q", 0x10) + b"\x7e\0\0\0\1\0"


def test_mapped_pages_lie_where_the_header_says() -> None:
    stream = read(_mapped(0, 0x1000))
    assert stream.problems == []
    assert stream.blocks[0].counts["normal"] == 1  # bit 0 of the bitmap 0x01 0x01 …


@pytest.mark.parametrize(
    ("lie", "expected"),
    [
        ({"version": 2}, "version 2, expected 1"),
        ({"page_size": 8192}, "pages of 8192 bytes, expected 4096"),
        ({"bitmap": 1}, "expected 0x"),
        ({"pages": 0x1001}, "expected a multiple of 0x1000"),
        ({"pages": 0}, "where the bitmap ends"),
        ({"pages": 1 << 63}, "the file at"),
        ({"length": 0x100000000}, "where the bitmap ends"),
        ({"length": 0x3000}, "end at 0x4000, the file at"),
    ],
)
def test_a_mapped_ram_header_that_lies_is_refused(lie: dict[str, int], expected: str) -> None:
    shape = {"bitmap": 0, "pages": 0x1000, **lie}
    (found,) = read(_mapped(**shape)).problems
    assert expected in found.message


DESCRIPTIONS = {
    "not JSON": b"{]",
    "no devices": b"{}",
    "devices of another kind": b'{"devices": 5}',
    "a device that is a number": b'{"devices": [5, null, "x"]}',
    "deep": b'{"devices": ' + b"[" * 5000 + b"]" * 5000 + b"}",
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_strange_description_breaks_nothing(name: str) -> None:
    text = DESCRIPTIONS[name]
    bare = small_stream()[:-20]
    stream = read(bare + b"\6" + struct.pack(">I", len(text)) + text)
    assert len(stream.problems) == (name != "a device that is a number")


FIELDS = {
    "type of another kind": {"name": "x", "type": 5, "size": 1},
    "name of another kind": {"name": 5, "type": "uint8", "size": 1},
    "no size": {"name": "x", "type": "uint8"},
    "negative size": {"name": "x", "type": "uint8", "size": -1},
    "huge size": {"name": "x", "type": "buffer", "size": 1 << 40},
    "endless array": {"name": "x", "type": "buffer", "size": 0, "array_len": 1 << 40},
    "struct that is none": {"name": "x", "type": "struct", "struct": []},
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_description_that_cannot_be_true_is_named_and_not_followed(name: str) -> None:
    device = {"name": "d", "instance_id": 0, "vmsd_name": "d", "version": 1, "fields": [FIELDS[name]]}
    text = json.dumps({"devices": [device]}).encode()
    section = b"\4\0\0\0\7\1d\0\0\0\0\0\0\0\1" + b"\5" + b"\x7e\0\0\0\7"
    stream = read(small_stream()[:-21] + section + b"\0\6" + struct.pack(">I", len(text)) + text)
    (found,) = stream.problems
    assert "VM description" in found.message
    assert stream.sections[-1].payload_length == 1  # found by its footer


@pytest.mark.parametrize("data", [b"", b"Q", b"QEVM", b"QEVM\0\0\0\2", b"\x7fELF" + bytes(60), b"\x11\x22\x33\x44\0\0\0\2"])
def test_what_is_no_stream_is_said_in_one_sentence(
    data: bytes, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = analyze(capsys, stored(directory, data))
    assert (status, err) == (1, "")
    (line,) = [one for one in out.splitlines() if one.startswith("problem: ")]
    assert len(re.findall(r"offset 0x[0-9a-f]+", line)) == 1  # said, and said once


def test_memory_of_a_cut_recording_is_given_as_far_as_it_goes(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small_stream(record(0x0008, b"a" * 4096), record(0x1008, b"b" * 4096))
    out = directory / "out"
    status, text, _ = analyze(capsys, "--ram", "pc.ram", "-o", str(out), stored(directory, data[: FIRST + 5000]))
    assert (status, out.read_bytes()) == (1, b"a" * 4096 + bytes(0x10000 - 4096))
    assert "problem: stream ends inside" in text
