"""What capabilities ask of a transport, in QEMU's words (channels.md §1.3, qmp.md §6.2)."""

from __future__ import annotations

from typing import Any

import pytest

from qemumig.channels.address import parse_uri
from qemumig.channels.demands import check_transport
from qemumig.errors import OptionError
from qemumig.options import MigrationOptions


class Options(MigrationOptions):
    """Whatever is given, built or not, contradictory or not."""

    def __init__(self, *capabilities: str, compress: bool = False, **parameters: Any) -> None:
        super().__init__()
        self.on = capabilities
        self.values = {name.replace("_", "-"): value for name, value in parameters.items()}
        self.set_property("x-compress", "on" if compress else "off")

    def capability(self, name: str) -> bool:
        return name in self.on

    def parameter(self, name: str) -> Any:
        return self.values.get(name, super().parameter(name))


TCP, EXEC, FILE, FD = "tcp:127.0.0.1:1", "exec:true", "file:/tmp/x", "fd:x"
SEEKABLE = r"Migration requires seekable transport \(e\.g\. file\)"
SEVERAL = r"Migration requires multi-channel URIs \(e\.g\. tcp\)"


@pytest.mark.parametrize(
    ("uri", "options", "text"),
    [
        *((uri, Options("mapped-ram"), SEEKABLE) for uri in (TCP, EXEC, FD, "unix:/x", "vsock:2:3")),
        *((uri, Options("multifd"), SEVERAL) for uri in (EXEC, FILE, FD)),
        *((uri, Options("postcopy-preempt"), SEVERAL) for uri in (EXEC, FILE, FD)),
        (TCP, Options("multifd", direct_io=True), r"a transport that allows for extra fds \(e\.g\. file\)"),
        (FILE, Options("mapped-ram", tls_creds="t"), "Cannot use TLS with mapped-ram"),
        (FILE, Options("mapped-ram", multifd_compression="zlib"), "Cannot use compression with mapped-ram"),
        (TCP, Options("multifd", compress=True), "'multifd' is not compatible with -global migration.x-compress=on"),
        (FILE, Options("mapped-ram", compress=True), "'mapped-ram' is not compatible with"),
    ],
)
def test_what_cannot_be_carried_is_refused(uri: str, options: Options, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        check_transport(options, parse_uri(uri))


@pytest.mark.parametrize(
    ("uri", "options"),
    [
        *((uri, Options()) for uri in (TCP, EXEC, FILE, FD)),
        (TCP, Options("multifd", "postcopy-preempt")),
        (FILE, Options("mapped-ram", "multifd", direct_io=True)),
        (TCP, Options(compress=True, direct_io=True)),
    ],
)
def test_what_can_be_carried_is_taken(uri: str, options: Options) -> None:
    check_transport(options, parse_uri(uri))
