"""kvm.chardev: bytes in and out of files, pipes and nothing."""

import asyncio
import os

from kvm.chardev_options import from_chardev, from_device

from .chardev_ends import running


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
