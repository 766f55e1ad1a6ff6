"""`qemumig analyze` on what real QEMUs wrote: agrees with independent decodes, and gives memory back."""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from kvm.config import MachineConfig
from kvm.machine import MicroVM
from qemumig.cli.analyze.machines import MICROVM as MODEL
from qemumig.options import CAPABILITIES
from tests.qemumig.cli.recordings import (
    MICROVM,
    RealQemu,
    analyze,
    as_json,
    full_sections,
    record,
    small_stream,
    stored,
    unpacked,
)
from tests.support import guest, host, plain_stream

HOLE = range(0xA0000, 0x100000)  # where guest-physical memory is not pc.ram


def _as_decoded(field: dict[str, Any]) -> list[Any]:
    """A field in the form of the decodes beside the recordings."""
    if field["type"] == "subsection":
        path = re.sub(r"^(<[^>]*>\.)*", "", field["path"])
        return [path, "subsection", int(field["hex"][-8:], 16)]
    return [field["path"], field["type"], field["hex"]]


@pytest.mark.parametrize("name", MICROVM)
def test_agrees_with_the_decode_beside_the_recording(
    name: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stored(directory, unpacked(f"microvm/{name}.mig"))
    decoded = json.loads(unpacked(f"microvm/{name}.json"))
    status, document = as_json(capsys, "--digest", file)
    assert (status, document["problems"], document["machine"]) == (0, [], "microvm")
    sections = full_sections(document)
    for key in ("idstr", "instance_id", "version_id", "section_id"):
        assert [one[key] for one in sections] == [one[key] for one in decoded["sections"]]
    for ours, theirs in zip(sections, decoded["sections"], strict=True):
        assert [_as_decoded(one) for one in ours["fields"]] == theirs["fields"]
    blocks = [[one[key] for key in ("name", "length", "address") if key in one] for one in document["blocks"]]
    assert blocks == decoded["blocks"]
    assert {one["name"]: one["sha256"] for one in document["blocks"]} == decoded["sha256"]
    assert sum(one["count"] for one in document["elements"] if one["type"] == "part") == decoded["ram_parts"]
    assert document["end"] == document["size"] == decoded["stream_bytes"]


COUNTED = ["microvm/q72-live-rounds", "ram/q100-precopy", "ram/q100-xbzrle", "ram/q72-compress-xbzrle"]


@pytest.mark.parametrize("name", COUNTED)
def test_counts_the_records_that_a_plain_reader_counts(
    name: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = unpacked(f"{name}.mig")
    plain = plain_stream.read_stream(data)
    _, document = as_json(capsys, "-s", stored(directory, data))
    ours = {kind: sum(one[kind] for one in document["blocks"]) for kind in ("zero", "normal", "xbzrle", "compressed")}
    assert ours == {
        "zero": plain.records["zero"],
        "normal": plain.records["page"],
        "xbzrle": plain.records["xbzrle"],
        "compressed": plain.records["compress"],
    }


WITH_MEMORY = ["q72-xbzrle", "q100-xbzrle", "q72-compress-xbzrle", "q100-mapped-ram-live"]


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_extracted_memory_is_that_of_the_stopped_source(
    name: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = stored(directory, unpacked(f"ram/{name}.mig")), directory / "memory"
    assert analyze(capsys, "--ram", "pc.ram", "-o", str(out), file)[0] == 0
    memory, expected = out.read_bytes(), unpacked(f"ram/{name}.mem")
    assert len(memory) == len(expected)
    assert memory[: HOLE.start] == expected[: HOLE.start]
    assert memory[HOLE.stop :] == expected[HOLE.stop :]
    assert out.stat().st_blocks * 512 < len(memory) // 2  # pages of zeroes are holes


KINDS = {
    "q100-background-snapshot": ("migration stream", 0, 0),
    "q72-background-snapshot": ("migration stream", 0, 0),
    "q100-postcopy.ch0": ("migration stream", 0, 0),
    "q100-postcopy-hugepages.ch0": ("migration stream", 0, 0),
    "q100-postcopy-recover.ch0": ("migration stream", 1, 1),  # this connection was cut
    "q100-postcopy-recover.rec.ch0": ("second connection of a postcopy recovery", 0, 0),
    "q100-postcopy-preempt.ch1": ("preempt channel", 0, 0),
    "q100-multifd-zlib.ch1": ("multifd channel", 0, 0),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_recording_makes_sense_to_its_end(
    name: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, status, problems = KINDS[name]
    found, document = as_json(capsys, "-s", stored(directory, unpacked(f"ram/{name}.mig")))
    assert (found, document["kind"], len(document["problems"])) == (status, kind, problems)
    assert document["end"] == (None if problems else document["size"])
    assert sum(one["normal"] for one in document["blocks"]) > 0


def test_background_snapshot_has_every_page_once_and_no_end_section(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, document = as_json(capsys, "-s", stored(directory, unpacked("ram/q100-background-snapshot.mig")))
    assert not [one for one in document["elements"] if one["type"] == "end"]
    for block in document["blocks"]:
        assert (block["zero"] + block["normal"]) * 4096 == block["length"]


def test_a_cut_postcopy_connection_names_the_byte_at_which_it_ended(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = unpacked("ram/q100-postcopy-recover.ch0.mig")
    _, document = as_json(capsys, "-s", stored(directory, data))
    (problem,) = document["problems"]
    assert problem["offset"] == len(data)
    assert "the footer of section 'ram'" in problem["message"]


def test_postcopy_devices_are_found_inside_the_package(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, document = as_json(capsys, stored(directory, unpacked("ram/q100-postcopy.ch0.mig")))
    packaged = [one for one in document["elements"] if one["packaged"]]
    names = [one.get("idstr", one.get("command")) for one in packaged]
    assert names[0] == "MIG_CMD_POSTCOPY_LISTEN"
    assert names[-1] == "MIG_CMD_POSTCOPY_RUN"
    (state,) = [one for one in packaged if one.get("idstr") == "globalstate"]
    assert state["split_by"] == "known layout"
    assert bytes.fromhex(state["fields"][1]["hex"]).rstrip(b"\0") == b"running"


def test_the_block_list_of_huge_pages_has_their_size(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, document = as_json(capsys, "-s", stored(directory, unpacked("ram/q100-postcopy-hugepages.ch0.mig")))
    assert [one.get("host_page_size") for one in document["blocks"]] == [2 << 20, None, None]


def test_reads_standard_input_through_a_pipe(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored(directory, unpacked("microvm/q100-1cpu.mig"))
    _, expected = as_json(capsys, path)
    with open(path, "rb") as file:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file))
        status, document = as_json(capsys, "-")
    assert status == 0
    assert {**document, "file": path} == expected


def test_a_stream_may_begin_anywhere_in_a_file(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = unpacked("microvm/q100-1cpu.mig")
    _, plain = as_json(capsys, "-s", stored(directory, data))
    status, document = as_json(capsys, "-s", "--offset", "0x64", stored(directory, bytes(100) + data, "later"))
    assert (status, document["problems"]) == (0, [])
    assert document["elements"][3]["offset"] == plain["elements"][3]["offset"] + 100


MACHINES = {
    "pc": ("-M", "pc", "-m", "16", "-device", "e1000", "-device", "virtio-balloon", "-device", "piix3-usb-uhci"),
    "q35": ("-M", "q35", "-m", "16", "-smp", "2", "-device", "virtio-scsi-pci", "-device", "pcie-root-port"),
}


@pytest.mark.needs("qemu")
@pytest.mark.parametrize("system", host.qemus() or ("",), ids=lambda name: Path(name).name)
@pytest.mark.parametrize("machine", MACHINES)
def test_splits_every_section_of_any_machine(
    machine: str, system: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = directory / "stream"
    qemu = RealQemu(system, *MACHINES[machine])
    try:
        qemu.migrate(path)
    finally:
        qemu.close()
    plain = plain_stream.read_stream(path.read_bytes())
    status, document = as_json(capsys, "--digest", str(path))
    assert (status, document["problems"]) == (0, [])
    sections = full_sections(document)
    assert {one["split_by"] for one in sections} == {"description"}
    assert [one["idstr"] for one in sections] == [one.idstr for one in plain.sections]
    assert [len(one["fields"]) for one in sections] == [len(one.fields) for one in plain.sections]
    assert {one["name"]: one["sha256"] for one in document["blocks"]} == plain.digests()


# -- two recordings


def test_a_recording_does_not_differ_from_itself(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = stored(directory, unpacked("ram/q100-xbzrle.mig"))
    assert as_json(capsys, "--diff", file, file)[1]["same"]
    assert analyze(capsys, "--diff", file, file)[0] == 0


def test_memory_sent_in_another_way_is_the_same(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = bytes(4096), bytes(100) + b"\1" + bytes(3995)
    plain = stored(directory, small_stream(record(0x3008, new)), "plain")
    delta = record(0x3040, b"\1\0\3" + b"\x64\1\1", None)
    patched = stored(directory, small_stream(record(0x3008, old), record(0x0002, b"\0", None), delta), "patched")
    assert analyze(capsys, "--diff", plain, patched)[0] == 0


def test_difference_of_pages_and_fields_is_named(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = unpacked("microvm/q100-1cpu.mig")
    left = stored(directory, data, "left")
    _, document = as_json(capsys, left)
    timer = full_sections(document)[0]
    changed = bytearray(data)
    changed[timer["payload_offset"] + 7] ^= 1
    page = data.index(b"\x08\x0bmicrovm.ram") + 13  # the first page that came in full, and what came last for it
    changed[page + 5] ^= 1
    status, found = as_json(capsys, "--diff", stored(directory, bytes(changed), "right"), left)
    assert status == 1
    assert [one["place"] for one in found["differences"]] == ["section timer instance 0 cpu_ticks_offset"]
    offset = struct.unpack_from(">Q", data, page - 20)[0] & ~0xFFF
    assert [(one["block"], one["runs"]) for one in found["pages"]] == [("microvm.ram", [[offset // 4096, 1]])]


def test_pages_that_differ_are_given_as_runs(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = [record(number << 12 | 8, bytes([number + 1]) * 4096) for number in (2, 3, 4, 9)]
    left, right = stored(directory, small_stream(*pages), "left"), stored(directory, small_stream(), "right")
    _, found = as_json(capsys, "--diff", left, right)
    assert found["pages"] == [{"block": "pc.ram", "page_size": 4096, "pages": 4, "runs": [[2, 3], [9, 1]]}]


# -- would our machine take it


FIRMWARE = "  RAM block pc.bios: start it with -bios IMAGE of 65536 bytes (the image that the source has)\n"


def test_plain_microvm_fits_with_its_memory_and_its_processors(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = analyze(capsys, "--for", "microvm", stored(directory, unpacked("microvm/q100-2cpu-checks.mig")))
    memory = "  RAM block microvm.ram: start it with -m 32M\n"
    assert (status, out) == (0, f"microvm takes it:\n  2 vCPUs: start it with -smp 2\n{memory}{FIRMWARE}")


def _needs(found: dict[str, Any]) -> dict[str, str]:
    """What the machine is to be started with, but for memory and firmware, which every recording has."""
    plain = ("RAM block microvm.ram", "RAM block pc.bios")
    return {one["what"]: one["options"] for one in found["needs"] if one["what"] not in plain}


NEEDS = {
    "q100-acpi": {
        "section ioapic instance 1": "-M acpi=on,ioapic2=on",
        "section acpi-ged instance 0": "-M acpi=on",
        **{f"RAM block /rom@etc/{name}": "-M acpi=on" for name in ("acpi/tables", "table-loader", "acpi/rsdp")},
    },
    "q72-legacy-devices": {
        "section i8259 instance 0": "-M pic=on",
        "section i8259 instance 1": "-M pic=on",
        "section mc146818rtc instance 0": "-M rtc=on",
        "section i8254 instance 0": "-M pit=on",
    },
    "q100-blk-modern": {
        "section virtio-mmio@00000000feb00000/virtio-blk instance 0": "-blockdev driver=file,node-name=disk0,"
        "filename=IMAGE -device virtio-blk-device,drive=disk0,bus=virtio-mmio-bus.0"
    },
    "q72-backend-named": {"RAM block mem0": "-m 32M -object memory-backend-ram,id=mem0,size=32M -M memory-backend=mem0"},
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_the_plain_machine_lacks_is_listed_with_the_option_that_adds_it(
    name: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = as_json(capsys, "--for", "microvm", stored(directory, unpacked(f"microvm/{name}.mig")))
    assert (status, found["fits"], found["lacks"]) == (0, True, [])
    assert _needs(found) == NEEDS[name]


def test_every_recording_of_a_microvm_fits_but_those_of_capabilities_that_are_not_built(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = any(one.name == "x-ignore-shared" and one.built for one in CAPABILITIES)
    for name in MICROVM:
        status, found = as_json(capsys, "--for", "microvm", stored(directory, unpacked(f"microvm/{name}.mig")))
        lacks = [one["what"] for one in found["lacks"]]
        assert lacks == (["capability x-ignore-shared"] if "ignore-shared" in name and not built else []), name
        assert status == bool(lacks)


@pytest.mark.parametrize("name", ["q100-xbzrle", "q72-compress-xbzrle"])
def test_every_kind_of_page_record_is_taken_without_a_capability(
    name: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, found = as_json(capsys, "--for", "microvm", stored(directory, unpacked(f"ram/{name}.mig")))
    assert not [one for one in found["lacks"] if "capability" in one["what"]]


def test_another_machine_is_refused_with_both_names(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = analyze(capsys, "--for", "microvm", stored(directory, unpacked("ram/q100-precopy.mig")))
    assert status == 1
    assert "the recording is of isapc, this machine is microvm" in out
    assert "give it to a QEMU started with -M isapc, or start it anew with -M microvm" in out
    (no_such,) = [line for line in out.splitlines() if line.endswith("microvm has no such section")]
    assert "section dma instance 0, section dma instance 1" in no_such


def test_a_subsection_that_is_not_known_is_named(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = unpacked("microvm/q100-1cpu.mig")
    described = data.replace(b"cpu/tsc_khz", b"cpu/hal9000")  # in the section and in its description
    assert described.count(b"cpu/hal9000") == 2
    status, found = as_json(capsys, "--for", "microvm", stored(directory, described))
    assert (status, found["problems"]) == (1, [])
    (lack,) = found["lacks"]
    assert lack["what"] == "section cpu instance 0"
    assert lack["why"] == "microvm does not know its subsection cpu/hal9000"
    assert "-cpu qemu64,pni=off" in lack["advice"]


@pytest.mark.needs("kvm")
def test_the_list_has_what_the_machine_has(directory: Path) -> None:
    config = MachineConfig(bios=guest.write_image(directory), ram_size=64 << 20, cpu_features={"pni": False})
    machine = MicroVM(config, lambda name, data=None: None, lambda warning: None)
    try:
        names = [one.idstr for one in machine.sections()] + ["globalstate"]
        for name in names:
            assert [one.idstr for one in MODEL.sections if re.fullmatch(one.idstr, name)], name
        blocks = [one.idstr for one in machine.ram_blocks]
        assert set(MODEL.blocks) <= set(blocks)
        assert all(one in MODEL.blocks or re.fullmatch(MODEL.optional_blocks, one) for one in blocks)
        assert machine.machine_type == MODEL.machine_type
    finally:
        machine.close()


# -- the command itself


def test_extraction_never_overwrites_the_recording(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = stored(directory, small_stream())
    status, _, err = analyze(capsys, "--ram", "pc.ram", "-o", file, file)
    assert (status, Path(file).read_bytes()) == (1, small_stream())
    assert "the recording itself" in err


def test_a_block_that_is_not_there_is_answered_with_those_that_are(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = directory / "out"
    status, _, err = analyze(capsys, "--ram", "vga", "-o", str(out), stored(directory, small_stream()))
    assert (status, out.exists()) == (1, False)
    assert "no RAM block 'vga'; it has 'pc.ram'" in err


def test_a_file_that_is_not_there_is_one_sentence(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = analyze(capsys, str(directory / "nothing"))
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert "nothing" in err


def test_names_from_a_file_cannot_steer_the_terminal(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = analyze(capsys, stored(directory, small_stream(name=b"\x1b[2Jram")))
    assert "\x1b" not in out
    assert "\\x1b[2Jram" in out


def test_the_table_shows_fields_by_name_and_value(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = stored(directory, unpacked("microvm/q100-1cpu.mig"))
    out = analyze(capsys, file)[1]
    assert re.search(r"runstate +buffer +'running'", out)
    assert re.search(r"microvm\.ram +33 554 432 +7 926 +523 +0 +0", out)
    assert "runstate" not in analyze(capsys, "-s", file)[1]


def test_digest_is_that_of_the_extracted_file(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = stored(directory, small_stream(record(0x5008, b"x" * 4096))), directory / "out"
    analyze(capsys, "--ram", "pc.ram", "-o", str(out), file)
    _, document = as_json(capsys, "--digest", file)
    assert document["blocks"][0]["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
