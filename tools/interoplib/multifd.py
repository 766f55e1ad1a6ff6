"""Multifd for a migration by chance: the connections, the method, what both versions know of the rest (multifd.md §8)."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from qemumig.cli.guest import GuestParameters
from qemumig.cli.vmm import Vmm, with_capabilities

from .peers import Peer

WAYS = ("tcp", "unix")  # those that can be connected to more than once
EACH_SECTION = "-global migration.multifd-flush-after-each-section=on"
COMPRESSED_DIRTY_PAGES = (
    512  # a real QEMU compares what is left with how many compressed bytes leave: more would not converge
)
MOST_CHANNELS = 16


@dataclass(frozen=True)
class Multifd:
    """What both ends are told, and the source alone; an empty *detection* is that of the source."""

    channels: int
    method: str
    each_section: bool
    detection: str
    zero_copy: bool

    def __str__(self) -> str:
        said = [f"{self.channels} channels", self.method]
        said += ["a sync after each section"] if self.each_section else []
        said += [f"zero pages by {self.detection}"] if self.detection else []
        said += ["zero-copy-send"] if self.zero_copy else []
        return " with ".join((said[0], " and ".join(said[1:])))

    def options(self, peer: Peer, *, is_source: bool) -> str:
        """What *peer* needs on its command line: a QEMU that knows both modes has to be told as a destination, too."""
        if not self.each_section or peer.is_before(8, 1) or (peer.version is None and not is_source):
            return ""
        return EACH_SECTION

    def prepare(self, source: Vmm, destination: Vmm) -> None:
        """Tell both, before the destination listens."""
        with_capabilities([source, destination], multifd=True)
        for vmm in (source, destination):
            vmm.command("migrate-set-parameters", multifd_channels=self.channels, multifd_compression=self.method)
        if self.detection:
            source.command("migrate-set-parameters", zero_page_detection=self.detection)
        if self.zero_copy:
            with_capabilities([source], **{"zero-copy-send": True})

    def limit(self, guest: GuestParameters) -> GuestParameters:
        """*guest*, or one that writes less where pages are compressed."""
        if self.method == "none":
            return guest
        return replace(guest, dirty_pages=min(guest.dirty_pages, COMPRESSED_DIRTY_PAGES))


def random_multifd(chance: random.Random, source: Peer, destination: Peer, transport: str) -> Multifd:
    """Anything that this source may send to this destination."""
    method = chance.choice(("none", "none", "zlib", "zstd"))
    each_section = chance.random() < 0.3 and not source.is_before(8, 1)
    if source.version is None and destination.is_before(8, 1):
        each_section = True  # it knows nothing else
    ways = ["", "none", "legacy"]
    if source.is_before(9):
        ways = [""]  # a parameter it does not have
    elif destination.version is None or destination.is_since(9):
        ways.append("multifd")
    return Multifd(
        channels=chance.choice((1, 2, 3, 4, chance.randint(5, MOST_CHANNELS))),
        method=method,
        each_section=each_section,
        detection=chance.choice(ways),
        zero_copy=method == "none" and transport == "tcp" and chance.random() < 0.4,
    )
