"""The plain reader agrees with what was recorded beside the streams, and refuses what is no stream."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import zstandard

from tests.support.plain_stream import PAGE, PlainStreamError, patched, read_stream

STREAMS = Path(__file__).parent.parent / "streams"


def unpacked(path: Path) -> bytes:
    with path.open("rb") as file:
        return zstandard.ZstdDecompressor().stream_reader(file).read()


def recorded() -> list[Path]:
    """Every recorded stream that has its decode beside it."""
    decodes = sorted(STREAMS.rglob("*.json.zst"))
    return [path.with_name(path.name.replace(".json.", ".mig.")) for path in decodes]


def smallest(
    *records: tuple[int, bytes], closing: bytes = b"\0\x06\0\0\0\x0e" + b'{"devices":[]}', marker: int = 0x7E
) -> bytes:
    """The stream of stream.md §12 with a block of four pages, *records* in its END section, no devices."""
    head = b"QEVM\0\0\0\3\x07\0\0\0\4none"
    start = b"\1\0\0\0\1\3ram\0\0\0\0\0\0\0\4"
    blocks = struct.pack(">QB3sQ", 4 * PAGE | 0x004, 3, b"ram", 4 * PAGE)
    body = b"".join(struct.pack(">Q", value) + rest for value, rest in records)
    eos, footer = struct.pack(">Q", 0x010), struct.pack(">BI", marker, 1)
    return head + start + blocks + eos + footer + b"\3\0\0\0\1" + body + eos + footer + closing


def test_there_are_recorded_streams() -> None:
    assert recorded(), f"no *.json.zst below {STREAMS}"


@pytest.mark.parametrize("path", recorded(), ids=lambda path: path.name.removesuffix(".mig.zst"))
def test_recorded_stream_gives_the_memory_and_the_fields_of_its_decode(path: Path) -> None:
    decode = json.loads(unpacked(path.with_name(path.name.replace(".mig.", ".json."))))
    stream = read_stream(unpacked(path))
    assert stream.digests() == decode["sha256"]
    assert [[list(f) for f in s.fields] for s in stream.sections] == [s["fields"] for s in decode["sections"]]
    assert [(s.idstr, s.instance_id, s.version_id, s.section_id) for s in stream.sections] == [
        (s["idstr"], s["instance_id"], s["version_id"], s["section_id"]) for s in decode["sections"]
    ]


def test_last_record_of_a_page_wins_and_each_is_counted() -> None:
    page = bytes(range(256)) * 16
    stream = read_stream(smallest((PAGE | 0x008, b"\3ram" + page), (2 * PAGE | 0x028, page), (PAGE | 0x022, b"\0")))
    assert stream.blocks["ram"].memory == bytes(2 * PAGE) + page + bytes(PAGE)
    assert list(stream.blocks["ram"].times_sent) == [0, 2, 1, 0]
    assert stream.records == {"page": 2, "zero": 1}
    assert stream.order == ["ram start", "ram end"]


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ((0x022, b"\0"), "lies in no block"),
        ((0x002, b"\3rom\0"), "not in the list"),
        ((4 * PAGE | 0x002, b"\3ram\0"), "lies in no block"),
        ((0x002, b"\3ram\x55"), "fill byte"),
        ((0x00A, b"\3ram\0"), "do not go together"),
        ((0x001, b""), "do not go together"),
        ((PAGE | 0x010, b""), "do not go together"),
        ((0x040, b"\3ram\2\0\0"), "delta encoding"),
        ((0x100, b"\3ram\0\0\0\1x"), "damaged"),
        ((4 * PAGE | 0x004, b"\3ram" + struct.pack(">Q", 4 * PAGE)), "second list"),
    ],
)
def test_odd_record_is_refused(record: tuple[int, bytes], what: str) -> None:
    with pytest.raises(PlainStreamError, match=what):
        read_stream(smallest(record))


def test_wrong_footer_is_refused() -> None:
    with pytest.raises(PlainStreamError, match="footer mark"):
        read_stream(smallest(marker=0x7F))


def test_stream_cut_anywhere_is_refused() -> None:
    whole = smallest((0x008, b"\3ram" + bytes(PAGE)))
    for length in [*range(150), *range(len(whole) - 60, len(whole))]:
        with pytest.raises(PlainStreamError):
            read_stream(whole[:length])


@pytest.mark.parametrize(
    "delta",
    ["0001770001 78", "0500", "ff1f027778", "8080010177", "05017710", "05"],
)
def test_malformed_delta_is_refused(delta: str) -> None:
    with pytest.raises(PlainStreamError):
        patched(bytes(PAGE), bytes.fromhex(delta))


def test_delta_of_the_documented_example_is_applied() -> None:
    page = patched(bytes(PAGE), bytes.fromhex("100211220101 33"))
    assert page == bytes(16) + bytes.fromhex("11220033") + bytes(PAGE - 20)
