"""kvm.chardev and kvm.chardev_options: bytes in and out, files, pipes, sockets, and who is told what went wrong."""

import array
import asyncio
import contextlib
import os
import socket
import stat
import threading

import pytest

from kvm.chardev import FrontEnd
from kvm.chardev.output import OUTPUT_LIMIT
from kvm.chardev_options import CharDevices, from_chardev, from_device
from kvm.keyval import UsageError

PATIENCE_S = 10


class Listener:
    """A front end that remembers what it was told and lets a test wait for it."""

    def __init__(self):
        self.data = bytearray()
        self.descriptors = []
        self.connections = 0
        self.disconnections = 0
        self._change = asyncio.Event()

    def front_end(self):
        return FrontEnd(self.received, self.connected, self.disconnected)

    def received(self, data, descriptors):
        self.data += data
        self.descriptors += descriptors
        self._change.set()

    def connected(self):
        self.connections += 1
        self._change.set()

    def disconnected(self):
        self.disconnections += 1
        self._change.set()

    async def until(self, condition):
        async with asyncio.timeout(PATIENCE_S):
            while not condition(self):
                self._change.clear()
                await self._change.wait()


@contextlib.asynccontextmanager
async def running(text, label="c0"):
    """The back end of DEV *text*, open and started, with a Listener attached."""
    backend = from_device(text, label)
    listener = Listener()
    backend.attach(listener.front_end())
    backend.open()
    try:
        await backend.start()
        yield backend, listener
    finally:
        backend.close()


async def connect(path):
    client = socket.socket(socket.AF_UNIX)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, str(path))
    return client


async def read_exactly(client, count):
    loop = asyncio.get_running_loop()
    data = b""
    async with asyncio.timeout(PATIENCE_S):
        while len(data) < count:
            piece = await loop.sock_recv(client, count - len(data))
            assert piece, f"connection ended after {data!r}"
            data += piece
    return data


async def read_to_end(client):
    loop = asyncio.get_running_loop()
    data = b""
    async with asyncio.timeout(PATIENCE_S):
        while piece := await loop.sock_recv(client, 1 << 20):
            data += piece
    return data


# ---- files, pipes, null ----


def test_null_takes_everything():
    assert from_device("null", "c0").write(b"abc") == 3


def test_a_file_is_emptied_and_gets_each_byte_at_once(directory):
    path = directory / "out"
    path.write_bytes(b"old contents")
    backend = from_device(f"file:{path}", "c0")
    backend.open()
    assert path.read_bytes() == b""
    assert backend.write(b"a") == 1
    assert path.read_bytes() == b"a"
    backend.close()


def test_a_file_name_may_hold_commas_after_file(directory):
    backend = from_device(f"file:{directory}/x,append=on", "c0")
    backend.open()
    backend.close()
    assert (directory / "x,append=on").exists()


def test_append_keeps_what_is_there(directory):
    path = directory / "out"
    path.write_bytes(b"old ")
    backend = from_chardev(f"file,id=c0,path={path},append=on", print)
    backend.open()
    backend.write(b"new")
    backend.close()
    assert path.read_bytes() == b"old new"


def test_a_fifo_opens_without_a_reader_and_serves_one_that_comes(directory):
    path = directory / "fifo"
    os.mkfifo(path)
    backend = from_device(f"file:{path}", "c0")
    backend.open()
    with open(path, "rb", buffering=0) as reader:
        backend.write(b"hello")
        assert reader.read(5) == b"hello"
    assert backend.write(b"nobody listens") == 14
    backend.close()


def test_a_full_fifo_does_not_hold_up_the_writer_and_loses_nothing(directory):
    path = directory / "fifo"
    os.mkfifo(path)
    sent = bytes(range(256)) * 1200  # several times what a pipe holds

    async def scenario():
        async with running(f"file:{path}") as (backend, _):
            reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            for start in range(0, len(sent), 100):
                assert backend.write(sent[start : start + 100]) > 0
            assert backend.output.pending > 0
            got = await asyncio.to_thread(read_descriptor, reader, len(sent))
            os.close(reader)
            return got

    assert asyncio.run(scenario()) == sent


def read_descriptor(descriptor, count):
    os.set_blocking(descriptor, True)
    data = b""
    while len(data) < count:
        data += os.read(descriptor, count - len(data))
    return data


def test_pipe_uses_one_fifo_each_way(directory):
    os.mkfifo(directory / "p.in")
    os.mkfifo(directory / "p.out")

    async def scenario():
        async with running(f"pipe:{directory}/p") as (backend, listener):
            to_guest = os.open(directory / "p.in", os.O_WRONLY)
            from_guest = os.open(directory / "p.out", os.O_RDONLY | os.O_NONBLOCK)
            os.write(to_guest, b"in")
            await listener.until(lambda told: told.data == b"in")
            backend.write(b"out")
            assert os.read(from_guest, 10) == b"out"
            os.close(to_guest)
            os.close(from_guest)

    asyncio.run(scenario())


# ---- sockets ----


def test_a_server_serves_one_client_after_the_other(directory):
    async def scenario():
        async with running(f"unix:{directory}/s,server=on,wait=off") as (backend, listener):
            assert backend.write(b"nobody hears this") == 17
            first = await connect(directory / "s")
            await listener.until(lambda told: told.connections == 1)
            second = await connect(directory / "s")  # waits in the backlog
            second.send(b"second")
            first.send(b"first")
            await listener.until(lambda told: told.data == b"first")
            backend.write(b"to the first")
            assert await read_exactly(first, 12) == b"to the first"
            first.close()
            await listener.until(lambda told: told.data == b"firstsecond")
            assert (listener.connections, listener.disconnections) == (2, 1)
            backend.write(b"to the second")
            assert await read_exactly(second, 13) == b"to the second"
            second.close()

    asyncio.run(scenario())


def test_wait_on_returns_from_start_with_the_first_client(directory):
    async def scenario():
        said = []
        backend = from_device(f"unix:{directory}/s,server=on", "c0")
        backend.option, backend.report = "-serial X", said.append
        backend.open()
        start = asyncio.create_task(backend.start())
        await asyncio.sleep(0)
        assert not start.done()
        client = await connect(directory / "s")
        await asyncio.wait_for(start, PATIENCE_S)
        client.close()
        backend.close()
        assert said == [f"-serial X: info: QEMU waiting for connection on: disconnected:unix:{directory}/s,server=on"]

    asyncio.run(scenario())


def test_a_socket_that_nobody_reads_is_filled_up_to_a_limit(directory):
    async def scenario():
        async with running(f"unix:{directory}/s,server=on,wait=off") as (backend, listener):
            client = await connect(directory / "s")
            await listener.until(lambda told: told.connections == 1)
            accepted = 0
            while taken := backend.write(b"x" * 1000):
                accepted += taken
            assert backend.output.pending <= OUTPUT_LIMIT + 1000
            backend.drop_client()
            assert len(await read_to_end(client)) <= accepted
            client.close()

    asyncio.run(scenario())


def test_many_threads_write_whole_pieces_in_their_own_order(directory):
    async def scenario():
        async with running(f"unix:{directory}/s,server=on,wait=off") as (backend, listener):
            client = await connect(directory / "s")
            await listener.until(lambda told: told.connections == 1)

            def write(letter):
                for number in range(500):
                    assert backend.write(b"%c%03d" % (letter, number)) == 4

            threads = [threading.Thread(target=write, args=(ord(letter),)) for letter in "abcd"]
            for thread in threads:
                thread.start()
            data = await read_exactly(client, 4 * 500 * 4)
            for thread in threads:
                thread.join()
            client.close()
            return [data[start : start + 4] for start in range(0, len(data), 4)]

    pieces = asyncio.run(scenario())
    for letter in "abcd":
        own = [piece for piece in pieces if piece[:1] == letter.encode()]
        assert own == [f"{letter}{number:03}".encode() for number in range(500)]


def test_pause_keeps_bytes_in_the_socket_until_resume(directory):
    async def scenario():
        async with running(f"unix:{directory}/s,server=on,wait=off") as (backend, listener):
            client = await connect(directory / "s")
            await listener.until(lambda told: told.connections == 1)
            backend.pause()
            client.send(b"later")
            for _ in range(5):  # turns of the loop in which the bytes would have come
                await asyncio.sleep(0)
            assert listener.data == b""
            backend.resume()
            await listener.until(lambda told: told.data == b"later")
            client.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("end", ["close", "shutdown"])
def test_a_client_that_has_gone_during_a_pause_gives_way_where_the_front_end_lets_go(directory, end):
    async def scenario():
        async with running(f"unix:{directory}/s,server=on,wait=off") as (backend, listener):
            first = await connect(directory / "s")
            await listener.until(lambda told: told.connections == 1)
            backend.pause()
            first.send(b"never read")
            first.close() if end == "close" else first.shutdown(socket.SHUT_WR)
            second = await connect(directory / "s")
            await listener.until(lambda told: told.connections == 2)
            second.send(b"second")
            await listener.until(lambda told: told.data == b"second")
            assert listener.disconnections == 1
            first.close()
            second.close()

    asyncio.run(scenario())


def test_without_a_next_client_one_that_closed_its_end_is_served_to_its_end(directory):
    async def scenario():
        async with running(f"unix:{directory}/s,server=on,wait=off") as (backend, listener):
            client = await connect(directory / "s")
            await listener.until(lambda told: told.connections == 1)
            backend.pause()
            client.send(b"last words")
            client.shutdown(socket.SHUT_WR)
            for _ in range(5):
                await asyncio.sleep(0)
            backend.resume()
            await listener.until(lambda told: told.data == b"last words")
            await listener.until(lambda told: told.disconnections == 1)
            client.close()

    asyncio.run(scenario())


def test_a_front_end_that_does_not_let_go_reads_all_of_a_client_before_the_next(directory):
    async def scenario():
        async with running(f"unix:{directory}/s,server=on,wait=off") as (backend, listener):
            backend.front_end.lets_go = False
            first = await connect(directory / "s")
            await listener.until(lambda told: told.connections == 1)
            backend.pause()
            first.send(b"first")
            first.close()
            second = await connect(directory / "s")
            second.send(b"second")
            for _ in range(5):
                await asyncio.sleep(0)
            backend.resume()
            await listener.until(lambda told: told.data == b"firstsecond")
            second.close()

    asyncio.run(scenario())


def test_a_device_that_only_wants_bytes_may_pause_for_a_while(directory):
    async def scenario():
        backend = from_device(f"unix:{directory}/s,server=on,wait=off", "c0")
        got, changed = bytearray(), asyncio.Event()

        def receive(data):
            got.extend(data)
            changed.set()
            backend.pause()

        backend.set_receiver(receive)
        backend.open()
        await backend.start()
        client = await connect(directory / "s")
        client.send(b"one")
        await asyncio.wait_for(changed.wait(), PATIENCE_S)
        client.send(b"two")
        for _ in range(5):  # turns of the loop in which the bytes would have come
            await asyncio.sleep(0)
        assert got == b"one"
        changed.clear()
        backend.resume()
        await asyncio.wait_for(changed.wait(), PATIENCE_S)
        assert got == b"onetwo"
        client.close()
        backend.close()

    asyncio.run(scenario())


def test_descriptors_arrive_with_their_bytes(directory):
    async def scenario():
        async with running(f"unix:{directory}/s,server=on,wait=off") as (_, listener):
            client = await connect(directory / "s")
            reader, writer = os.pipe()
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writer]))
            client.sendmsg([b"take this"], [rights])
            await listener.until(lambda told: told.data == b"take this")
            (received,) = listener.descriptors
            assert not os.get_inheritable(received)
            os.write(received, b"through")
            assert os.read(reader, 10) == b"through"
            for descriptor in (reader, writer, received):
                os.close(descriptor)
            client.close()

    asyncio.run(scenario())


def test_a_client_connects_when_it_is_opened(directory):
    async def scenario():
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(directory / "s"))
        server.listen()
        async with running(f"unix:{directory}/s") as (backend, listener):
            peer, _ = server.accept()
            assert listener.connections == 1
            backend.write(b"hello")
            assert peer.recv(10) == b"hello"
            peer.close()
            await listener.until(lambda told: told.disconnections == 1)
            assert backend.write(b"gone") == 4
        server.close()

    asyncio.run(scenario())


def test_tcp_listens_on_a_free_port_and_names_it():
    async def scenario():
        async with running("tcp:127.0.0.1:0,server=on,wait=off") as (backend, listener):
            port = int(backend.address.rpartition(":")[2])
            client = socket.create_connection(("127.0.0.1", port))
            client.send(b"x")
            await listener.until(lambda told: told.data == b"x")
            client.close()

    asyncio.run(scenario())


def test_an_inherited_socket_is_used_as_what_it_is(directory):
    async def scenario():
        ours, theirs = socket.socketpair()
        backend = from_chardev(f"socket,id=c0,fd={theirs.detach()}", print)
        listener = Listener()
        backend.attach(listener.front_end())
        backend.open()
        await backend.start()
        ours.send(b"x")
        await listener.until(lambda told: told.data == b"x")
        backend.close()
        assert ours.recv(1) == b""
        ours.close()

    asyncio.run(scenario())


def test_close_removes_the_socket_file(directory):
    path = directory / "s"
    backend = from_device(f"unix:{path},server=on,wait=off", "c0")
    backend.open()
    assert stat.S_ISSOCK(path.stat().st_mode)
    backend.close()
    assert not path.exists()


def test_close_leaves_a_socket_file_of_somebody_else(directory):
    path = directory / "s"
    first = from_device(f"unix:{path},server=on,wait=off", "c0")
    first.open()
    second = from_device(f"unix:{path},server=on,wait=off", "c1")
    second.open()  # takes the name over, as QEMU does
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()


def test_an_ordinary_file_is_not_replaced_by_a_socket(directory):
    path = directory / "precious"
    path.write_text("contents")
    with pytest.raises(UsageError, match="Failed to bind socket"):
        from_device(f"unix:{path},server=on,wait=off", "c0").open()
    assert path.read_text() == "contents"


def test_nothing_is_left_behind(directory, no_leaks):
    async def scenario():
        async with running(f"unix:{directory}/s,server=on,wait=off") as (backend, listener):
            client = await connect(directory / "s")
            await listener.until(lambda told: told.connections == 1)
            backend.write(b"x" * 100)
            client.close()

    asyncio.run(scenario())


# ---- what is said about mistakes ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo", "'foo' is not a valid char driver"),
        ("", "'' is not a valid char driver"),
        ("null,foo=1", "'null,foo=1' is not a valid char driver"),
        ("unix:s,foo=1", "Invalid parameter 'foo'"),
        ("unix:s,server=maybe", "Parameter 'server' expects 'on' or 'off'"),
        ("unix:s,wait=off", "'wait' option is incompatible with socket in client connect mode"),
        ("unix:s,server=on,telnet=on", "'telnet' is not available for socket character devices"),
        ("tcp:127.0.0.1", "'127.0.0.1' names no port: tcp:HOST:PORT is expected"),
        ("pty", "character device 'pty' is not available"),
    ],
)
def test_bad_dev_syntax_is_named(text, message):
    with pytest.raises(UsageError) as caught:
        from_device(text, "c0")
    assert caught.value.messages == (message,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null", "chardev: no id specified"),
        ("foo,id=x", "'foo' is not a valid char driver name"),
        ("id=c0", 'chardev: "c0" missing backend'),
        ("null,id=0c", "Parameter 'id' expects an identifier"),
        ("null,id=c0,foo=1", "Invalid parameter 'foo'"),
        ("file,id=c0", "chardev: file: no filename given"),
        ("socket,id=c0,host=h", "chardev: socket: no port given"),
        ("socket,id=c0,path=p,host=h,port=1", "None or one of 'path', 'fd' or 'host' option required."),
        ("socket,id=c0,path=p,wait=off", "'wait' option is incompatible with socket in client connect mode"),
    ],
)
def test_bad_chardev_options_are_named(text, message):
    with pytest.raises(UsageError) as caught:
        from_chardev(text, print)
    assert caught.value.messages == (message,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file:{d}/no/x", "Could not open '{d}/no/x': No such file or directory"),
        ("pipe:{d}/no/x", "Could not open '{d}/no/x': No such file or directory"),
        ("unix:{d}/no/x,server=on", "Failed to bind socket to {d}/no/x: No such file or directory"),
        ("unix:{d}/no", "Failed to connect to '{d}/no': No such file or directory"),
        ("tcp:127.0.0.1:1", "Failed to connect to '127.0.0.1:1': Connection refused"),
    ],
)
def test_what_cannot_be_opened_is_named(directory, text, message):
    with pytest.raises(UsageError) as caught:
        from_device(text.format(d=directory), "c0").open()
    assert caught.value.messages == (message.format(d=directory),)


def test_a_descriptor_that_is_no_socket_is_refused():
    reader, writer = os.pipe()
    backend = from_chardev(f"socket,id=c0,fd={reader}", print)
    with pytest.raises(UsageError, match=f"File descriptor '{reader}' is not a socket"):
        backend.open()
    os.close(reader)
    os.close(writer)


def test_the_short_form_of_a_switch_works_with_a_warning(directory):
    said = []
    devices = CharDevices(said.append)
    devices.add_chardev(f"socket,id=c0,path={directory}/s,server,nowait")
    assert (directory / "s").exists()
    devices.close()
    assert [line.rpartition(": ")[2] for line in said] == [
        "short-form boolean option 'server' deprecated; use server=on instead",
        "short-form boolean option 'nowait' deprecated; use wait=off instead",
    ]


def test_the_legacy_short_form_of_dev_has_no_warning(directory):
    said = []
    devices = CharDevices(said.append)
    devices.add_device("-qmp", f"unix:{directory}/s,server,nowait", "c0", "")
    devices.close()
    assert said == []


class TestCharDevices:
    def messages(self, action):
        with pytest.raises(UsageError) as caught:
            action(CharDevices(print))
        return caught.value.messages

    def test_an_id_is_used_once(self):
        def twice(devices):
            devices.add_chardev("null,id=c0")
            devices.add_chardev("null,id=c0")

        assert self.messages(twice) == ("-chardev null,id=c0: Duplicate ID 'c0' for chardev",)

    def test_stdio_is_used_once(self):
        def twice(devices):
            devices.add_chardev("stdio,id=c0")
            devices.add_chardev("stdio,id=c1")

        assert self.messages(twice) == ("-chardev stdio,id=c1: cannot use stdio by multiple character devices",)

    def test_a_background_process_has_no_stdio(self):
        with pytest.raises(UsageError, match="cannot use stdio with -daemonize"):
            CharDevices(print, daemonize=True).add_chardev("stdio,id=c0")

    def test_a_back_end_has_one_front_end(self):
        def twice(devices):
            devices.add_chardev("null,id=c0")
            devices.claim("c0")
            devices.claim("c0")

        assert self.messages(twice) == ("chardev 'c0' is already in use",)

    def test_an_unknown_label_is_named(self):
        assert self.messages(lambda devices: devices.claim("nope")) == ('chardev "nope" not found',)

    def test_the_second_line_says_what_the_failure_means(self):
        def serial(devices):
            devices.add_device("-serial", "foo", "serial0", "could not connect")

        assert self.messages(serial) == (
            "-serial foo: 'foo' is not a valid char driver",
            "-serial foo: could not connect",
        )
