"""What capabilities ask of a transport (channels.md §1.3, qmp.md §6.2): looked at before anything is opened."""

from __future__ import annotations

from ..errors import OptionError
from ..options import MigrationOptions
from .address import Address, FileAddress, InetAddress, UnixAddress, VsockAddress


def check_transport(options: MigrationOptions, address: Address) -> None:
    """OptionError, in QEMU's words, when *address* cannot carry what the capabilities in *options* need."""
    is_file = isinstance(address, FileAddress)
    mapped, multifd = options.capability("mapped-ram"), options.capability("multifd")
    if mapped and not is_file:
        raise _unfit("mapped-ram", "Migration requires seekable transport (e.g. file)")
    has_several = isinstance(address, InetAddress | UnixAddress | VsockAddress) or (is_file and mapped)
    for name in ("multifd", "postcopy-preempt"):
        if options.capability(name) and not has_several:
            raise _unfit(name, "Migration requires multi-channel URIs (e.g. tcp)")
    if multifd and options.parameter("direct-io") and not is_file:
        raise _unfit("direct-io", "Migration requires a transport that allows for extra fds (e.g. file)")
    if mapped and options.parameter("tls-creds"):
        raise _unfit("mapped-ram", "Cannot use TLS with mapped-ram")
    if mapped and options.parameter("multifd-compression") != "none":
        raise _unfit("mapped-ram", "Cannot use compression with mapped-ram")
    _check_compress(options)


def _check_compress(options: MigrationOptions) -> None:
    """OptionError when pages are to be compressed in the old way and go another way than as records (compress.md §2)."""
    if not options.migration_property("x-compress"):
        return
    for name in ("multifd", "mapped-ram", "postcopy-preempt", "background-snapshot"):
        if options.capability(name):
            raise _unfit(name, f"capability '{name}' is not compatible with -global migration.x-compress=on")


def _unfit(name: str, text: str) -> OptionError:
    return OptionError(text, name=name, value=True)
