"""Streams of real QEMUs: every section loads, means what its decode says, and is written back byte for byte."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemumig.errors import StreamError
from qemumig.savevm import sections, vmdesc
from qemumig.savevm.devices.cpu_state import derive_hflags
from qemumig.savevm.reader import BytesReader
from qemumig.wire.stream import InputStream
from tests.qemumig.savevm import recorded
from tests.support.memory import channel_pair

NAMES = recorded.names()
NEWER = [name for name in NAMES if not name.startswith("q72-")]
OLDER = [name for name in NAMES if name.startswith("q72-")]


def test_there_are_recordings_of_three_versions() -> None:
    assert {name.partition("-")[0] for name in NAMES} == {"q72", "q100", "q102"}
    assert len(NAMES) == 38


@pytest.mark.parametrize("name", NAMES)
def test_sections_come_in_the_decoded_order(name: str) -> None:
    recording = recorded.load(name)
    loaded = [
        (one.header.idstr, one.header.instance_id, one.header.version_id, one.header.section_id)
        for one in recording.devices
    ]
    keys = ("idstr", "instance_id", "version_id", "section_id")
    assert loaded == [tuple(one[key] for key in keys) for one in recording.decoded["sections"]]


@pytest.mark.parametrize("name", NAMES)
def test_saving_a_loaded_record_gives_the_same_bytes(name: str) -> None:
    for section in recorded.load(name).devices:
        assert section.vmstate.save(section.record)[0] == section.payload, section.label


@pytest.mark.parametrize("name", NAMES)
def test_header_and_configuration_are_written_back(name: str) -> None:
    recording = recorded.load(name)
    data, _ = sections.encode_configuration(recording.configuration)
    assert sections.encode_file_header() + data == recording.data[: recording.header_length]


def _describe(recording: recorded.Recording) -> bytes:
    devices = [
        vmdesc.device(one.header.idstr, one.header.instance_id, one.vmstate.save(one.record)[1])
        for one in recording.devices
    ]
    return vmdesc.encode(devices, configuration=sections.encode_configuration(recording.configuration)[1])


@pytest.mark.parametrize("name", NEWER)
def test_description_is_the_text_that_qemu_10_wrote(name: str) -> None:
    recording = recorded.load(name)
    assert _describe(recording) == recording.description


@pytest.mark.parametrize("name", OLDER)
def test_description_differs_from_7_2_only_where_the_versions_differ(name: str) -> None:
    recording = recorded.load(name)
    ours, theirs = json.loads(_describe(recording)), json.loads(recording.description)
    assert ours.pop("configuration")["vmsd_name"] == "configuration"  # described since 8.2
    assert ours["devices"].pop()["name"] == theirs["devices"].pop()["name"] == "globalstate"  # split since 9.0
    assert ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_split_gives_the_decoded_fields(name: str) -> None:
    recording = recorded.load(name)
    devices = zip(recording.devices, recording.described_devices, recording.decoded["sections"], strict=True)
    for section, description, decoded in devices:
        pieces = vmdesc.split(description, section.payload)
        assert [_as_decoded(piece) for piece in pieces] == decoded["fields"], section.label


def _as_decoded(piece: vmdesc.DescribedField) -> list[Any]:
    if piece.type == "subsection":
        return [re.sub(r"^(<[^>]*>\.)*", "", piece.path), piece.type, int.from_bytes(piece.data[-4:], "big")]
    return [piece.path, piece.type, piece.data.hex()]


# -- what the records hold, field by field, found by the decode's names


def _find(record: Any, path: str) -> Any:
    """The value in *record* that the decode calls *path*."""
    plain = re.sub(r"^<([^/>]*)/([^>]*)>\.", r"\2!", path)
    subsection, _, member = plain.rpartition("!")
    if subsection:
        record = getattr(record, subsection) if hasattr(record, subsection) else record
    member = member.removeprefix("env.").replace("_vmstate", "")
    if not subsection:
        member = re.sub(r"^cr\[(\d)\]", r"cr\1", member)
        member = re.sub(r"^xmm_regs\[0\]\[(\d+)\]\._q_ZMMReg\[(\d)\]", r"xmm_low[\1][\2]", member)
        member = re.sub(
            r"^xmm_regs\[1\]\[(\d+)\]\._q_ZMMReg\[(\d)\]",
            lambda match: f"ymm_high[{match[1]}][{int(match[2]) - 2}]",
            member,
        )
        member = re.sub(r"^channels\[0\]\.(irq_disabled|next_transition_time)$", r"\1", member)
        member = member.replace("cur_offset[1]", "cur_offset").replace("tmp", "")
    else:
        member = re.sub(
            r"^xmm_regs\[0\]\[(\d+)\]\._q_ZMMReg\[(\d)\]",
            lambda match: f"zmm_high[{match[1]}][{int(match[2]) - 4}]",
            member,
        )
        member = re.sub(r"^xmm_regs\[1\]\[(\d+)\]\._q_ZMMReg\[(\d)\]", r"zmm_hi16[\1][\2]", member)
        member = member.replace("opmask_regs", "opmask").replace("memhp_state.", "")
        if not hasattr(record, "__dict__"):
            return record
    for step in re.findall(r"\w+|\[\d+\]", member):
        record = record[int(step[1:-1])] if step.startswith("[") else getattr(record, step)
    return record


def _expected(kind: str, data: bytes) -> Any:
    if kind == "buffer":
        return data
    if kind == "timer":
        return None if data == b"\xff" * 8 else int.from_bytes(data, "big")
    if kind == "tmp":
        return int.from_bytes(data[:8], "big"), int.from_bytes(data[8:], "big")
    return int.from_bytes(data, "big", signed=kind.startswith("int"))


def _plain(value: Any) -> Any:
    return (value.mantissa, value.exponent) if hasattr(value, "mantissa") else value


@pytest.mark.parametrize("name", NAMES)
def test_records_hold_the_decoded_values(name: str) -> None:
    recording = recorded.load(name)
    compared = 0
    for section, decoded in zip(recording.devices, recording.decoded["sections"], strict=True):
        for path, kind, data in decoded["fields"]:
            if kind in ("subsection", "unused_buffer", "virtio") or decoded["idstr"] == "globalstate":
                continue
            expected = _expected(kind, bytes.fromhex(data))
            assert _plain(_find(section.record, path)) == expected, f"{section.label} {path}"
            compared += 1
    assert compared > 250


@pytest.mark.parametrize("name", NAMES)
def test_run_state_is_the_one_the_guest_was_stopped_in(name: str) -> None:
    (section,) = (one for one in recorded.load(name).devices if one.header.idstr == "globalstate")
    expected = "paused" if "paused" in name else "io-error" if "inflight" in name else "running"
    assert section.record.state.value == expected


@pytest.mark.parametrize("name", NAMES)
def test_hflags_follow_from_the_other_registers(name: str) -> None:
    for section in recorded.load(name).devices:
        if section.header.idstr == "cpu":
            assert f"{derive_hflags(section.record):#x}" == f"{section.record.hflags:#x}", section.label


def test_a_pending_disk_request_is_understood() -> None:
    (disk,) = (one for one in recorded.load("q100-blk-inflight").devices if one.header.idstr == recorded.DISK)
    (request,) = disk.record.virtio.requests
    assert request.head == 0
    assert request.readable == [(0xA000, 16), (0xB000, 0x1000)]
    assert request.writable == [(0xA010, 1)]
    assert disk.record.virtio.started is True


def test_a_modern_disk_has_its_ring_addresses_in_two_places() -> None:
    (disk,) = (one for one in recorded.load("q100-blk-modern").devices if one.header.idstr == recorded.DISK)
    virtio = disk.record.virtio
    assert virtio.guest_features == 1 << 32  # VERSION_1
    assert virtio.virtqueues[0] == (0x8080, 0x9000)
    first = virtio.extra_state.state.queues[0]
    assert (first.num, first.enabled, first.desc_low, first.avail_low, first.used_low) == (8, True, 0x8000, 0x8080, 0x9000)
    assert len(virtio.virtqueues) == len(virtio.extra_state.state.queues) == 1024


def test_the_avx512_recording_holds_its_subsections() -> None:
    (cpu,) = (one.record for one in recorded.load("q100-avx512-pkru").devices if one.header.idstr == "cpu")
    assert cpu.pkru == 0x55555554
    assert cpu.avx512.zmm_hi16[4][0] == 0x28C5CF96E24EC37A
    assert cpu.msr_tsx_ctrl == 0
    assert cpu.xss is None


def test_uuid_and_capabilities_are_announced() -> None:
    configuration = recorded.load("q100-uuid").configuration
    assert configuration.uuid == bytes.fromhex("00112233445566778899aabbccddeeff")
    assert recorded.load("q72-ignore-shared").configuration.enabled_capabilities == ["x-ignore-shared"]
    assert recorded.load("q72-ignore-shared").blocks == {"mem0": 32 << 20, "pc.bios": 1 << 16}


# -- damage


def _load_with_footer(section: recorded.RecordedSection, data: bytes) -> None:
    """Load state and the footer behind it, as a receiver does."""
    reader = BytesReader(data, section.offset)
    header = section.header
    section.vmstate.load(reader, header.version_id, section=header.idstr, instance_id=header.instance_id)
    sections.read_section_footer(reader, header.section_id, header.idstr)


def _distinct_sections() -> list[recorded.RecordedSection]:
    chosen: dict[tuple[str, int], recorded.RecordedSection] = {}
    for name in ("q100-legacy-devices", "q100-acpi", "q100-avx512-pkru", "q100-blk-idle", "q72-1cpu", "q100-blk-modern"):
        for section in recorded.load(name).devices:
            chosen[section.header.idstr, len(section.payload)] = section
    return list(chosen.values())


@pytest.mark.parametrize("section", _distinct_sections(), ids=lambda one: f"{one.label}-{len(one.payload)}")
def test_a_section_cut_short_is_refused_wherever_it_is_cut(section: recorded.RecordedSection) -> None:
    whole = section.payload + sections.encode_section_footer(section.header.section_id)
    step = 1 if len(whole) < 5000 else 211  # the tables of a modern disk are long and all alike
    for length in range(0, len(whole), step):
        with pytest.raises(StreamError) as caught:
            _load_with_footer(section, whole[:length])
        assert repr(section.header.idstr) in str(caught.value)
    _load_with_footer(section, whole)


def test_a_refusal_names_section_instance_field_and_offset() -> None:
    (section,) = (one for one in recorded.load("q100-2cpu-checks").devices if one.label == "cpu-1")
    with pytest.raises(StreamError) as caught:
        _load_with_footer(section, section.payload[:300])
    assert caught.value.section == "cpu"
    assert caught.value.offset == section.offset + 300  # segs[3] begins at 296, its selector has 4 bytes
    assert str(caught.value).startswith("section 'cpu' instance 1, field env.segs[3].base: stream ends inside")


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(_distinct_sections()), st.data())
def test_a_damaged_section_is_refused_or_becomes_a_whole_record(
    section: recorded.RecordedSection, data: st.DataObject
) -> None:
    damaged = bytearray(section.payload + sections.encode_section_footer(section.header.section_id))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with suppress(StreamError):
        _load_with_footer(section, bytes(damaged))


def test_a_recording_loads_from_a_real_stream_as_it_does_from_memory() -> None:
    recording = recorded.load("q100-acpi")
    with channel_pair() as (left, right):
        for section in recording.devices:
            os.write(left.write_fd, section.payload + sections.encode_section_footer(section.header.section_id))
        stream = InputStream(right)
        for section in recording.devices:
            header = section.header
            record = section.vmstate.load(stream, header.version_id, section=header.idstr)
            sections.read_section_footer(stream, header.section_id, header.idstr)
            assert record == section.record
