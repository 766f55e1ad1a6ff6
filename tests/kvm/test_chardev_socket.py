"""kvm.chardev: sockets, with clients that come, go, pause, and send descriptors."""

import array
import asyncio
import os
import socket
import stat
import threading

import pytest

from kvm.chardev.output import OUTPUT_LIMIT
from kvm.chardev_options import from_chardev, from_device
from kvm.keyval import UsageError

from .chardev_ends import PATIENCE_S, Listener, connect, read_exactly, read_to_end, running


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
