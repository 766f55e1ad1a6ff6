"""Whole streams of real QEMUs through the loader that a destination uses: memory and devices come out as decoded."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from qemumig.channels.channel import SocketChannel
from qemumig.destination.loader import StreamLoader
from qemumig.errors import ChannelError, StreamError
from qemumig.machine import DeviceSection
from qemumig.options import MigrationOptions
from qemumig.wire.stream import InputStream, OutputStream
from tests.qemumig.savevm import recorded
from tests.support.memory import Memory, channel_pair

SHARED = [name for name in recorded.names() if "ignore-shared" in name]
UUID = bytes.fromhex("00112233445566778899aabbccddeeff")


def machine_of(recording: recorded.Recording, *, named: bool = False) -> SimpleNamespace:
    """What the recording was made on: its RAM blocks, fresh, and its devices; `mem0` is shared, of a file if *named*."""
    memories = [
        Memory(idstr, size, **({"shared": True, "named": named} if idstr == "mem0" else {}))
        for idstr, size, *_ in recording.decoded["blocks"]
    ]
    devices = [
        DeviceSection(one["idstr"], one["instance_id"], recorded.VMSTATES[one["idstr"]])
        for one in recording.decoded["sections"]
        if one["idstr"] != "globalstate"
    ]
    return SimpleNamespace(
        machine_type="microvm",
        uuid=UUID if recording.configuration.uuid else None,
        ram_blocks=[memory.block for memory in memories],
        memories=memories,
        sections=lambda: devices,
    )


def note(memory: Memory) -> None:
    """Leave it as it is."""


def write(channel: SocketChannel, data: bytes) -> None:
    out = OutputStream(channel)
    with contextlib.suppress(ChannelError):  # the loader has seen enough
        out.write(data)
        out.flush()
    channel.finish()


def load(
    name: str, options: MigrationOptions | None = None, *, named: bool = False, prepare: Callable[[Memory], None] = note
) -> tuple[recorded.Recording, SimpleNamespace, StreamLoader]:
    """Load the recording; *prepare* sees each block before."""
    recording = recorded.load(name)
    machine = machine_of(recording, named=named)
    for memory in machine.memories:
        prepare(memory)

    def unexpected(*arguments: object) -> None:
        raise AssertionError("a recording to a file has no return path")

    with channel_pair() as (left, right):
        writer = threading.Thread(target=write, args=(left, recording.data))
        writer.start()
        loader = StreamLoader(
            machine,
            options or MigrationOptions(),
            InputStream(right),
            open_return_path=unexpected,
            pong=unexpected,
            look_round=lambda: None,
        )
        try:
            loader.load()
        finally:
            right.shutdown()
            writer.join()
    return recording, machine, loader


@pytest.mark.parametrize("name", [name for name in recorded.names() if name not in SHARED])
def test_memory_and_devices_come_out_as_decoded(name: str) -> None:
    recording, machine, loader = load(name)
    digests = {memory.block.idstr: hashlib.sha256(memory.map).hexdigest() for memory in machine.memories}
    assert digests == recording.decoded["sha256"]
    expected = [(one["idstr"], one["instance_id"]) for one in recording.decoded["sections"]]
    found = [(section.idstr, section.instance_id) for section, _ in loader.staged]
    assert found == [one for one in expected if one[0] != "globalstate"]
    for section, record in loader.staged:
        (device,) = [
            one
            for one in recording.devices
            if (one.header.idstr, one.header.instance_id) == (section.idstr, section.instance_id)
        ]
        assert section.vmstate.save(record)[0] == device.payload
    states = {"paused": "paused", "inflight": "io-error"}
    assert loader.runstate is not None
    assert loader.runstate.value == next((states[word] for word in states if word in name), "running")
    assert not loader.description_missing


def ignoring() -> MigrationOptions:
    options = MigrationOptions()
    options.set_capabilities([("x-ignore-shared", True)])
    return options


def mark(memory: Memory) -> None:
    if memory.block.idstr == "mem0":
        memory.write(0x5000, b"here already")


def test_shared_memory_without_a_name_is_sent_by_later_versions_and_taken() -> None:
    recording, machine, loader = load("q100-ignore-shared", ignoring())
    digests = {memory.block.idstr: hashlib.sha256(memory.map).hexdigest() for memory in machine.memories}
    assert digests == recording.decoded["sha256"]
    assert not loader.description_missing


def test_shared_memory_that_was_left_out_is_found_as_it_is() -> None:
    recording, machine, _ = load("q72-ignore-shared", ignoring(), named=True, prepare=mark)
    for memory in machine.memories:
        if memory.block.idstr == "mem0":
            assert memory.contents() == bytes(0x5000) + b"here already" + bytes(len(memory.map) - 0x500C)
        else:
            assert hashlib.sha256(memory.map).hexdigest() == recording.decoded["sha256"][memory.block.idstr]


def test_memory_that_was_left_out_but_cannot_be_here_is_missed() -> None:
    finding = "no page of block 'mem0' has come; the source leaves out all shared memory, and this one is of no file"
    with pytest.raises(StreamError, match=finding):
        load("q72-ignore-shared", ignoring())


@pytest.mark.parametrize("name", SHARED)
def test_a_capability_that_is_off_here_is_named(name: str) -> None:
    with pytest.raises(StreamError, match="capability 'x-ignore-shared' is on at the source and off here"):
        load(name)
