"""Blobs: the ACPI files of fw_cfg, which live in RAM blocks of their own that no guest address leads to.

    block                    at most     holds what fw_cfg gives as       machine.md §2
    /rom@etc/acpi/tables     2 MiB       etc/acpi/tables
    /rom@etc/table-loader    64 KiB      etc/table-loader
    /rom@etc/acpi/rsdp       4 KiB       etc/acpi/rsdp

A block is in use for as many whole pages as its file needs; the file's length in bytes travels with fw_cfg.  A reset
writes our own files again, whatever a migration has brought.

Threads   vCPU threads read; whoever holds the machine's transition lock fills, saves, loads and discards.  Bytes are
          copied without the GIL, as those of guest memory are (memory.py).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from qemumig.errors import MachineError
from qemumig.ram.bitmap import Bitmap, merge
from qemumig.ram.block import RAMBlock
from qemumig.savevm.devices.fw_cfg import AcpiBlobs

from ..dirty import MachineDirtyLog
from ..memory import HostMemory
from .acpi.tables import LOADER, RSDP, TABLES
from .memory import PAGE_SIZE, Wrote, forget, read_host, write_host

MAX_LENGTHS = {TABLES: 2 << 20, LOADER: 64 << 10, RSDP: 4 << 10}


class Blob:
    """The file *name*, *content* at first; `size` is its length in bytes now."""

    def __init__(self, name: str, content: bytes) -> None:
        self.name = name
        self.size = 0
        self._content = content
        self._memory = HostMemory.anonymous(MAX_LENGTHS[name])
        self.block = RAMBlock(
            f"/rom@{name}",
            self._memory.host_address,
            -(-len(content) // PAGE_SIZE) * PAGE_SIZE,
            max_length=self._memory.size,
            anonymous=True,
            fresh=True,
            owner=self._memory,
        )

    def fill(self) -> None:
        """Our own content; what is behind it is zero."""
        length = self.block.used_length
        if len(self._content) > length:
            what = f"{len(self._content):#x} bytes of {self.name} do not fit into it"
            raise MachineError(f"RAM block {self.block.idstr!r} has {length:#x} bytes: {what}")
        write_host(self.block.host_address, self._content.ljust(length, b"\0"))
        self.block.fresh = False
        self.size = len(self._content)

    def read(self, offset: int, length: int) -> bytes:
        """At most *length* bytes of the file from *offset*."""
        length = max(min(length, self.size - offset), 0)
        return read_host(self.block.host_address + offset, length)

    def discard(self) -> None:
        """Let the block be zero again."""
        forget(self.block, self._memory)

    def close(self) -> None:
        """Unmap it; twice is allowed."""
        self._memory.close()


class Blobs:
    """All of them: *contents* by the files' names."""

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        self.files = [Blob(name, content) for name, content in contents.items()]
        self.blocks = [blob.block for blob in self.files]
        self._wrote: Wrote = lambda block, offset, length: None

    def report_writes_to(self, wrote: Wrote) -> None:
        """Tell *wrote* of every write made from here."""
        self._wrote = wrote

    def fill(self) -> None:
        """Each its own content."""
        for blob in self.files:
            blob.fill()
            self._wrote(blob.block, 0, blob.block.used_length)

    def not_fresh(self) -> None:
        """They need not be zero any more."""
        for block in self.blocks:
            block.fresh = False

    def discard(self) -> None:
        """All zero again."""
        for blob in self.files:
            blob.discard()

    def close(self) -> None:
        """Unmap them; twice is allowed."""
        for blob in self.files:
            blob.close()

    # -- migration: the sizes in fw_cfg's section

    def save(self) -> AcpiBlobs | None:
        """How long the files are; None when all of them fill whole pages."""
        sizes = {blob.name: blob.size for blob in self.files}
        if not any(size % PAGE_SIZE for size in sizes.values()):
            return None
        return AcpiBlobs(sizes[TABLES], sizes[LOADER], sizes[RSDP])

    def load(self, record: AcpiBlobs | None) -> None:
        """The files are as long as the source says, or as long as their blocks; MachineError when one cannot be."""
        sizes = {}
        if record is not None:
            sizes = {TABLES: record.table_mr_size, LOADER: record.linker_mr_size, RSDP: record.rsdp_mr_size}
        for blob in self.files:
            size = sizes.get(blob.name, blob.block.used_length)
            if size > blob.block.used_length:
                raise MachineError(
                    f"section 'fw_cfg': file {blob.name} has {size:#x} bytes, expected at most the "
                    f"{blob.block.used_length:#x} of RAM block {blob.block.idstr!r}"
                )
        for blob in self.files:
            blob.size = sizes.get(blob.name, blob.block.used_length)


class LogWithBlobs:
    """Fulfils qemumig.machine.DirtyLog for guest memory, which *log* does, and for blobs, which only we write.

    Threads   As MachineDirtyLog: one thread starts, fetches, clears and stops; any thread marks.
    """

    def __init__(self, log: MachineDirtyLog, blobs: Blobs) -> None:
        self.manual_clear = log.manual_clear
        self._log = log
        # Under lock.
        self._lock = threading.Lock()
        self._logging = False
        self._marks = {block.idstr: Bitmap(block.max_length // PAGE_SIZE) for block in blobs.blocks}

    def start(self) -> None:
        """Begin to log writes to all of RAM."""
        with self._lock:
            for marks in self._marks.values():
                marks.clear_all()
            self._logging = True
        self._log.start()

    def stop(self) -> None:
        """End logging; what was logged is gone."""
        with self._lock:
            self._logging = False
        self._log.stop()

    def fetch(self, block: RAMBlock, words: memoryview) -> None:
        """OR the pages of *block* written since they were last cleared into *words* (uint64, format "Q")."""
        marks = self._marks.get(block.idstr)
        if marks is None:
            self._log.fetch(block, words)
            return
        with self._lock:
            merge(words, 0, memoryview(marks), block.pages)
            marks.clear_all()

    def clear(self, block: RAMBlock, first_page: int, page_count: int) -> None:
        """Protect pages again; those of a blob are marked anew by whoever writes them."""
        if block.idstr not in self._marks:
            self._log.clear(block, first_page, page_count)

    def mark(self, block: RAMBlock, offset: int, length: int) -> None:
        """*length* bytes from *offset* were written by ourselves, and are there already."""
        marks = self._marks.get(block.idstr)
        if marks is None:
            self._log.mark(block, offset, length)
            return
        with self._lock:
            if self._logging and length > 0:
                for page in range(offset // PAGE_SIZE, (offset + length - 1) // PAGE_SIZE + 1):
                    marks.set(page)
