"""StreamLoader: the elements of a stream, one after the other (stream.md §2, §3, §6).

    header, configuration, { section | command }, EOF, description
              ram sections ─▶ guest RAM, by RamLoader
              device state ─▶ records, staged until the whole stream is there

Threads   one, for the life of the loader.
Holds     (1) every length, id, name and version is checked before use; the first that is wrong ends the load
          (2) device state has no effect: `staged` is handed over when everything is read
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

from .. import trace
from ..errors import MachineError, StreamError
from ..machine import GLOBALSTATE_SECTION, DeviceSection, Machine
from ..multifd.receivers import Receivers
from ..options import MigrationOptions
from ..qapi import RunState
from ..ram import live
from ..ram.landing import Landing
from ..ram.load import RamLoader
from ..ram.mapped import MappedLoader, PageFiles
from ..savevm import commands, remedies, sections
from ..savevm.reader import BytesReader, Reader
from ..savevm.rehearsal import rehearse
from ..savevm.sections import SectionEntry, SectionTable
from ..wire.format import SectionType
from ..wire.stream import InputStream

if TYPE_CHECKING:
    from ..postcopy.place import PageReceiver
    from .postcopy import PostcopyDestination

WITH_IDENTITY = (SectionType.QEMU_VM_SECTION_START, SectionType.QEMU_VM_SECTION_FULL)
SECTIONS = (*WITH_IDENTITY, SectionType.QEMU_VM_SECTION_PART, SectionType.QEMU_VM_SECTION_END)

_OPTIONAL: dict[int, str] = {  # what stands between sections when the property is on
    SectionType.QEMU_VM_CONFIGURATION: "send-configuration",
    SectionType.QEMU_VM_SECTION_FOOTER: "send-section-footer",
}


class StreamLoader:
    """Loads one stream into *machine*.

    *open_return_path* is called when the source asks for it, *pong* answers its pings; *look_round* is called now and
    then and may raise to end the load.  *postcopy* obeys the commands of postcopy; None: they are refused.  Device state
    that comes in a package is handed to *settle* before the next ping is answered.  *receive* begins to load from further
    channels, where there are any.
    """

    def __init__(
        self,
        machine: Machine,
        options: MigrationOptions,
        stream: InputStream,
        *,
        open_return_path: Callable[[], None],
        pong: Callable[[int], None],
        look_round: Callable[[], None],
        postcopy: PostcopyDestination | None = None,
        settle: Callable[[], None] = lambda: None,
        receive: Callable[[Landing], Receivers] | None = None,
    ) -> None:
        self._machine = machine
        self._options = options
        self.stream = stream
        self._reader: Reader = stream  # the stream, or the bytes of a package
        self._open_return_path = open_return_path
        self._pong = pong
        self._look_round = look_round
        self._postcopy = postcopy
        self._settle = settle
        self._is_package = False
        self._table: SectionTable[DeviceSection | None] = SectionTable(self._entries())
        self.landing = Landing(machine.ram_blocks, ignore_shared=options.capability("x-ignore-shared"))
        self.receivers = receive(self.landing) if receive is not None else None
        on_flush = self.receivers.flush if self.receivers is not None else None
        self.ram: RamLoader | PageReceiver = RamLoader(stream, self.landing, on_flush)
        self.staged: list[tuple[DeviceSection, Any]] = []
        self.places: dict[tuple[str, int], int] = {}  # where in the stream each staged section began
        self.runstate: RunState | None = None  # of the source, as its section globalstate says
        self.description_missing = False
        self.handed_over = False  # postcopy runs: the rest of the stream belongs to another thread

    def _entries(self) -> list[SectionEntry[DeviceSection | None]]:
        """What this machine can take; `ram` belongs to no device."""
        entries: list[SectionEntry[DeviceSection | None]] = [
            SectionEntry(live.IDSTR, live.INSTANCE_ID, live.VERSION_ID, None, live.VERSION_ID)
        ]
        for section in (*self._machine.sections(), GLOBALSTATE_SECTION):
            vmstate = section.vmstate
            entries.append(
                SectionEntry(section.idstr, section.instance_id, vmstate.version_id, section, vmstate.oldest_version)
            )
        return entries

    def load(self) -> None:
        """Read the stream to its end, or until postcopy runs.

        StreamError, ChannelError or MigrationCancelled when that is not possible.
        """
        if not self._options.capability("mapped-ram"):
            self._load()
            return
        assert isinstance(self.ram, RamLoader)
        with closing(PageFiles(self.stream.channel, self._options, "dst/recv")) as files:
            self.ram.load_pages = MappedLoader(self.stream, self.landing, files, self._look_round).load_block
            self._load()

    def _load(self) -> None:
        trace.loadvm_state_setup()
        sections.read_file_header(self._reader)
        if self._options.migration_property("send-configuration"):
            self._load_configuration()
        self._load_elements()
        if not self.handed_over:
            self._check_memory()
            self.description_missing = sections.skip_vmdescription(self._reader) is None

    def load_rest(self) -> None:
        """Read the rest of the stream, after LISTEN; there is no description at its end."""
        self._load_elements()

    def _load_elements(self) -> None:
        while self._load_element() and not self.handed_over:
            self._look_round()

    def for_postcopy(self, stream: InputStream, receiver: PageReceiver) -> StreamLoader:
        """A loader that goes on with *stream*, whose pages *receiver* places; what was bound to sections stays bound."""
        rest = copy.copy(self)
        rest.stream = rest._reader = stream
        rest.ram = receiver
        rest.receivers = None  # channels of multifd carry nothing any more (postcopy.md §10)
        rest._is_package = False
        return rest

    def _load_package(self, length: int) -> None:
        """Read *length* bytes, which hold sections and commands, and obey them (postcopy.md §3)."""
        base = self._reader.offset
        package = copy.copy(self)
        package._is_package = True
        package._reader = reader = BytesReader(self._reader.read(length, "a package"), base)
        while reader.remaining and not package.handed_over:
            if not package._load_element():
                raise StreamError(
                    f"package at offset {base:#x}: the end of the stream in it, expected sections and commands"
                )
            self._look_round()
        self.handed_over = package.handed_over

    def _check_memory(self) -> None:
        """Refuse a guest whose memory was left out because the source believed it to be here (ram.md §9)."""
        block = None if self._options.capability("mapped-ram") else self.landing.forgotten()
        if block is not None:
            text = (
                f"end of the stream at offset {self._reader.offset:#x}: no page of block '{block.idstr}' has come; "
                f"the source leaves out all shared memory, and this one is of no file that both ends could have"
            )
            remedy = "use memory-backend-file with share=on, or switch off capability 'x-ignore-shared' on both sides"
            raise StreamError(text, offset=self._reader.offset, section=live.IDSTR, remedy=remedy)

    def _load_configuration(self) -> None:
        """Read what both ends must agree on before anything else, and compare it."""
        offset = self._reader.offset
        sections.check_configuration(
            sections.read_configuration(self._reader),
            machine_type=self._machine.machine_type,
            capabilities=[name for name, is_on in self._options.capabilities().items() if is_on],
            uuid=self._machine.uuid,
            offset=offset,
        )

    def _load_element(self) -> bool:
        """Load one section or command; False after the end mark."""
        offset = self._reader.offset
        kind = self._reader.read_u8("the type of the next section")
        trace.qemu_loadvm_state_section(kind)
        if kind == SectionType.QEMU_VM_EOF:
            return False
        if kind in SECTIONS:
            self._load_section(kind, offset)
        elif kind == SectionType.QEMU_VM_COMMAND:
            self._load_command(offset)
        else:
            raise StreamError(
                f"section at offset {offset:#x}: type {kind:#04x} found, "
                f"expected START (0x01), PART (0x02), END (0x03), FULL (0x04), COMMAND (0x08) or the end (0x00)",
                offset=offset,
                remedy=self._remedy_for_type(kind),
            )
        return True

    def _remedy_for_type(self, kind: int) -> object:
        """What would help when the source sends what this side was told not to expect."""
        name = _OPTIONAL.get(kind)
        if name is None or self._options.migration_property(name):
            return ""
        return remedies.for_property(name, on_here=False)

    def _load_section(self, kind: int, offset: int) -> None:
        header = sections.read_section_header(self._reader, kind)
        known = kind not in WITH_IDENTITY
        bound = self._table.lookup(header.section_id, offset) if known else self._table.bind(header, offset)
        section = bound.entry.owner
        if known:
            trace.qemu_loadvm_state_section_partend(header.section_id)
        else:
            identity = header.section_id, header.idstr, header.instance_id, header.version_id
            trace.qemu_loadvm_state_section_startfull(*identity)
        if section is None and self._is_package:
            raise StreamError(
                f"section 'ram' at offset {offset:#x}, inside a package, expected device state", offset=offset
            )
        if section is None:
            self.ram.load_body(self._look_round)
            if self.receivers is not None:
                self.receivers.end_section()
        elif kind in WITH_IDENTITY:
            self._stage(section, bound.version_id, offset)
        else:
            text = (
                f"section '{section.idstr}' instance {section.instance_id} at offset {offset:#x}: "
                f"device state in parts ({header.type.name}), expected it whole"
            )
            raise StreamError(text, offset=offset, section=section.idstr)
        if self._options.migration_property("send-section-footer"):
            sections.read_section_footer(self._reader, header.section_id, bound.entry.idstr, is_certain_end=section is None)

    def _stage(self, section: DeviceSection, version_id: int, offset: int) -> None:
        """Load device state, whose section began at *offset*, into a record of its own; the last one of a section wins."""
        trace.vmstate_load(section.idstr, section.instance_id, version_id)
        record = section.vmstate.load(self._reader, version_id, section=section.idstr, instance_id=section.instance_id)
        if section is GLOBALSTATE_SECTION:
            self.runstate = record.state
            return
        self.places[section.idstr, section.instance_id] = offset
        self.staged[:] = [entry for entry in self.staged if entry[0] is not section]
        self.staged.append((section, record))

    @property
    def has_contents(self) -> bool:
        """Whether any page has come that is not zero."""
        return self.ram.normal_pages > 0 or (self.receivers is not None and self.receivers.normal_pages > 0)

    def placed(self, error: MachineError) -> MachineError:
        """*error*, by which the machine could not take `staged`, with the place in the stream of what it refused."""
        identity = error.section, error.instance_id
        record = next((one for section, one in self.staged if (section.idstr, section.instance_id) == identity), None)
        if record is None:
            return error
        place = f"section {error.section!r} instance {error.instance_id} at offset {self.places[identity]:#x}"
        remedy = str(remedies.for_device_state(error.section, record))
        text = f"{place}: {error}" + (f"; {remedy}" if remedy else "")
        return MachineError(text, section=error.section, instance_id=error.instance_id)

    def _load_command(self, offset: int) -> None:
        command = commands.read_command(self._reader)
        if isinstance(command, commands.OpenReturnPath):
            self._open_return_path()
        elif isinstance(command, commands.Ping):
            trace.loadvm_process_command_ping(command.value)
            if self._is_package:
                self._settle()
            self._pong(command.value)
            if command.value == commands.PING_DRAINED:
                rehearse(self._machine.sections(), times=1)  # there is nothing else to do before the guest has stopped
        elif isinstance(command, commands.Packaged):
            self._load_package(command.length)
        elif isinstance(command, commands.SwitchoverStart):
            pass  # no device here waits for it
        elif not self._take_postcopy(command, offset):
            capability = remedies.capability_of(command.type, len(command.payload()))
            raise StreamError(
                f"{command.type.name} at offset {offset:#x}: the source has capability '{capability}' on, "
                f"which is not built in this version of qemumig",
                offset=offset,
                remedy=remedies.for_capability(capability, on_here=False),
            )

    def _take_postcopy(self, command: commands.Command, offset: int) -> bool:
        """Obey a command of postcopy; False when it is none, or there is no postcopy here."""
        if self._postcopy is None:
            return False
        is_run = isinstance(command, commands.PostcopyRun)
        if is_run and self._is_package:
            self._settle()
        taken = self._postcopy.take(command, offset, self)
        self.handed_over = taken and is_run
        return taken
