"""A temporary snapshot of an image (-snapshot, -drive …,snapshot=on): what is written is forgotten at the end (cli.md §3).

Clusters that were written live in a sparse file without a name, in $TMPDIR or /var/tmp; all the others are still the
image's, which is only read.  A cluster that a write covers in part is copied first.  Nothing has to survive, so a flush
has nothing to do.

Nobody else can have what was written here.  A migration would take the guest away from its own disk, so a disk with a
writable snapshot is a reason not to migrate, which QEMU 7.2 and 11.1 do not see (they go on, and lose the writes).

Threads   One at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from .block import BlockError, RawImage

CLUSTER_SIZE = 64 << 10  # bytes


class TemporarySnapshot(RawImage):
    """The image in *path* as it was when this was opened, and what is written from then on."""

    def __init__(self, path: str, *, read_only: bool = False, direct: bool = False, locks: bool = True) -> None:
        """Open both.  Raises BlockError."""
        super().__init__(path, read_only=True, direct=direct, locks=locks)
        try:
            self._written = _temporary_image(self.size)
        except BlockError:
            super().close()
            raise
        self.read_only = read_only
        self.forgets = not read_only
        self._clusters: set[int] = set()  # those that are in `_written`

    def close(self) -> None:
        """Give both back; what was written is gone.  Twice is allowed."""
        self._written.close()
        super().close()

    def read(self, offset: int, length: int) -> bytes:
        """*length* bytes from *offset*."""
        self._check_range(offset, length)
        data = bytearray()
        for start, count, is_written in self._runs(offset, length):
            data += self._written.read(start, count) if is_written else super().read(start, count)
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        """Write *data* at *offset*."""
        self._check_range(offset, len(data))
        self._require_writable()
        self._copy_edges(offset, len(data))
        self._written.write(offset, data)
        self._clusters.update(_clusters(offset, len(data)))

    def flush(self) -> None:
        """Nothing of it has to last."""

    def discard(self, offset: int, length: int) -> None:
        """The range keeps its contents."""
        self._check_range(offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        """The range reads as zeroes; its room in the temporary file goes."""
        self._check_range(offset, length)
        self._require_writable()
        self._copy_edges(offset, length)
        self._written.write_zeroes(offset, length, may_unmap=True)
        self._clusters.update(_clusters(offset, length))

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """The range in pieces of one kind, as (offset, length, whether it was written here)."""
        end = offset + length
        while offset < end:
            cluster = offset // CLUSTER_SIZE
            is_written = cluster in self._clusters
            while cluster * CLUSTER_SIZE < end and (cluster in self._clusters) == is_written:
                cluster += 1
            stop = min(end, cluster * CLUSTER_SIZE)
            yield offset, stop - offset, is_written
            offset = stop

    def _copy_edges(self, offset: int, length: int) -> None:
        """Have the clusters here that the range does not fill; one that fails is the image's still."""
        if not length:
            return
        end = offset + length
        for cluster in {offset // CLUSTER_SIZE, (end - 1) // CLUSTER_SIZE} - self._clusters:
            start = cluster * CLUSTER_SIZE
            stop = min(start + CLUSTER_SIZE, self.size)
            if offset > start or end < stop:
                self._written.write(start, super().read(start, stop - start))
                self._clusters.add(cluster)


def _clusters(offset: int, length: int) -> range:
    return range(offset // CLUSTER_SIZE, -(-(offset + length) // CLUSTER_SIZE))


def _temporary_image(size: int) -> RawImage:
    """A new sparse image of *size* bytes without a name."""
    import tempfile  # only here: it is slow to import

    folder = os.environ.get("TMPDIR") or "/var/tmp"
    try:
        fd, path = tempfile.mkstemp(prefix="qemumig.", dir=folder)
    except OSError as error:
        raise BlockError(f"Could not open a temporary file in '{folder}': {error.strerror}") from error
    try:
        os.truncate(fd, size)
        return RawImage(path, flushes=False, unmaps=True, locks=False)
    except OSError as error:
        raise BlockError(f"Could not make temporary file '{path}' {size:#x} bytes long: {error.strerror}") from error
    finally:
        os.close(fd)
        os.unlink(path)
