"""Whole migrations through TLS, between machines without KVM: who is let in, and what it costs who is not."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemumig.channels.address import parse_uri
from qemumig.qapi import MigrationStatus
from tests.migration.test_channels import Ends
from tests.qemumig.channels.pki import CLIENT_NAME, make, psk_directory, strange, x509_directory
from tests.support.pair import wait_for

pytestmark = pytest.mark.usefixtures("no_leaks")

KEY = "00112233445566778899aabbccddeeff"


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


def x509(ends: Ends, directory: Path) -> None:
    """Both ends have certificates of the good authority."""
    files = str(x509_directory(directory / "good"))
    ends.objects["server"] = make("tls-creds-x509", endpoint="server", dir=files, verify_peer=True)
    ends.objects["client"] = make("tls-creds-x509", endpoint="client", dir=files)
    ends.there.set_parameters({"tls-creds": "server"})
    ends.here.set_parameters({"tls-creds": "client", "tls-hostname": "any.wild.test"})


def start(ends: Ends) -> int:
    """Begin; the port on which the destination listens."""
    (where,) = ends.listen(parse_uri("tcp:127.0.0.1:0"))
    ends.outgoing.start(parse_uri(f"tcp:127.0.0.1:{where['port']}"))
    return int(where["port"])


def fail(ends: Ends) -> str:
    """Wait for the source's failure, which must not have cost the destination anything; its reason."""
    wait_for(lambda: not ends.outgoing.is_running, "the source to end")
    assert ends.outgoing.status is MigrationStatus.FAILED
    return str(ends.outgoing.query()["error-desc"])


def migrate(ends: Ends, port: int | None = None) -> None:
    if port is None:
        start(ends)
    else:
        ends.outgoing.start(parse_uri(f"tcp:127.0.0.1:{port}"))
    wait_for(lambda: not ends.outgoing.is_running, "the source to end")
    assert ends.outgoing.status is MigrationStatus.COMPLETED, ends.outgoing.query()
    ends.assert_arrived()


@pytest.mark.parametrize("authz", [{}, {"identity": CLIENT_NAME}, {"rules": CLIENT_NAME}], ids=["", "simple", "list"])
def test_certificates(authz: dict[str, str], ends: Ends, tmp_path: Path) -> None:
    x509(ends, tmp_path)
    if "identity" in authz:
        ends.objects["who"] = make("authz-simple", identity=authz["identity"])
    elif "rules" in authz:
        ends.objects["who"] = make("authz-list", rules=[{"match": authz["rules"], "policy": "allow"}])
    ends.there.set_parameters({"tls-authz": "who" if authz else ""})
    migrate(ends)


def test_the_name_is_that_of_the_address_unless_another_is_given(ends: Ends, tmp_path: Path) -> None:
    x509(ends, tmp_path)
    ends.here.set_parameters({"tls-hostname": ""})
    migrate(ends)


def test_keys(ends: Ends, tmp_path: Path) -> None:
    directory = str(psk_directory(tmp_path / "keys", qemu=KEY))
    for side in ("server", "client"):
        ends.objects[side] = make("tls-creds-psk", endpoint=side, dir=directory)
    ends.there.set_parameters({"tls-creds": "server"})
    ends.here.set_parameters({"tls-creds": "client"})
    migrate(ends)


def test_a_source_that_is_not_let_in_costs_only_its_own_connection(ends: Ends, tmp_path: Path) -> None:
    x509(ends, tmp_path)
    ends.objects["nobody"] = make("authz-simple", identity="CN=somebody else")
    ends.there.set_parameters({"tls-authz": "nobody"})
    port = start(ends)
    fail(ends)
    assert ends.incoming.status is MigrationStatus.SETUP
    ends.there.set_parameters({"tls-authz": ""})
    migrate(ends, port)


@pytest.mark.parametrize("where", ["name", "authority", "certificate"])
def test_a_source_that_does_not_trust_or_is_not_trusted_fails(where: str, ends: Ends, tmp_path: Path) -> None:
    x509(ends, tmp_path)
    good = ends.objects["client"]
    if where == "name":
        ends.here.set_parameters({"tls-hostname": "other.test"})
    elif where == "authority":
        creds = make("tls-creds-x509", endpoint="client", dir=str(strange(tmp_path / "strange")))
        ends.objects["client"] = creds
    else:
        directory = x509_directory(tmp_path / "mute", client_cert="", client_key="")
        ends.objects["client"] = make("tls-creds-x509", endpoint="client", dir=str(directory))
    port = start(ends)
    reason = fail(ends)
    if where == "name":
        assert reason == "Certificate does not match the hostname other.test"
    assert ends.incoming.status is MigrationStatus.SETUP
    ends.objects["client"] = good
    ends.here.set_parameters({"tls-hostname": "any.wild.test"})
    migrate(ends, port)


@pytest.mark.parametrize(
    ("parameters", "finding"),
    [
        ({"tls-creds": "nothing"}, "No TLS credentials with id 'nothing'"),
        ({"tls-creds": "server"}, "Expected TLS credentials for a client endpoint"),
    ],
)
def test_parameters_that_lead_nowhere_are_an_error_of_the_migration(
    parameters: dict[str, Any], finding: str, ends: Ends, tmp_path: Path
) -> None:
    x509(ends, tmp_path)
    ends.here.set_parameters(parameters)
    start(ends)
    assert finding in fail(ends)


def test_noise_on_the_port_costs_only_its_own_connection(ends: Ends, tmp_path: Path) -> None:
    x509(ends, tmp_path)
    (where,) = ends.listen(parse_uri("tcp:127.0.0.1:0"))
    address = "127.0.0.1", int(where["port"])
    silent = [socket.create_connection(address) for _ in range(8)]
    for noise in (b"QEVM\0\0\0\3", b"\x16\x03\x01\xff\xff" + os.urandom(70000), b"GET / HTTP/1.0\r\n\r\n", b""):
        with socket.create_connection(address) as peer, contextlib.suppress(OSError):
            peer.sendall(noise)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(65536):
                pass
    assert ends.incoming.status is MigrationStatus.SETUP
    migrate(ends, address[1])
    for peer in silent:
        peer.close()


def test_a_handshake_that_hangs_is_cancelled(ends: Ends, tmp_path: Path) -> None:
    x509(ends, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        ends.outgoing.start(parse_uri(f"tcp:127.0.0.1:{deaf.getsockname()[1]}"))
        peer, _ = deaf.accept()
        assert peer.recv(1) == b"\x16"
        assert ends.outgoing.status is MigrationStatus.SETUP
        ends.outgoing.cancel()
        wait_for(lambda: not ends.outgoing.is_running, "the cancel")
        assert ends.outgoing.status is MigrationStatus.CANCELLED
        peer.close()
