"""The frame of the stream, and every lie a peer can tell in it (stream.md §2 to §8)."""

from __future__ import annotations

import json

import pytest

from qemumig.errors import StreamError
from qemumig.savevm import sections
from qemumig.savevm.reader import BytesReader
from qemumig.savevm.sections import Configuration, SectionEntry, SectionHeader, SectionTable
from qemumig.wire.format import SectionType

UUID = bytes.fromhex("00112233445566778899aabbccddeeff")


# -- file header


def test_the_file_header_is_eight_known_bytes() -> None:
    assert sections.encode_file_header().hex(" ") == "51 45 56 4d 00 00 00 03"
    sections.read_file_header(BytesReader(sections.encode_file_header()))


@pytest.mark.parametrize(
    ("data", "finding"),
    [
        ("5145564e00000003", r"file header at offset 0x0: magic 0x5145564e found, expected 0x5145564d"),
        ("5145564d00000002", r"file header at offset 0x4: version 2 is obsolete"),
        ("5145564d00000004", r"file header at offset 0x4: version 4 found, expected 3"),
        ("5145564d000000", r"ends inside the file header"),
        ("", r"ends inside the file header"),
    ],
)
def test_another_file_header_is_refused(data: str, finding: str) -> None:
    with pytest.raises(StreamError, match=finding):
        sections.read_file_header(BytesReader(bytes.fromhex(data)))


# -- configuration


def _encode(configuration: Configuration) -> bytes:
    return sections.encode_configuration(configuration)[0]


def test_the_configuration_is_marker_length_and_name() -> None:
    assert _encode(Configuration.of("none")).hex(" ") == "07 00 00 00 04 6e 6f 6e 65"


def test_only_validated_capabilities_are_announced_in_their_order() -> None:
    on = {"multifd", "mapped-ram", "x-ignore-shared", "events"}
    assert Configuration.of("microvm", capabilities=iter(on)).enabled_capabilities == ["x-ignore-shared", "mapped-ram"]
    assert Configuration.of("microvm", capabilities={"multifd"}).capabilities is None


def test_a_full_configuration_goes_there_and_back() -> None:
    sent = Configuration.of("microvm", capabilities={"x-ignore-shared"}, uuid=UUID)
    sent.target_page_bits = 12
    reader = BytesReader(_encode(sent) + b"\x01")
    assert sections.read_configuration(reader) == sent
    assert reader.remaining == 1


def test_the_configuration_is_described_as_qemu_does() -> None:
    _, description = sections.encode_configuration(Configuration.of("microvm", uuid=UUID))
    uuid = {"name": "uuid.data", "array_len": 16, "type": "uint8", "size": 1}
    subsection = {"vmsd_name": "configuration/uuid", "version": 1, "fields": [uuid]}
    assert json.loads(json.dumps(description["subsections"])) == [subsection]


@pytest.mark.parametrize(
    ("data", "finding"),
    [
        (
            b"\x01",
            r"configuration at offset 0x0: 0x01 found, expected its marker \(0x07\); "
            r"start the destination with -global migration\.send-configuration=off",
        ),
        (b"\x42", r"configuration at offset 0x0: 0x42 found, expected its marker \(0x07\)$"),
        (b"", "ends inside the configuration marker"),
        (b"\x07\xff\xff\xff\xff", "length is 4294967295, expected at most 256"),
        (b"\x07\x00\x00\x00\x04non", "ends inside"),
        (b"\x07\x00\x00\x00\x01n\x05\x12configuration/what\x00\x00\x00\x01", "unknown subsection 'configuration/what'"),
        (b"\x07\x00\x00\x00\x01n\x05\x12configuration/uuid\x00\x00\x00\x02", "has version 2, expected 1 to 1"),
        (b"\x07\x00\x00\x00\x01n\x05\x12configuration/uuid\x00\x00\x00\x01abc", "ends inside"),
        (
            b"\x07\x00\x00\x00\x01n\x05\x1aconfiguration/capabilities\x00\x00\x00\x01\xff\xff\xff\xff",
            "caps_count is 4294967295, expected at most 64",
        ),
        (
            b"\x07\x00\x00\x00\x01n\x05\x1aconfiguration/capabilities\x00\x00\x00\x01\x00\x00\x00\x01\x01\xfe",
            "expected UTF-8 text",
        ),
    ],
)
def test_a_malformed_configuration_is_refused(data: bytes, finding: str) -> None:
    with pytest.raises(StreamError, match=finding):
        sections.read_configuration(BytesReader(data))


def test_equal_configurations_agree() -> None:
    on = {"x-ignore-shared", "multifd"}
    received = Configuration.of("microvm", capabilities=on, uuid=UUID)
    sections.check_configuration(received, machine_type="microvm", capabilities=on, uuid=UUID)


def test_a_uuid_matters_only_when_both_sides_have_one() -> None:
    sections.check_configuration(Configuration.of("microvm", uuid=UUID), machine_type="microvm")
    sections.check_configuration(Configuration.of("microvm"), machine_type="microvm", uuid=UUID)


def _announcing(*names: str) -> Configuration:
    return Configuration(b"microvm", 7, capabilities=sections.CapabilityList(list(names), len(names)))


def test_a_known_capability_that_is_not_validated_is_ignored() -> None:
    sections.check_configuration(_announcing("xbzrle", "compress", "block"), machine_type="microvm")


@pytest.mark.parametrize(
    ("received", "local", "finding"),
    [
        (Configuration.of("pc"), {}, "machine type 'pc' received, this machine is 'microvm'"),
        (Configuration.of("micro"), {}, "machine type 'micro' received"),
        (Configuration.of(""), {}, "machine type '' received"),
        (Configuration(b"microvm", 7, target_page_bits=13), {}, "target page bits 13 received, this machine has 12"),
        (_announcing("x-no-such-thing"), {}, "unknown capability 'x-no-such-thing' received"),
        (
            _announcing("x-ignore-shared"),
            {},
            "'x-ignore-shared' is on at the source and off here, .*off' at the source$",
        ),
        (
            Configuration.of("microvm"),
            {"capabilities": {"mapped-ram"}},
            "'mapped-ram' is off at the source and on here, .*ram off' at the destination$",
        ),
        (Configuration.of("microvm", uuid=UUID), {"uuid": UUID[::-1]}, "UUID 00112233.* received, this machine has ffee"),
    ],
)
def test_a_configuration_that_differs_is_refused(received: Configuration, local: dict, finding: str) -> None:
    with pytest.raises(StreamError, match=finding):
        sections.check_configuration(received, machine_type="microvm", **local)


# -- headers and footers


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (
            SectionHeader(SectionType.QEMU_VM_SECTION_START, 1, "ram", 0, 4),
            "01 00 00 00 01 03 72 61 6d 00 00 00 00 00 00 00 04",
        ),
        (
            SectionHeader(SectionType.QEMU_VM_SECTION_FULL, 0xFFFFFFFF, "cpu", 3, 12),
            "04 ff ff ff ff 03 63 70 75 00 00 00 03 00 00 00 0c",
        ),
        (SectionHeader(SectionType.QEMU_VM_SECTION_PART, 2), "02 00 00 00 02"),
        (SectionHeader(SectionType.QEMU_VM_SECTION_END, 2), "03 00 00 00 02"),
    ],
)
def test_section_headers_go_there_and_back(header: SectionHeader, data: str) -> None:
    encoded = sections.encode_section_header(header)
    assert encoded.hex(" ") == data
    reader = BytesReader(encoded)
    assert sections.read_section_header(reader, reader.read_u8()) == header


@pytest.mark.parametrize("length", range(16))
def test_a_section_header_cut_short_is_refused(length: int) -> None:
    header = sections.encode_section_header(SectionHeader(SectionType.QEMU_VM_SECTION_START, 1, "ram", 0, 4))
    with pytest.raises(StreamError, match="ends inside"):
        sections.read_section_header(BytesReader(header[1 : 1 + length]), 1)


def test_a_section_without_a_name_is_refused() -> None:
    with pytest.raises(StreamError, match="section header at offset 0x4 has an empty name"):
        sections.read_section_header(BytesReader(bytes(13)), SectionType.QEMU_VM_SECTION_FULL)


def test_a_section_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(StreamError, match="the name of a section at offset 0x4 is"):
        sections.read_section_header(BytesReader(b"\0\0\0\1\1\xff" + bytes(8)), SectionType.QEMU_VM_SECTION_FULL)


def test_footers_carry_the_id_of_the_header() -> None:
    assert sections.encode_section_footer(5).hex(" ") == "7e 00 00 00 05"
    sections.read_section_footer(BytesReader(sections.encode_section_footer(5)), 5, "cpu")


@pytest.mark.parametrize(
    ("data", "finding"),
    [
        ("00", r"section 'cpu' at offset 0x10: 0x00 found, expected its footer \(0x7e\)"),
        ("7e00000006", r"section 'cpu': footer at offset 0x10 has id 6, expected 5"),
        ("7e0000", "ends inside the footer of section 'cpu'"),
        ("", "ends inside the footer of section 'cpu'"),
    ],
)
def test_a_wrong_footer_is_refused(data: str, finding: str) -> None:
    with pytest.raises(StreamError, match=finding):
        sections.read_section_footer(BytesReader(bytes.fromhex(data), 16), 5, "cpu")


# -- description


def test_the_description_is_counted_text() -> None:
    assert sections.encode_vmdescription(b"{}").hex(" ") == "06 00 00 00 02 7b 7d"
    reader = BytesReader(sections.encode_vmdescription(b"{}") + b"rest")
    assert sections.skip_vmdescription(reader) == b"{}"
    assert reader.remaining == 4


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x07"])
def test_a_missing_description_is_no_error_and_nothing_is_consumed(data: bytes) -> None:
    reader = BytesReader(data)
    assert sections.skip_vmdescription(reader) is None
    assert reader.offset == 0


def test_a_description_longer_than_what_is_left_or_allowed_is_refused() -> None:
    with pytest.raises(StreamError, match="ends inside the VM description"):
        sections.skip_vmdescription(BytesReader(b"\x06\x00\x00\x00\x05{}"))
    with pytest.raises(StreamError, match="VM description at offset 0x0 is 4294967295 bytes long"):
        sections.skip_vmdescription(BytesReader(b"\x06\xff\xff\xff\xff{}"))


# -- whose section it is


def _table() -> SectionTable[str]:
    return SectionTable(
        [
            SectionEntry("ram", 0, 4, "RAM", 4),
            SectionEntry("cpu", 0, 12, "cpu 0", 11),
            SectionEntry("cpu", 1, 12, "cpu 1", 11),
            SectionEntry("cpu", 2, 12, "cpu 2", 11),
            SectionEntry("timer", 0, 2, "timer", 1),
            SectionEntry("slot0/virtio-blk", 0, 2, "disk", 2, compat_idstr="virtio-blk", compat_instance_id=5),
        ]
    )


def _full(section_id: int, idstr: str, instance_id: int, version_id: int) -> SectionHeader:
    return SectionHeader(SectionType.QEMU_VM_SECTION_FULL, section_id, idstr, instance_id, version_id)


def test_a_section_is_found_by_name_and_instance_and_then_by_its_id() -> None:
    table = _table()
    assert table.bind(_full(7, "cpu", 1, 11)).entry.owner == "cpu 1"
    bound = table.lookup(7)
    assert (bound.entry.owner, bound.version_id, bound.section_id) == ("cpu 1", 11, 7)


def test_ids_are_the_senders_and_may_be_used_again() -> None:
    table = _table()
    table.bind(_full(0, "cpu", 0, 12))
    assert table.bind(_full(0, "timer", 0, 2)).entry.owner == "timer"
    assert table.lookup(0).entry.owner == "timer"


def test_an_older_identity_is_recognised() -> None:
    assert _table().bind(_full(1, "virtio-blk", 5, 2)).entry.owner == "disk"
    with pytest.raises(StreamError, match="no section of that name"):
        _table().bind(_full(1, "virtio-blk", 0, 2))


@pytest.mark.parametrize(
    ("header", "finding"),
    [
        (_full(1, "cpu", 3, 12), "'cpu' instance 3 at offset 0x63: this machine has cpu instances 0, 1 and 2; .* -smp 4"),
        (_full(1, "timer", 1, 2), "'timer' instance 1 at offset 0x63: this machine has timer instance 0; no option"),
        (
            _full(1, "vga", 0, 1),
            "'vga' instance 0 at offset 0x63: this machine has no section of that name, "
            "it has 'ram', 'cpu', 'timer' and 'slot0/virtio-blk'; no option",
        ),
        (_full(1, "cpu", 0, 13), "'cpu' instance 0 at offset 0x63: version 13 received, .* takes 11 to 12; .* a later"),
        (_full(1, "cpu", 0, 10), "'cpu' instance 0 at offset 0x63: version 10 received, .* takes 11 to 12; .* an earlier"),
        (_full(1, "ram", 0, 3), "'ram' instance 0 at offset 0x63: version 3 received, this machine takes 4 to 4"),
    ],
)
def test_a_section_nobody_here_takes_is_refused_in_the_words_of_both_sides(header: SectionHeader, finding: str) -> None:
    with pytest.raises(StreamError, match=finding) as caught:
        _table().bind(header, 99)
    assert (caught.value.section, caught.value.offset) == (header.idstr, 99)


def test_an_id_that_was_never_started_is_refused() -> None:
    table = _table()
    with pytest.raises(StreamError, match="section id 0 was never started, ids so far: none"):
        table.lookup(0)
    table.bind(_full(3, "timer", 0, 2))
    table.bind(_full(1, "cpu", 0, 12))
    with pytest.raises(StreamError, match="section id 2 was never started, ids so far: 1, 3"):
        table.lookup(2)
