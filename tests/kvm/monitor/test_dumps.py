"""kvm.monitor.dumps: guest memory into files (qmp.md §14)."""

import asyncio
import os

import pytest

from .harness import serve


def test_pmemsave_writes_guest_memory_to_a_file(directory):
    path = directory / "dump"
    path.write_bytes(b"x" * 100000)

    async def scenario(house):
        return await (await house.client()).ask("pmemsave", val=5, size=3000, filename=str(path))

    assert serve(scenario, directory) == {"return": {}}
    assert path.read_bytes() == bytes((5 + offset) & 0xFF for offset in range(3000))


def test_pmemsave_of_nothing_makes_an_empty_file(directory):
    async def scenario(house):
        return await (await house.client()).ask("pmemsave", val=0, size=0, filename=str(directory / "dump"))

    assert serve(scenario, directory) == {"return": {}}
    assert (directory / "dump").read_bytes() == b""


@pytest.mark.parametrize(
    ("name", "desc"),
    [
        ("{d}/no/dump", "Could not open '{d}/no/dump': No such file or directory"),
        ("{d}", "Could not open '{d}': Is a directory"),
        ("a\0b", "Could not open 'a\0b': embedded null byte"),
        ("/dev/full", "writing memory to '/dev/full' failed: No space left on device"),
    ],
)
def test_pmemsave_says_what_failed(directory, name, desc):
    async def scenario(house):
        return await (await house.client()).refusal("pmemsave", val=0, size=10, filename=name.format(d=directory))

    assert serve(scenario, directory) == desc.format(d=directory)


def test_pmemsave_to_a_fifo_waits_for_its_reader_and_holds_up_nobody_else(directory):
    path = directory / "fifo"
    os.mkfifo(path)

    async def scenario(house):
        first, second = await house.client(0), await house.client(1)
        dump = asyncio.create_task(first.ask("pmemsave", val=0, size=200000, filename=str(path)))
        assert await second.ask("stop") == {"return": {}}
        assert await second.ask("cont") == {"return": {}}
        assert not dump.done()
        data = await asyncio.to_thread(path.read_bytes)
        return await dump, data

    answer, data = serve(scenario, directory, monitors=2)
    assert answer == {"return": {}}
    assert data == bytes(offset & 0xFF for offset in range(200000))


def test_a_dump_without_a_reader_does_not_outlive_the_program(directory, no_leaks):
    os.mkfifo(directory / "fifo")

    async def scenario(house):
        client = await house.client()
        client.send(
            b'{"execute": "pmemsave", "arguments": {"val": 0, "size": 1, "filename": "%s/fifo"}}' % bytes(directory)
        )
        while not house.monitors[0]._session._running:
            await asyncio.sleep(0)

    serve(scenario, directory)


def test_memsave_reads_the_virtual_memory_of_a_vcpu(directory):
    path = directory / "dump"

    async def scenario(house):
        return await (await house.client()).ask("memsave", val=5, size=30, filename=str(path), cpu_index=1)

    assert serve(scenario, directory) == {"return": {}}
    assert path.read_bytes() == bytes(range(6, 36))  # the pretended mapping is one byte off


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({"val": 0, "size": 1, "cpu-index": 2}, "Parameter 'cpu-index' expects a CPU number"),
        ({"val": 0, "size": 1, "cpu-index": -1}, "Parameter 'cpu-index' expects a CPU number"),
        ({"val": 1 << 40, "size": 16}, "Invalid addr 0x0000010000000000/size 16 specified"),
        ({"val": -1, "size": 16}, "Invalid addr 0xffffffffffffffff/size 16 specified"),
    ],
)
def test_memsave_says_what_is_not_there(directory, arguments, desc):
    async def scenario(house):
        return await (await house.client()).refusal("memsave", filename=str(directory / "dump"), **arguments)

    assert serve(scenario, directory) == desc


def test_a_dump_ends_when_its_client_has_gone_and_another_comes(directory, no_leaks):
    os.mkfifo(directory / "fifo")

    async def scenario(house):
        first = await house.client()
        first.send(b'{"execute": "pmemsave", "arguments": {"val": 0, "size": 1, "filename": "%s/fifo"}}' % bytes(directory))
        while not house.monitors[0]._session._running:
            await asyncio.sleep(0)
        first.close()
        second = await house.client()
        return await second.ask("pmemsave", val=0, size=4, filename=str(directory / "dump"))

    assert serve(scenario, directory) == {"return": {}}
    assert (directory / "dump").read_bytes() == bytes(range(4))
