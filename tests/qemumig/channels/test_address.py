"""URIs and MigrationAddresses."""

import pytest

from qemumig.channels.address import (
    ExecAddress,
    FdAddress,
    FileAddress,
    InetAddress,
    UnixAddress,
    VsockAddress,
    parse_channels,
    parse_size,
    parse_uri,
)
from qemumig.errors import OptionError

GOOD = {
    "tcp:127.0.0.1:4444": InetAddress("127.0.0.1", "4444"),
    "tcp::0": InetAddress("", "0"),
    "tcp:[::1]:7,to=9,ipv6,keep-alive=on": InetAddress("::1", "7", to=9, ipv6=True, keep_alive=True),
    "tcp:host:http,ipv4=off": InetAddress("host", "http", ipv4=False),
    "tcp:h:1,numeric,mptcp=on,": InetAddress("h", "1", numeric=True, mptcp=True),
    "tcp:h:1,keep-alive,keep-alive-count=3,keep-alive-idle=60,keep-alive-interval=5": InetAddress(
        "h", "1", keep_alive=True, keep_alive_count=3, keep_alive_idle=60, keep_alive_interval=5
    ),
    "vsock:3:1234": VsockAddress("3", "1234"),
    "vsock:a:2:b": VsockAddress("a", "2:b"),  # what the numbers are worth is found out when they are used
    "unix:/tmp/with,comma:colon": UnixAddress("/tmp/with,comma:colon"),
    "fd:mig": FdAddress("mig"),
    "exec:cat > /tmp/x,y": ExecAddress(("/bin/sh", "-c", "cat > /tmp/x,y")),
    "file:/tmp/s": FileAddress("/tmp/s", 0),
    "file:/tmp/s,offset=1.5K": FileAddress("/tmp/s", 1536),
    "file:/tmp/s,offset=0x1000": FileAddress("/tmp/s", 4096),
}


@pytest.mark.parametrize("uri", GOOD)
def test_good_uris(uri: str) -> None:
    assert parse_uri(uri) == GOOD[uri]


BAD = {
    "warp:9": "unknown migration protocol: warp:9",
    "tcp": "unknown migration protocol: tcp",
    "": "unknown migration protocol: ",
    "tcp:host": "error parsing address 'host'",
    "tcp:host:": "error parsing address 'host:'",
    "tcp:::1:4": "error parsing address '::1:4'",
    "tcp:" + "h" * 65 + ":1": "error parsing address",
    "tcp:[::1:4": "error parsing IPv6 address '[::1:4'",
    "tcp:[::1]": "error parsing IPv6 address '[::1]'",
    "tcp:h:" + "1" * 33: "error parsing address",
    "tcp:h:1,to=70000": "Parameter 'to' expects uint16_t",
    "tcp:h:1,to=" + "9" * 9999: "Parameter 'to' expects uint16_t",
    "tcp:h:1,to=x": "Parameter 'to' expects a number",
    "tcp:h:1,colour=red": "Invalid parameter 'colour'",
    "tcp:h:1,ipv4=maybe": "Parameter 'ipv4' expects 'on' or 'off'",
    "vsock:1": "error parsing address '1'",
    "vsock:1:": "error parsing address '1:'",
    "vsock::1": "error parsing address ':1'",
    "unix:": "invalid Unix socket address",
    "file:/x,offset=ten": "file URI has bad offset ten: Invalid argument",
    "file:/x,offset=9E": "an offset below 2^63",
    "file:": "needs a path",
    "fd:": "invalid file descriptor address",
    "exec:": "needs a command",
}


@pytest.mark.parametrize("uri", BAD)
def test_bad_uris_are_refused(uri: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_uri(uri)
    assert BAD[uri] in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("12", 12),
        ("1k", 1024),
        ("2M", 2 << 20),
        ("1.5G", 3 << 29),
        ("0xff", 255),
        ("7B", 7),
        (".5K", 512),
        ("1.E", 1 << 60),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "K", "-1", "1.2.3", ".", ".K", "1KK", "0xg", "0x_f", " 1", "1e3", "1\n", "٣", "9" * 9999]
)
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


def channel(addr: dict) -> list[dict]:
    return [{"channel-type": "main", "addr": addr}]


def test_channel_lists_give_the_same_records() -> None:
    inet = {"transport": "socket", "type": "inet", "host": "::1", "port": "7", "ipv6": True}
    assert parse_channels(channel(inet), incoming=False) == InetAddress("::1", "7", ipv6=True)
    unix = {"transport": "socket", "type": "unix", "path": "/s"}
    assert parse_channels(channel(unix), incoming=True) == UnixAddress("/s")
    assert parse_channels(channel(unix | {"abstract": True, "tight": False}), incoming=True) == UnixAddress(
        "/s", True, False
    )
    every = {"host": "h", "port": "1", "to": 9, "numeric": True, "mptcp": False, "keep-alive": True, "keep-alive-idle": 7}
    assert parse_channels(channel({"transport": "socket", "type": "inet"} | every), incoming=True) == InetAddress(
        "h", "1", to=9, numeric=True, mptcp=False, keep_alive=True, keep_alive_idle=7
    )
    vsock = {"transport": "socket", "type": "vsock", "cid": "2", "port": "3"}
    assert parse_channels(channel(vsock), incoming=False) == VsockAddress("2", "3")
    fd = {"transport": "socket", "type": "fd", "str": "mig"}
    assert parse_channels(channel(fd), incoming=False) == FdAddress("mig")
    assert parse_channels(channel({"transport": "exec", "args": ["/bin/cat"]}), incoming=True) == ExecAddress(("/bin/cat",))
    file = {"transport": "file", "filename": "/f", "offset": 5}
    assert parse_channels(channel(file), incoming=False) == FileAddress("/f", 5)


@pytest.mark.parametrize(
    ("channels", "finding"),
    [
        (channel({"transport": "socket", "type": "inet", "host": "h"}), "'channels[0].addr.port' is missing"),
        (channel({"transport": "socket", "type": "inet", "host": 1, "port": "2"}), "expected: string"),
        (channel({"transport": "file", "filename": "/f", "offset": -1}), "expects a size below 2^63"),
        (channel({"transport": "file", "filename": "/f", "offset": True}), "expected: integer"),
        (channel({"transport": "exec", "args": []}), "expects a list of strings"),
        (channel({"transport": "rdma"}), "does not accept value 'rdma'"),
        (channel({"transport": "socket", "type": "vsock", "cid": "1"}), "'channels[0].addr.port' is missing"),
        (channel({"transport": "socket", "type": "carrier-pigeon"}), "does not accept value 'carrier-pigeon'"),
        (channel({"transport": "socket", "type": "unix", "path": ""}), "invalid Unix socket address"),
        (channel({"transport": "socket", "type": "inet", "host": "h", "port": "1", "to": 70000}), "expects uint16_t"),
        (channel({"transport": "socket", "type": "inet", "host": "h", "port": "1", "ipv4": "on"}), "expected: boolean"),
        (2 * channel({}), "more than one main entry"),
        ([{"channel-type": "cpr", "addr": {}}], "must have only one entry, for type 'main'"),
    ],
)
def test_bad_channel_lists_are_refused(channels: list, finding: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_channels(channels, incoming=False)
    assert finding in str(caught.value)
