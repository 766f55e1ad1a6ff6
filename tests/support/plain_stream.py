"""A second, plain reader of whole precopy streams: an oracle that shares no code with the product.

In    every byte of a precopy migration stream, as one buffer
Out   a `PlainStream`: the configuration, the guest memory of each block as it ends up, how many records of
      each kind there were, the bytes and fields of every device section, the commands

    stream = header configuration? element* EOF VMDESCRIPTION          stream.md §2 to §9
    element = START | PART | END of `ram` | FULL of a device | COMMAND

A device section carries no length, so the description at the end of the stream is found first and splits them
(machine.md §6).  Every byte is accounted for; whatever is out of the ordinary raises `PlainStreamError`.
It is written from stream.md, ram.md, xbzrle.md, compress.md and vmstate.md, for clearness and not for speed.

Not read here: postcopy, multifd channels, mapped-ram.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

PAGE = 4096
READABLE_CAPABILITIES = {"x-ignore-shared"}  # the only announced capability whose layout is read here

ZERO, MEM_SIZE, FULL_PAGE, EOS = 0x002, 0x004, 0x008, 0x010
CONTINUE, XBZRLE, HOOK, COMPRESS, FLUSH = 0x020, 0x040, 0x080, 0x100, 0x200

COMMAND_LENGTHS = {1: {0}, 2: {4}, 3: {0, 16}, 8: {0}, 11: {0}}  # number: lengths that precopy may show


class PlainStreamError(ValueError):
    """The stream is not a well-formed precopy stream; the message names the offset."""


@dataclass
class PlainBlock:
    """One RAM block: its memory as the records leave it, and how often each page was sent."""

    name: str
    length: int
    guest_address: int | None = None
    memory: bytearray = field(default_factory=bytearray)
    times_sent: array[int] = field(default_factory=lambda: array("I"))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.memory).hexdigest()


@dataclass
class PlainSection:
    """One FULL section of a device.

    *fields* are (path, type, hex); a subsection begins with (">>name", "subsection", version).
    """

    idstr: str
    instance_id: int
    version_id: int
    section_id: int
    data: bytes
    fields: list[tuple[str, str, Any]]


@dataclass
class PlainStream:
    """What a stream says, taken apart."""

    machine: str | None = None
    capabilities: list[str] = field(default_factory=list)
    uuid: bytes | None = None
    blocks: dict[str, PlainBlock] = field(default_factory=dict)
    records: Counter[str] = field(default_factory=Counter)  # zero, page, xbzrle, compress, flush, hook
    ram_sections: Counter[str] = field(default_factory=Counter)  # start, part, end
    sections: list[PlainSection] = field(default_factory=list)
    commands: list[tuple[int, bytes]] = field(default_factory=list)
    order: list[str] = field(default_factory=list)  # elements as they came: "ram start", "command 1", "cpu 0", …
    description: dict[str, Any] = field(default_factory=dict)

    def section(self, idstr: str, instance_id: int = 0) -> PlainSection:
        """The one section of that identity."""
        found = [s for s in self.sections if (s.idstr, s.instance_id) == (idstr, instance_id)]
        if len(found) != 1:
            raise PlainStreamError(f"{len(found)} sections are named {idstr!r} instance {instance_id}, expected one")
        return found[0]

    def digests(self) -> dict[str, str]:
        """SHA-256 of every block's memory."""
        return {block.name: block.sha256 for block in self.blocks.values()}


class Bytes:
    """A cursor over the stream that never passes its end."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = memoryview(data)
        self.offset = 0

    def take(self, length: int) -> memoryview:
        piece = self.data[self.offset : self.offset + length]
        if len(piece) != length:
            raise PlainStreamError(f"offset {self.offset:#x}: {length} bytes expected, {len(piece)} left")
        self.offset += length
        return piece

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def name(self) -> str:
        at = self.offset
        try:
            return str(self.take(self.number(1)), "ascii")
        except UnicodeDecodeError as error:
            raise PlainStreamError(f"offset {at:#x}: a name is not ASCII") from error

    def demand(self, size: int, value: int, what: str) -> None:
        at = self.offset
        found = self.number(size)
        if found != value:
            raise PlainStreamError(f"offset {at:#x}: {what} is {found:#x}, expected {value:#x}")


def read_stream(data: bytes | memoryview, *, background_snapshot: bool = False) -> PlainStream:
    """Take a whole precopy stream apart; *background_snapshot* says that `ram` has no END (ram.md §11)."""
    return Reader(data, background_snapshot).run()


class Reader:
    """One walk over one stream."""

    def __init__(self, data: bytes | memoryview, background_snapshot: bool) -> None:
        self.at = Bytes(data)
        self.background_snapshot = background_snapshot
        self.stream = PlainStream()
        self.ram_id: int | None = None
        self.ram_ended = False
        self.block: PlainBlock | None = None  # what CONTINUE refers to; it lives across sections

    def run(self) -> PlainStream:
        description_at = find_description(self.at.data)
        self.stream.description = json.loads(bytes(self.at.data[description_at + 6 :]))
        self.devices = list(self.stream.description["devices"])
        self.read_header()
        while self.at.offset < description_at:
            self.read_element()
        if self.at.offset != description_at:
            raise PlainStreamError(f"offset {self.at.offset:#x}: an element runs past the end mark at {description_at:#x}")
        if self.devices:
            raise PlainStreamError(f"section {self.devices[0]['name']!r} is described but was not sent")
        if self.ram_id is not None and self.ram_ended == self.background_snapshot:
            raise PlainStreamError(f"`ram` has {'an' if self.ram_ended else 'no'} END section")
        return self.stream

    def read_header(self) -> None:
        self.at.demand(4, 0x5145564D, "magic")
        self.at.demand(4, 3, "stream version")
        if self.at.data[self.at.offset] == 0x07:
            self.at.take(1)
            self.read_configuration()

    def read_configuration(self) -> None:
        self.stream.machine = str(self.at.take(self.at.number(4)), "ascii")
        while self.at.data[self.at.offset] == 0x05:
            self.at.take(1)
            name = self.at.name()
            self.at.demand(4, 1, f"version of {name}")
            if name == "configuration/capabilities":
                self.stream.capabilities = [self.at.name() for _ in range(self.at.number(4))]
            elif name == "configuration/uuid":
                self.stream.uuid = bytes(self.at.take(16))
            else:
                raise PlainStreamError(f"configuration subsection {name!r} is not expected on x86")
        odd = set(self.stream.capabilities) - READABLE_CAPABILITIES
        if odd:
            raise PlainStreamError(f"capabilities {sorted(odd)} change the layout in ways not read here")

    def read_element(self) -> None:
        at = self.at.offset
        kind = self.at.number(1)
        if kind == 0x08:
            self.read_command()
        elif kind in (0x01, 0x04):
            self.read_first(kind)
        elif kind in (0x02, 0x03):
            self.read_ram_again(kind)
        else:
            raise PlainStreamError(f"offset {at:#x}: element type {kind:#04x} is not expected here")

    def read_command(self) -> None:
        at = self.at.offset
        number, length = self.at.number(2), self.at.number(2)
        if length not in COMMAND_LENGTHS.get(number, ()):
            raise PlainStreamError(f"offset {at:#x}: command {number} with {length} bytes is not expected in precopy")
        self.stream.commands.append((number, bytes(self.at.take(length))))
        self.stream.order.append(f"command {number}")

    def read_first(self, kind: int) -> None:
        """START or FULL: a section with its identity."""
        section_id, idstr = self.at.number(4), self.at.name()
        instance_id, version_id = self.at.number(4), self.at.number(4)
        if kind == 0x04:
            self.read_device(idstr, instance_id, version_id, section_id)
            return
        if (idstr, instance_id, version_id) != ("ram", 0, 4) or self.ram_id is not None:
            raise PlainStreamError(f"START of {idstr!r} instance {instance_id} version {version_id} is not expected")
        self.ram_id = section_id
        self.read_ram("start")

    def read_ram_again(self, kind: int) -> None:
        at = self.at.offset
        section_id = self.at.number(4)
        if section_id != self.ram_id or self.ram_ended:
            raise PlainStreamError(f"offset {at:#x}: section id {section_id} belongs to no open live section")
        self.ram_ended = kind == 0x03
        self.read_ram("end" if self.ram_ended else "part")

    def read_footer(self, section_id: int) -> None:
        self.at.demand(1, 0x7E, "footer mark")
        self.at.demand(4, section_id, "section id in the footer")

    # --- devices

    def read_device(self, idstr: str, instance_id: int, version_id: int, section_id: int) -> None:
        if not self.devices or self.devices[0]["name"] != idstr:
            raise PlainStreamError(f"offset {self.at.offset:#x}: section {idstr!r} is not the next one described")
        described = self.devices.pop(0)
        if described.get("version", version_id) != version_id:
            raise PlainStreamError(f"section {idstr!r} has version {version_id}, described as {described['version']}")
        start = self.at.offset
        fields = [*state_fields(self.at, described, "")]
        data = bytes(self.at.data[start : self.at.offset])
        self.stream.sections.append(PlainSection(idstr, instance_id, version_id, section_id, data, fields))
        self.stream.order.append(f"{idstr} {instance_id}")
        self.read_footer(section_id)

    # --- ram

    def read_ram(self, kind: str) -> None:
        self.stream.ram_sections[kind] += 1
        self.stream.order.append(f"ram {kind}")
        while self.read_record():
            pass
        assert self.ram_id is not None
        self.read_footer(self.ram_id)

    def read_record(self) -> bool:
        """One record; False after EOS."""
        at = self.at.offset
        head = self.at.number(8)
        value, flags = head & ~(PAGE - 1), head & (PAGE - 1)
        kind = flags & ~CONTINUE
        if kind in (ZERO, FULL_PAGE, XBZRLE, COMPRESS):
            self.read_page(kind, value, bool(flags & CONTINUE))
        elif flags == MEM_SIZE:
            self.read_block_list(value)
        elif flags in (EOS, FLUSH, HOOK) and value == 0:
            if flags == EOS:
                return False
            self.stream.records["flush" if flags == FLUSH else "hook"] += 1
        else:
            raise PlainStreamError(f"offset {at:#x}: record head {head:#x} has flags that do not go together")
        return True

    def read_block_list(self, total: int) -> None:
        if self.stream.blocks:
            raise PlainStreamError(f"offset {self.at.offset:#x}: a second list of blocks")
        while total > 0:
            block = PlainBlock(self.at.name(), self.at.number(8))
            if "x-ignore-shared" in self.stream.capabilities:
                block.guest_address = self.at.number(8)
            if block.name in self.stream.blocks or block.length % PAGE or not 0 < block.length <= total:
                raise PlainStreamError(f"offset {self.at.offset:#x}: block {block.name!r} of {block.length:#x} bytes")
            block.memory = bytearray(block.length)
            block.times_sent = array("I", bytes(4 * (block.length // PAGE)))
            self.stream.blocks[block.name] = block
            total -= block.length

    def read_page(self, kind: int, offset: int, same_block: bool) -> None:
        at = self.at.offset
        if not same_block:
            name = self.at.name()
            self.block = self.stream.blocks.get(name)
            if self.block is None:
                raise PlainStreamError(f"offset {at:#x}: block {name!r} is not in the list")
        if self.block is None or offset >= self.block.length:
            raise PlainStreamError(f"offset {at:#x}: page {offset:#x} lies in no block")
        block, page = self.block, slice(offset, offset + PAGE)
        if kind == ZERO:
            self.at.demand(1, 0, "fill byte")
            block.memory[page] = bytes(PAGE)
            self.stream.records["zero"] += 1
        elif kind == FULL_PAGE:
            block.memory[page] = self.at.take(PAGE)
            self.stream.records["page"] += 1
        elif kind == XBZRLE:
            self.at.demand(1, 1, "delta encoding")
            block.memory[page] = patched(bytes(block.memory[page]), bytes(self.at.take(self.at.number(2))))
            self.stream.records["xbzrle"] += 1
        else:
            block.memory[page] = inflated(bytes(self.at.take(self.at.number(4))))
            self.stream.records["compress"] += 1
        block.times_sent[offset // PAGE] += 1


def find_description(data: memoryview) -> int:
    """Where EOF and the description begin: the place whose length leads to the very end (stream.md §8)."""
    whole = bytes(data)
    place = whole.rfind(b"\0\x06")
    while place >= 0:
        if place + 6 <= len(whole) and int.from_bytes(whole[place + 2 : place + 6], "big") == len(whole) - place - 6:
            return place
        place = whole.rfind(b"\0\x06", 0, place + 1)
    raise PlainStreamError(f"no end mark with a description closes the {len(whole)} bytes")


def patched(old: bytes, delta: bytes) -> bytes:
    """*old* with *delta* applied (xbzrle.md §2)."""
    page, position, i = bytearray(old), 0, 0
    while i < len(delta):
        skip, i = uleb(delta, i)
        if skip == 0 and position:
            raise PlainStreamError("a delta has an empty skip after its first pair")
        position += skip
        count, i = uleb(delta, i)
        if count == 0 or position + count > PAGE or i + count > len(delta):
            raise PlainStreamError(f"a delta changes {count} bytes at {position} with {len(delta) - i} bytes left")
        page[position : position + count] = delta[i : i + count]
        position, i = position + count, i + count
    return bytes(page)


def uleb(delta: bytes, i: int) -> tuple[int, int]:
    """The number at *i*, one or two bytes, and where the next begins."""
    if i + 2 > len(delta):
        raise PlainStreamError("a delta ends inside a number")
    if delta[i] < 0x80:
        return delta[i], i + 1
    if delta[i + 1] >= 0x80:
        raise PlainStreamError("a number in a delta is longer than two bytes")
    return delta[i] & 0x7F | delta[i + 1] << 7, i + 2


def inflated(data: bytes) -> bytes:
    """One zlib page (compress.md)."""
    try:
        page = zlib.decompress(data)
    except zlib.error as error:
        raise PlainStreamError(f"a compressed page is damaged: {error}") from error
    if len(page) != PAGE:
        raise PlainStreamError(f"a compressed page holds {len(page)} bytes, expected {PAGE}")
    return page


def state_fields(at: Bytes, state: dict[str, Any], path: str) -> Any:
    """Yield the fields of one described state as they lie in the stream, then those of its subsections."""
    for entry in state.get("fields", ()):
        yield from field_values(at, entry, path + entry.get("name", "?"))
    for subsection in state.get("subsections", ()):
        name = subsection["vmsd_name"]
        at.demand(1, 0x05, "subsection mark")
        if at.name() != name:
            raise PlainStreamError(f"offset {at.offset:#x}: subsection {name!r} is described, another one is there")
        at.demand(4, subsection["version"], f"version of {name}")
        yield f"{path}>>{name}", "subsection", subsection["version"]
        yield from state_fields(at, subsection, f"{path}<{name}>.")


def field_values(at: Bytes, entry: dict[str, Any], path: str) -> Any:
    """Yield one described field, element by element."""
    if "index" in entry:
        path += f"[{entry['index']}]"
    count = entry.get("array_len", 1)
    inner = entry.get("struct")
    if entry["type"] == "vstruct":
        inner = entry  # it carries the nested state itself; so does `tmp`, which is left as bytes
    for k in range(count):
        element = path if "array_len" not in entry else f"{path}[{k}]"
        if inner is None:
            yield element, entry["type"], bytes(at.take(entry["size"])).hex()
            continue
        start = at.offset
        yield from state_fields(at, inner, element + ".")
        if at.offset - start != entry["size"]:
            raise PlainStreamError(f"field {element}: its parts take {at.offset - start} bytes, not {entry['size']}")
