"""What the source writes besides pages: the head of the stream, sections, commands, device state (stream.md).

    header ─▶ configuration ─▶ [commands] ─▶ sections of 'ram' ─▶ sections of devices ─▶ last words: end mark, description

Threads   the migration thread's alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import trace
from ..machine import GLOBALSTATE_SECTION, DeviceSection, Machine
from ..options import MigrationOptions
from ..qapi import RunState
from ..ram import live
from ..savevm import commands, sections, vmdesc
from ..savevm.devices.globalstate import GlobalState
from ..savevm.sections import SectionHeader
from ..wire.format import SectionType
from ..wire.stream import OutputStream

RAM_SECTION_ID = 1  # the devices' follow


class StreamWriter:
    """Writes to *out*, as *options* say; `out` is there for whoever writes pages."""

    def __init__(self, out: OutputStream, options: MigrationOptions) -> None:
        self.out = out
        self._options = options
        self._configuration: Any = None  # as the description at the end tells it

    def write_head(self, machine: Machine) -> None:
        """The file header, and what the destination has to agree with."""
        trace.savevm_state_header()
        self.out.write(sections.encode_file_header())
        if not self._options.migration_property("send-configuration"):
            return
        uuid = machine.uuid if self._options.capability("validate-uuid") else None
        on = [name for name, state in self._options.capabilities().items() if state]
        configuration = sections.Configuration.of(machine.machine_type, capabilities=on, uuid=uuid)
        data, self._configuration = sections.encode_configuration(configuration)
        self.out.write(data)

    def command(self, command: commands.Command) -> None:
        """Send *command*, and all before it."""
        self.out.write(commands.encode_command(command))
        self.out.flush()

    # ---- sections of RAM ----

    def begin_section(self, kind: SectionType) -> None:
        """Begin a section of RAM; its body is the caller's."""
        trace.savevm_section_start(live.IDSTR, RAM_SECTION_ID)
        header = SectionHeader(kind, RAM_SECTION_ID, live.IDSTR, live.INSTANCE_ID, live.VERSION_ID)
        self.out.write(sections.encode_section_header(header))

    def end_section(self) -> None:
        """End that section, and send it."""
        self.out.write(self._footer_of(RAM_SECTION_ID))
        trace.savevm_section_end(RAM_SECTION_ID, self.out.offset)
        self.out.flush()

    def _footer_of(self, section_id: int) -> bytes:
        wanted = self._options.migration_property("send-section-footer")
        return sections.encode_section_footer(section_id) if wanted else b""

    # ---- devices ----

    def write_devices(self, machine: Machine, noted: RunState) -> list[Any]:
        """Write every device section of *machine*, which was in run state *noted*; their descriptions, for `last_words`."""
        described = []
        for section_id, data, description in self.encode_devices(machine, noted):
            self.out.write(data)
            trace.savevm_section_end(section_id, self.out.offset)
            described.append(description)
        trace.vmstate_downtime_checkpoint("src-non-iterable-saved")
        return described

    def devices_in_one_piece(self, machine: Machine, noted: RunState) -> bytes:
        """All that follows memory, not written yet."""
        encoded = list(self.encode_devices(machine, noted))
        return b"".join(data for _, data, _ in encoded) + self.last_words([description for _, _, description in encoded])

    def encode_devices(self, machine: Machine, noted: RunState) -> Iterator[tuple[int, bytes, Any]]:
        """Every device section: its id, its bytes with the footer, its description."""
        saved = list(machine.save_device_state())
        if self._options.migration_property("store-global-state"):
            saved.append((GLOBALSTATE_SECTION, GlobalState.of(noted)))
        for section_id, (section, record) in enumerate(saved, start=RAM_SECTION_ID + 1):
            if section.vmstate.is_needed(record):
                yield section_id, *self._encode_device(section_id, section, record)

    def _encode_device(self, section_id: int, section: DeviceSection, record: Any) -> tuple[bytes, Any]:
        idstr, instance_id, version_id = section.idstr, section.instance_id, section.vmstate.version_id
        trace.savevm_section_start(idstr, section_id)
        state, description = section.vmstate.save(record)
        trace.vmstate_save(idstr, instance_id, len(state))
        header = SectionHeader(SectionType.QEMU_VM_SECTION_FULL, section_id, idstr, instance_id, version_id)
        data = sections.encode_section_header(header) + state + self._footer_of(section_id)
        return data, vmdesc.device(idstr, instance_id, description)

    def last_words(self, described: list[Any]) -> bytes:
        """The end mark, and the description of the devices."""
        text = vmdesc.encode(described, configuration=self._configuration)
        return bytes([SectionType.QEMU_VM_EOF]) + sections.encode_vmdescription(text)
