"""virtio-mmio: the registers through which a driver finds and steers a virtio device (machine.md §3, §5).

    0x000 magic "virt"   0x004 version   0x008 device id   0x00C vendor "QEMU"
    0x010 features offered, half by 0x014            0x020 features accepted, half by 0x024
    0x030 which queue   0x034 its greatest size   0x038 its size   0x050 kick   0x060 interrupts   0x064 acknowledge
    0x070 status; zero resets the device             0x100 configuration of the device, any size of access
    legacy (version 1)   0x028 page size   0x03C alignment   0x040 page number of the queue
    modern (version 2)   0x044 queue ready   0x080, 0x090, 0x0A0 addresses of the three rings   0x0FC generation

A slot without a device has device id 0 and nothing else but the first 16 bytes; it has no state, in the machine or on
the wire.  Registers are 32 bits wide: in a slot with a device an access of another size reads as zero and writes nothing.

The device behind it is a Backend.  It is called with `lock` held, and takes chains and gives answers through the
Transport.  What changes the rings waits until no chain is being worked on (`Backend.quiet`).

Threads   vCPU threads read and write; the device's thread takes and answers; whoever holds the machine's transition
          lock resets, saves and loads.
Holds     the interrupt line follows the interrupt register, both change under the lock
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Protocol

from qemumig.errors import MachineError
from qemumig.savevm.devices.virtio_mmio import (
    QUEUE_MAX,
    ExtraState,
    QueueRings,
    Request,
    TransportQueue,
    TransportState,
    VirtioState,
    Virtqueue,
)

from .virtio_queue import DEFAULT_ALIGN, DEFAULT_SIZE, Memory, Queue, Rings, VirtioError

SLOT_SIZE = 0x200  # bytes
FIRST_SLOT = 0xFEB00000

_MAGIC, _VENDOR = 0x74726976, 0x554D4551
_LEGACY, _MODERN = 1, 2
_CONFIG = 0x100
_CONFIG_LENGTH = 57
_LOW = 0xFFFFFFFF
_GREATEST_SHIFT = 31

STATUS_DRIVER_OK, _STATUS_FEATURES_OK, _STATUS_NEEDS_RESET = 4, 8, 0x40
_ISR_USED, _ISR_CONFIG = 1, 2

F_NOTIFY_ON_EMPTY, F_ANY_LAYOUT, F_INDIRECT, F_EVENT_INDEX = 1 << 24, 1 << 27, 1 << 28, 1 << 29
F_VERSION_1, F_RING_RESET = 1 << 32, 1 << 40


def slot_address(slot: int) -> int:
    """Where the registers of *slot* begin."""
    return FIRST_SLOT + SLOT_SIZE * slot


class EmptySlot:
    """A transport without a device; one object may serve any number of slots."""

    def __init__(self, legacy: bool = True) -> None:
        self._registers = {0x00: _MAGIC, 0x04: _LEGACY if legacy else _MODERN, 0x0C: _VENDOR}

    def read(self, offset: int, size: int) -> int:
        """A register or its low part, or zero."""
        return self._registers.get(offset, 0) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Nobody listens."""


class Backend(Protocol):
    """A device with one queue; everything but `quiet` returns at once."""

    device_id: int
    features: int  # of the device's own kind, offered whatever the transport is
    legacy_features: int  # of its own kind, for legacy drivers only

    def read_config(self) -> bytes:
        """The configuration, 57 bytes."""

    def write_config(self, config: bytes) -> None:
        """The driver has changed a byte of it."""

    def begin(self, features: int) -> None:
        """The driver is ready, with these features."""

    def kick(self) -> None:
        """There may be chains."""

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """Within it no chain is taken; entering waits for the one that is out."""

    def reset(self) -> None:
        """Forget what the driver wanted."""

    def unfinished(self) -> list[Request]:
        """Chains that could not be carried out and wait for another attempt."""

    def resume_with(self, requests: list[Request]) -> None:
        """Carry these out when the machine starts; then look for more."""


@dataclass
class _ModernQueue:
    """What a modern driver wrote about the queue, before it said that the queue is ready."""

    num: int = 0
    enabled: bool = False
    desc_low: int = 0
    desc_high: int = 0
    avail_low: int = 0
    avail_high: int = 0
    used_low: int = 0
    used_high: int = 0


_RING_REGISTERS = {
    0x80: "desc_low",
    0x84: "desc_high",
    0x90: "avail_low",
    0x94: "avail_high",
    0xA0: "used_low",
    0xA4: "used_high",
}


class Transport:
    """Slot with a device, once `attach` has given it one; *name* is what messages call it."""

    def __init__(
        self,
        name: str,
        memory: Memory,
        set_line: Callable[[bool], None],
        warn: Callable[[str], None],
        *,
        legacy: bool,
    ) -> None:
        # Set before the guest runs.
        self.name = name
        self.legacy = legacy
        self.lock = threading.Condition()
        self._set_line = set_line
        self._warn = warn
        self._device: Backend
        # Under lock.
        self._queue = Queue(memory)
        self._out = 0  # chains taken and not answered
        self._power_on()

    def attach(self, device: Backend) -> None:
        """Give it its device."""
        self._device = device

    def _power_on(self) -> None:
        """Every register as it is at first."""
        self._config = bytes(_CONFIG_LENGTH)
        self._features_select = self._driver_features_select = self._page_shift = 0
        self._wanted_features = [0, 0]
        self._modern: dict[int, _ModernQueue] = {}
        self._queue.rings.align = DEFAULT_ALIGN
        self._forget_driver()

    def _forget_driver(self) -> None:
        """What a driver gets by writing zero to the status register; what only selects and announces stays."""
        align = self._queue.rings.align
        self._queue.reset()
        self._queue.rings.align = align
        self._out = 0
        self._status = self._isr = self._queue_select = self._features = 0
        self._broken = self._started = False
        for queue in self._modern.values():
            queue.enabled = False

    def reset(self) -> None:
        """As after power-on."""
        with self.lock, self._device.quiet():
            self._power_on()
            self._device.reset()
            self._set_line(False)

    def _reset(self) -> None:
        """The driver wants to begin anew; nothing is being worked on."""
        self._forget_driver()
        self._device.reset()
        self._set_line(False)

    # -- the device's side; under lock

    def take(self) -> Request | None:
        """The next chain; None: there is none, or nobody may work now."""
        if self._broken or not self._queue.is_set_up:
            return None
        try:
            chain = self._queue.pop(self._out)
        except VirtioError as error:
            self.break_down(error)
            return None
        if chain is not None:
            self._out += 1
        return chain

    def answer(self, head: int, written: int) -> None:
        """The chain at *head* is done, *written* bytes of it; the driver hears of it if it wants to."""
        self._out -= 1
        if self._broken:
            return
        try:
            self._queue.push(head, written)
            if self._queue.wants_interrupt(self._out):
                self._interrupt(_ISR_USED)
        except VirtioError as error:
            self.break_down(error)

    def break_down(self, error: Exception) -> None:
        """The driver broke the rules: nothing happens any more until it resets the device."""
        self._warn(f"{self.name}: {error}; the device is broken until the guest resets it")
        self._broken = True
        if self._is_version_1:
            self._status |= _STATUS_NEEDS_RESET
            self._interrupt(_ISR_CONFIG | _ISR_USED)

    def _interrupt(self, cause: int) -> None:
        self._isr |= cause
        self._set_line(True)

    @property
    def offered(self) -> int:
        """Every feature a driver, or a stream, may have accepted."""
        common = F_INDIRECT | F_EVENT_INDEX | F_NOTIFY_ON_EMPTY | F_RING_RESET | self._device.features
        return common | (self._device.legacy_features if self.legacy else F_VERSION_1 | F_ANY_LAYOUT)

    @property
    def _is_version_1(self) -> bool:
        return bool(self._features & F_VERSION_1)

    # -- the guest's side

    def read(self, offset: int, size: int) -> int:
        """A register, or a piece of the configuration."""
        with self.lock:
            if offset >= _CONFIG:
                return self._read_config(offset - _CONFIG, size)
            return self._read_register(offset) if size == 4 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register, or a piece of the configuration."""
        with self.lock:
            if offset >= _CONFIG:
                self._write_config(offset - _CONFIG, value.to_bytes(size, "little"))
            elif size == 4:
                self._write_register(offset, value)

    def _read_config(self, offset: int, size: int) -> int:
        """Beyond its end the configuration reads as ones."""
        if offset + size > _CONFIG_LENGTH:
            return (1 << 8 * size) - 1
        self._config = self._device.read_config()
        return int.from_bytes(self._config[offset : offset + size], "little")

    def _write_config(self, offset: int, data: bytes) -> None:
        if offset + len(data) > _CONFIG_LENGTH:
            return
        self._config = self._config[:offset] + data + self._config[offset + len(data) :]
        self._device.write_config(self._config)

    def _read_register(self, offset: int) -> int:
        first = self._queue_select == 0
        if offset == 0x10:
            return self._read_features()
        if offset == 0x34:
            return DEFAULT_SIZE if first else 0
        if offset == 0x40:
            return self._queue.rings.desc >> self._page_shift & _LOW if self.legacy and first else 0
        if offset == 0x44:
            return int(self._modern_queue().enabled) if not self.legacy else 0
        fixed = {0x00: _MAGIC, 0x04: _LEGACY if self.legacy else _MODERN, 0x08: self._device.device_id, 0x0C: _VENDOR}
        no_shared_memory = {0xB0: _LOW, 0xB4: _LOW}
        return {**fixed, **no_shared_memory, 0x60: self._isr, 0x70: self._status}.get(offset, 0)

    def _read_features(self) -> int:
        """A half of what is offered to this kind of driver."""
        if self.legacy:
            return self.offered & _LOW if self._features_select == 0 else 0
        shown = self.offered & ~(F_NOTIFY_ON_EMPTY | F_ANY_LAYOUT)
        return shown >> (32 if self._features_select else 0) & _LOW

    def _write_register(self, offset: int, value: int) -> None:
        if offset == 0x14:
            self._features_select = int(value != 0)
        elif offset == 0x20:
            self._write_features(value)
        elif offset == 0x24:
            self._driver_features_select = int(value != 0)
        elif offset == 0x30:
            if value < QUEUE_MAX:
                self._queue_select = value
        elif offset == 0x50:
            if value == 0:
                self._kick()
        elif offset == 0x64:
            self._acknowledge(value)
        elif offset == 0x70:
            self._write_status(value)
        elif self.legacy:
            self._write_legacy(offset, value)
        else:
            self._write_modern(offset, value)

    def _acknowledge(self, value: int) -> None:
        """The line falls with it; for what is left it rises again, so that no interrupt controller misses that."""
        self._isr &= ~value
        self._set_line(False)
        if self._isr:
            self._set_line(True)

    def _write_features(self, value: int) -> None:
        if self.legacy:
            if self._driver_features_select == 0:
                self._accept_features(value)
        else:
            self._wanted_features[self._driver_features_select] = value

    def _accept_features(self, features: int) -> None:
        """They cannot be changed any more once the driver has said that they are settled."""
        if not self._status & _STATUS_FEATURES_OK:
            self._features = features & self.offered
            self._follow_features()

    def _follow_features(self) -> None:
        self._queue.event_index = bool(self._features & F_EVENT_INDEX)
        self._queue.notify_on_empty = bool(self._features & F_NOTIFY_ON_EMPTY)

    def _kick(self) -> None:
        if not self._broken and self._queue.is_set_up:
            self._started = True
            self._device.kick()

    def _write_status(self, value: int) -> None:
        if not self.legacy and value & _STATUS_FEATURES_OK:
            self._accept_features(self._wanted_features[0] | self._wanted_features[1] << 32)
        if value & 0xFF == 0:
            with self._device.quiet():
                self._reset()
            return
        self._status = value & 0xFF
        self._started = bool(self._status & STATUS_DRIVER_OK)
        if self._started:
            self._device.begin(self._features)

    def _write_legacy(self, offset: int, value: int) -> None:
        if offset == 0x28:
            shift = (value & -value).bit_length() - 1
            self._page_shift = max(shift, 0)
        elif offset == 0x40 and value == 0:
            with self._device.quiet():
                self._reset()
        elif offset in (0x38, 0x3C, 0x40) and self._queue_select == 0:
            with self._device.quiet():
                self._change_legacy_queue(offset, value)

    def _change_legacy_queue(self, offset: int, value: int) -> None:
        rings = self._queue.rings
        if offset == 0x38:
            self._set_size(value)
        elif offset == 0x3C and value:
            rings.align = value
        elif offset == 0x40:
            rings.desc = value << self._page_shift
        self._queue.lay_out_legacy()
        self._queue.forget()

    def _set_size(self, num: int) -> None:
        """Sizes that cannot be are ignored.  Queues of other machines, which a load brings, may be longer."""
        if 0 < num <= DEFAULT_SIZE:
            self._queue.rings.num = num

    def _write_modern(self, offset: int, value: int) -> None:
        if offset == 0x38:
            self._modern_queue().num = value & 0xFFFF
            if self._queue_select == 0:
                with self._device.quiet():
                    self._set_size(value)
        elif offset == 0x44:
            with self._device.quiet():
                self._write_ready(value)
        elif offset in _RING_REGISTERS:
            setattr(self._modern_queue(), _RING_REGISTERS[offset], value)

    def _modern_queue(self) -> _ModernQueue:
        """What was written about the selected queue, whether there is one or not."""
        return self._modern.setdefault(self._queue_select, _ModernQueue())

    def _write_ready(self, value: int) -> None:
        modern, rings = self._modern_queue(), self._queue.rings
        modern.enabled = bool(value)
        if value and self._queue_select == 0:
            self._set_size(modern.num)
            rings.desc = modern.desc_low | modern.desc_high << 32
            rings.avail = modern.avail_low | modern.avail_high << 32
            rings.used = modern.used_low | modern.used_high << 32
            self._queue.forget()

    # -- migration

    def save(self) -> VirtioState:
        """The registers, the queue's position, and the chains that wait for another attempt."""
        with self.lock:
            rings = self._queue.rings
            state = VirtioState(
                host_features_sel=self._features_select,
                guest_features_sel=self._driver_features_select,
                guest_page_shift=self._page_shift,
                status=self._status,
                isr=self._isr,
                queue_sel=self._queue_select,
                guest_features_low=self._features & _LOW,
                config=self._config,
                queues=[Virtqueue(rings.num, rings.align, rings.desc, rings.last_avail_index)] if rings.num else [],
                requests=self._device.unfinished(),
                guest_features=self._features,
            )
            if rings.num != DEFAULT_SIZE:
                state.ringsize = [DEFAULT_SIZE, *[0] * (QUEUE_MAX - 1)]
            state.broken = True if self._broken else None
            state.started = True if self._started else None
            if not self.legacy:
                self._save_modern(state)
            return state

    def _save_modern(self, state: VirtioState) -> None:
        rings = self._queue.rings
        state.virtqueues = [QueueRings(rings.avail, rings.used), *[QueueRings()] * (QUEUE_MAX - 1)]
        rows = [TransportQueue()] * QUEUE_MAX
        for number, queue in self._modern.items():
            rows[number] = TransportQueue(*astuple(queue))
        low, high = self._wanted_features
        state.extra_state = ExtraState(TransportState((low, high), rows))

    def load(self, record: VirtioState) -> None:
        """Go on where the source's device was; the machine is stopped.

        MachineError, and nothing changed, when the record asks for what this device does not have.  Rings are not
        looked at before the machine starts: guest memory may come later.
        """
        with self.lock, self._device.quiet():
            self._check(record)
            self._power_on()
            self._load_registers(record)
            if not self.legacy:
                self._load_modern(record)
            else:
                self._queue.lay_out_legacy()
            self._out = len(record.requests)
            self._device.reset()
            if self._status & STATUS_DRIVER_OK:
                self._device.begin(self._features)
            self._device.resume_with(record.requests)
            self._set_line(self._isr != 0)

    def _load_registers(self, record: VirtioState) -> None:
        self._features_select, self._driver_features_select = record.host_features_sel, record.guest_features_sel
        self._page_shift = record.guest_page_shift
        self._status, self._isr, self._queue_select = record.status, record.isr, record.queue_sel
        self._features = _features_of(record)
        self._follow_features()
        self._config = (record.config + bytes(_CONFIG_LENGTH))[:_CONFIG_LENGTH]
        self._broken = bool(record.broken)
        self._started = bool(record.started)
        for queue in record.queues:
            self._queue.rings = Rings(queue.num, queue.align, queue.desc, last_avail_index=queue.last_avail_idx)

    def _load_modern(self, record: VirtioState) -> None:
        if record.virtqueues is not None:
            self._queue.rings.avail, self._queue.rings.used = record.virtqueues[0]
        if record.extra_state is not None and record.extra_state.state is not None:
            self._wanted_features = list(record.extra_state.state.guest_features)
            rows = enumerate(record.extra_state.state.queues)
            self._modern = {number: _ModernQueue(*row) for number, row in rows if any(row)}

    def _check(self, record: VirtioState) -> None:
        """Everything of *record* that this device could not bear."""
        features = _features_of(record)
        if features & ~self.offered:
            self._refuse(f"features {features:#x} were accepted, but only {self.offered:#x} are offered here")
        if record.guest_page_shift > _GREATEST_SHIFT:
            self._refuse(f"a page shift of {record.guest_page_shift}, expected at most {_GREATEST_SHIFT}")
        if record.device_endian not in (None, 1):
            self._refuse(f"device endianness {record.device_endian}, expected 1 (little)")
        for queue in record.queues:
            if queue.align == 0 and self.legacy and queue.desc:
                self._refuse(f"queue 0 has its rings aligned to 0 bytes, expected {DEFAULT_ALIGN}")
            if not self.legacy and queue.desc and record.virtqueues is None:
                self._refuse("queue 0 is in use, but where its avail and used rings are is not said")
        num = record.queues[0].num if record.queues else 0
        if len(record.requests) > num:
            self._refuse(f"{len(record.requests)} requests are pending, expected at most {num}")
        for request in record.requests:
            self._check_request(request, num)

    def _check_request(self, request: Request, num: int) -> None:
        if request.head >= num:
            self._refuse(f"a pending request of descriptor {request.head}, expected less than {num}")
        problem = self._queue.problem_with(request)
        if problem:
            self._refuse(f"a pending request of descriptor {request.head}: {problem}")

    def _refuse(self, finding: str) -> None:
        raise MachineError(f"{self.name} cannot take the state of the source's disk: {finding}")


def _features_of(record: VirtioState) -> int:
    """All accepted features; the subsection with 64 bits says it better than the 32 bits of the frame."""
    return record.guest_features_low if record.guest_features is None else record.guest_features
