"""TLS on channels: who is let in, who is not, and what a connection that breaks looks like."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from qemumig.channels.address import ExecAddress, FdAddress, FileAddress, InetAddress, UnixAddress
from qemumig.channels.channel import QuitEvent, SocketChannel
from qemumig.channels.connect import SocketListener, incoming, outgoing, tls_of_destination, tls_of_source
from qemumig.channels.tls import TlsChannel, TlsClient, TlsServer
from qemumig.errors import ChannelError, OptionError
from qemumig.wire.stream import InputStream

from .pki import CLIENT_NAME, make, psk_directory, strange, x509_directory
from .tls_ends import Parameters, certificates, exchange, in_thread, pair, send, shake, x509

KEY, OTHER_KEY = "11" * 32, "22" * 32


KINDS = ["x509", "psk", "anon", "x509-1.2", "psk-1.2"]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_go_both_ways_at_once(kind: str, tmp_path: Path, quit_event: QuitEvent) -> None:
    name, _, old = kind.partition("-")
    options = {"priority": "NORMAL:-VERS-TLS1.3"} if old else {}
    if name == "x509":
        options["dir"] = str(x509_directory(tmp_path / "x509"))
    elif name == "psk":
        options["dir"] = str(psk_directory(tmp_path, qemu=KEY))
    client, server = (make(f"tls-creds-{name}", endpoint=endpoint, **options) for endpoint in ("client", "server"))
    source, destination = shake(TlsClient(client, "localhost"), TlsServer(server, None), quit_event)
    assert isinstance(source, TlsChannel) and isinstance(destination, TlsChannel)
    exchange(source, destination)


def test_nothing_of_it_can_be_read_on_the_way(tmp_path: Path, quit_event: QuitEvent) -> None:
    client, server = certificates(tmp_path)
    (left, near), (far, right) = socket.socketpair(), socket.socketpair()
    seen = bytearray()

    def relay() -> None:
        ways = {near: far, far: near}
        while ways:
            for source in select.select(list(ways), [], [])[0]:
                data = source.recv(65536)
                seen.extend(data)
                if not data:
                    ways.pop(source).shutdown(socket.SHUT_WR)
                    continue
                with contextlib.suppress(BrokenPipeError):  # who announced an end need not wait for the other's
                    ways[source].sendall(data)

    relaying = in_thread(relay)
    wait = in_thread(lambda: client.wrap(SocketChannel("left", left, quit_event.fd)))
    destination = server.wrap(SocketChannel("right", right, quit_event.fd))
    source = wait()
    message = b"QEVM" + b"the guest's secrets " * 1000
    send(source, message)
    source.close()
    stream = InputStream(destination)
    assert stream.read(len(message)) == message
    assert stream.peek(1) == b""
    destination.close()
    relaying()
    near.close()
    far.close()
    assert seen[0] == 0x16  # a handshake record
    assert b"QEVM" not in seen and b"secrets" not in seen


# ---- who is let in ----


@pytest.mark.parametrize("hostname", ["localhost", "127.0.0.1", "::1", "any.wild.test"])
def test_names_in_the_servers_certificate_are_accepted(hostname: str, tmp_path: Path, quit_event: QuitEvent) -> None:
    source, destination = shake(*certificates(tmp_path, hostname), quit_event)
    assert isinstance(source, TlsChannel) and isinstance(destination, TlsChannel)
    source.close()
    destination.close()


@pytest.mark.parametrize(
    "hostname", ["elsewhere.test", "127.0.0.2", "wild.test", "a.b.wild.test", "named.test", "münchen.test"]
)
def test_other_names_are_refused(hostname: str, tmp_path: Path, quit_event: QuitEvent) -> None:
    source, destination = shake(*certificates(tmp_path, hostname), quit_event)
    assert str(source) == f"Certificate does not match the hostname {hostname}"
    assert "TLS handshake failed: " in str(destination)


def test_a_name_that_no_certificate_can_have_is_refused(tmp_path: Path, quit_event: QuitEvent) -> None:
    client, _ = certificates(tmp_path, "ü" * 300)
    left, right = socket.socketpair()
    with pytest.raises(ChannelError, match=r"no TLS on socket 'left': the host name 'ü+' cannot be in a certificate"):
        client.wrap(SocketChannel("left", left, quit_event.fd))
    assert right.recv(1) == b""
    right.close()


def test_a_server_of_another_authority_is_refused(tmp_path: Path, quit_event: QuitEvent) -> None:
    client = TlsClient(x509(x509_directory(tmp_path / "good"), "client"), "localhost")
    server = TlsServer(x509(strange(tmp_path / "strange"), "server", verify_peer=False), None)
    source, destination = shake(client, server, quit_event)
    assert str(source) == "The certificate hasn't got a known issuer"
    assert "TLS handshake failed: " in str(destination)


def test_a_client_may_choose_to_trust_anybody(tmp_path: Path, quit_event: QuitEvent) -> None:
    client = TlsClient(x509(x509_directory(tmp_path / "good"), "client", verify_peer=False), "")
    server = TlsServer(x509(strange(tmp_path / "strange"), "server", verify_peer=False), None)
    source, destination = shake(client, server, quit_event)
    assert isinstance(source, TlsChannel) and isinstance(destination, TlsChannel)
    exchange(source, destination)


@pytest.mark.parametrize("case", ["strange", "none", "revoked"])
def test_clients_without_a_good_certificate_are_refused(case: str, tmp_path: Path, quit_event: QuitEvent) -> None:
    if case == "strange":
        directory = strange(tmp_path / "client")
    elif case == "none":
        directory = x509_directory(tmp_path / "client", client_cert="", client_key="")
    else:
        directory = x509_directory(tmp_path / "client")
    server_directory = x509_directory(tmp_path / "server", **({"ca_crl": "good-ca-crl"} if case == "revoked" else {}))
    client = TlsClient(x509(directory, "client", verify_peer=False), "")
    source, destination = shake(client, TlsServer(x509(server_directory, "server"), None), quit_event)
    reasons = {
        "strange": "The certificate hasn't got a known issuer",
        "none": "TLS handshake failed: peer did not return a certificate",
        "revoked": "The certificate has been revoked",
    }
    assert str(destination) == reasons[case]
    if isinstance(source, TlsChannel):  # with TLS 1.3 a client learns that only when it reads or writes
        with pytest.raises(ChannelError, match="alert"):
            InputStream(source).read(1)
        source.close()


def test_a_server_may_do_without_client_certificates(tmp_path: Path, quit_event: QuitEvent) -> None:
    directory = x509_directory(tmp_path / "x509", client_cert="", client_key="")
    server = TlsServer(x509(directory, "server", verify_peer=False), None)
    source, destination = shake(TlsClient(x509(directory, "client"), "localhost"), server, quit_event)
    assert isinstance(source, TlsChannel) and isinstance(destination, TlsChannel)
    exchange(source, destination)


@pytest.mark.parametrize("version", ["", "NORMAL:-VERS-TLS1.3"], ids=["1.3", "1.2"])
def test_pre_shared_keys_must_be_the_same(version: str, tmp_path: Path, quit_event: QuitEvent) -> None:
    here, there = psk_directory(tmp_path / "a", qemu=KEY, only=KEY), psk_directory(tmp_path / "b", qemu=OTHER_KEY)
    server = TlsServer(make("tls-creds-psk", dir=str(there), endpoint="server"), None)
    for user in ("qemu", "only"):
        creds = make("tls-creds-psk", dir=str(here), username=user, **({"priority": version} if version else {}))
        source, destination = shake(TlsClient(creds, ""), server, quit_event)
        assert "TLS handshake failed: " in str(source)
        assert "TLS handshake failed: " in str(destination)


def test_a_new_user_needs_no_new_server(tmp_path: Path, quit_event: QuitEvent) -> None:
    there = psk_directory(tmp_path / "server", qemu=KEY)
    server = TlsServer(make("tls-creds-psk", dir=str(there), endpoint="server"), None)
    client = TlsClient(make("tls-creds-psk", dir=str(psk_directory(tmp_path / "c", new=KEY)), username="new"), "")
    assert isinstance(shake(client, server, quit_event)[1], ChannelError)
    psk_directory(there, qemu=KEY, new=KEY)
    source, destination = shake(client, server, quit_event)
    assert isinstance(source, TlsChannel) and isinstance(destination, TlsChannel)
    exchange(source, destination)


# ---- authorization ----


def side_of(tmp_path: Path, kind: str, endpoint: str) -> Any:
    if kind == "x509":
        path = tmp_path / "x509"
        return x509(path if path.exists() else x509_directory(path), endpoint)
    return make("tls-creds-psk", dir=str(psk_directory(tmp_path, qemu=KEY)), endpoint=endpoint)


@pytest.mark.parametrize(("kind", "identity"), [("x509", CLIENT_NAME), ("psk", "qemu")])
@pytest.mark.parametrize("allowed", [True, False], ids=["allowed", "denied"])
def test_the_proved_identity_is_authorized(
    kind: str, identity: str, allowed: bool, tmp_path: Path, quit_event: QuitEvent
) -> None:
    objects = {
        "creds": side_of(tmp_path, kind, "server"),
        "authz": make("authz-simple", identity=identity if allowed else "somebody else"),
    }
    server = tls_of_destination(Parameters("creds", authz="authz"), objects.get)
    client = TlsClient(side_of(tmp_path, kind, "client"), "localhost")
    assert server is not None
    source, destination = shake(client, server, quit_event)
    assert isinstance(source, TlsChannel)
    if allowed:
        assert isinstance(destination, TlsChannel)
        exchange(source, destination)
        return
    assert str(destination) == f"TLS x509 authz check for {identity} is denied"
    with pytest.raises(ChannelError, match="cut off"):
        InputStream(source).read(1)
    source.close()


@pytest.mark.parametrize(
    ("objects", "finding"),
    [
        ({}, "Cannot find QAuthZ object ID authz"),
        ({"authz": object()}, "Object 'authz' is not a QAuthZ subclass"),
    ],
)
def test_without_an_authorizer_nobody_is_let_in(
    objects: dict[str, Any], finding: str, tmp_path: Path, quit_event: QuitEvent
) -> None:
    found = {"creds": side_of(tmp_path, "x509", "server"), **objects}
    server = tls_of_destination(Parameters("creds", authz="authz"), found.get)
    assert server is not None
    source, destination = shake(TlsClient(side_of(tmp_path, "x509", "client"), "localhost"), server, quit_event)
    assert str(destination) == finding
    assert isinstance(source, TlsChannel)
    source.close()


def test_an_identity_that_nobody_has_checked_is_not_authorized(tmp_path: Path, quit_event: QuitEvent) -> None:
    directory = x509_directory(tmp_path / "x509")
    server = TlsServer(x509(directory, "server", verify_peer=False), lambda identity: True)
    source, destination = shake(TlsClient(x509(directory, "client"), "localhost"), server, quit_event)
    assert "the peer has proved no identity" in str(destination)
    assert isinstance(source, TlsChannel)
    source.close()


# ---- from parameters ----


@pytest.mark.parametrize(
    ("objects", "finding"),
    [
        ({}, "No TLS credentials with id 'creds'"),
        ({"creds": object()}, "Object with id 'creds' is not TLS credentials"),
    ],
)
def test_parameters_that_name_no_credentials_are_refused(objects: dict[str, Any], finding: str) -> None:
    for ask in (
        lambda: tls_of_source(Parameters("creds"), objects.get, UnixAddress("/s")),
        lambda: tls_of_destination(Parameters("creds"), objects.get),
    ):
        with pytest.raises(OptionError, match=finding):
            ask()


def test_credentials_are_for_one_side(tmp_path: Path) -> None:
    objects = {"s": side_of(tmp_path, "x509", "server"), "c": side_of(tmp_path, "x509", "client")}
    with pytest.raises(OptionError, match="Expected TLS credentials for a client endpoint"):
        tls_of_source(Parameters("s"), objects.get, UnixAddress("/s"))
    with pytest.raises(OptionError, match="Expected TLS credentials for a server endpoint"):
        tls_of_destination(Parameters("c"), objects.get)


def test_the_name_to_check_comes_from_the_address_or_the_parameter(tmp_path: Path) -> None:
    find = {"c": side_of(tmp_path, "x509", "client")}.get
    with pytest.raises(OptionError, match="No hostname for certificate validation"):
        tls_of_source(Parameters("c"), find, UnixAddress("/s"))
    assert tls_of_source(Parameters("c", hostname="h"), find, UnixAddress("/s")) is not None
    assert tls_of_source(Parameters("c"), find, InetAddress("localhost", "1")) is not None


def test_without_credentials_there_is_no_tls() -> None:
    assert tls_of_source(Parameters(), {}.get, UnixAddress("/s")) is None
    assert tls_of_destination(Parameters(), {}.get) is None


# ---- a connection that breaks ----


def test_an_end_that_was_not_announced_is_an_error(tmp_path: Path, quit_event: QuitEvent) -> None:
    source, destination = pair(tmp_path, quit_event)
    send(source, b"half of")
    source.shutdown()
    stream = InputStream(destination)
    assert stream.read(7) == b"half of"
    with pytest.raises(ChannelError, match=r"the TLS connection was cut off, its end was not announced at offset 0x7"):
        stream.read(1)
    with pytest.raises(ChannelError, match="Unable to write to socket"):
        send(destination, b"answer")
    source.close()
    destination.close()


def test_an_announced_end_leaves_the_other_direction_open(tmp_path: Path, quit_event: QuitEvent) -> None:
    source, destination = pair(tmp_path, quit_event)
    source.finish()
    assert InputStream(destination).peek(1) == b""
    send(destination, b"still here")
    assert InputStream(source).read(10) == b"still here"
    destination.close()
    source.close()


def test_noise_on_the_way_is_an_error_for_good(tmp_path: Path, quit_event: QuitEvent) -> None:
    source, destination = pair(tmp_path, quit_event)
    os.write(source.write_fd, b"\x17\x03\x03\x00\x20" + bytes(32))  # a record that nobody enciphered
    stream = InputStream(destination)
    for _ in range(2):
        with pytest.raises(ChannelError, match=r"Unable to read from socket: .*bad record mac"):
            stream.read(1)
    source.close()
    destination.close()


def test_a_transport_that_flows_one_way_cannot_have_tls(tmp_path: Path, quit_event: QuitEvent) -> None:
    client, _ = certificates(tmp_path)
    read_end, write_end = os.pipe()
    names = {"pipe": write_end}
    for address in (FdAddress("pipe"), FileAddress(f"{tmp_path}/file")):
        with pytest.raises(ChannelError, match=r"no TLS on file '.*': it needs a transport that flows both ways"):
            outgoing(address, quit_event.fd, names.pop, tls=lambda: client)()
    os.close(read_end)


BRIDGE = """
import os, socket, threading
sock = socket.socket(socket.AF_UNIX)
sock.connect({path!r})
def back():
    while data := sock.recv(65536):
        os.write(1, data)
    os.close(1)
threading.Thread(target=back).start()
while data := os.read(0, 65536):
    sock.sendall(data)
sock.shutdown(socket.SHUT_WR)
"""


def test_a_command_carries_tls(tmp_path: Path, quit_event: QuitEvent) -> None:
    client, server = certificates(tmp_path)
    listener = incoming(UnixAddress(f"{tmp_path}/s"), quit_event.fd, lambda name: -1, tls=lambda: server)
    command = ExecAddress((sys.executable, "-c", BRIDGE.format(path=f"{tmp_path}/s")))
    opening = in_thread(lambda: outgoing(command, quit_event.fd, lambda name: -1, tls=lambda: client)())
    assert isinstance(listener, SocketListener)
    destination = listener.accept(speaks=False)
    source = opening()
    assert isinstance(source, TlsChannel) and isinstance(destination, TlsChannel)
    exchange(source, destination)
    listener.close()
