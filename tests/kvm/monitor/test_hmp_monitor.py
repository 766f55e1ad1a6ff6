"""A human monitor on a socket: banner, prompt, echo, waiting, clients that come and go (hmp.md §1, §3)."""

import asyncio
import contextlib
import re
import socket

from kvm.chardev import LOW_WATER
from kvm.chardev_options import CharDevices
from kvm.monitor.hmp import HumanMonitor
from kvm.monitor.hmp.monitor import ECHO_PIECE
from qemumig.commands.command import Command
from tests.kvm.monitor.human import Person

PATIENCE_S = 10
PROMPT = b"(qemu) "
BANNER = b"QEMU 10.0.0 monitor - type 'help' for more information\r\n" + PROMPT
ECHO = re.compile(rb"(\x1b\[D)*[^\x1b\r\n]*\x1b\[K")

STATUS = {"status": "paused", "running": False}


class Room:
    """A monitor on a Unix socket, and the commands behind it."""

    def __init__(self, directory, person):
        self.path = f"{directory}/hmp"
        self.person = person
        self.devices = CharDevices(print)
        self.backend = self.devices.add_device("-monitor", f"unix:{self.path},server=on,wait=off", "hmp", "")
        self.monitor = HumanMonitor(self.backend, person.shell)
        self.slow = asyncio.Event()
        person.registry.add([Command("stop", self.slow.wait)])

    async def client(self):
        reader, writer = await asyncio.open_unix_connection(self.path, limit=1 << 26)
        return Client(reader, writer)


class Client:
    def __init__(self, reader, writer):
        self._reader = reader
        self._writer = writer

    def type(self, keys):
        self._writer.write(keys)

    async def until(self, end):
        async with asyncio.timeout(PATIENCE_S):
            return await self._reader.readuntil(end)

    async def rest(self):
        async with asyncio.timeout(PATIENCE_S):
            return await self._reader.read()

    async def ask(self, line):
        """What *line* prints, without its echo."""
        self.type(line + b"\r")
        printed = await self.until(b"\x1b[K\r\n") + await self.until(PROMPT)
        return ECHO.sub(b"", printed).removeprefix(b"\r\n").removesuffix(PROMPT)

    def close(self):
        self._writer.close()


def play(scenario, directory, answers):
    """Run `scenario(room)` with a monitor over *answers*."""

    async def run():
        room = Room(directory, Person(answers))
        await room.devices.start()
        try:
            return await scenario(room)
        finally:
            await room.monitor.close()
            room.devices.close()

    return asyncio.run(run())


def test_a_client_is_greeted_and_prompted(directory):
    async def scenario(room):
        client = await room.client()
        assert await client.until(PROMPT) == BANNER
        assert await client.ask(b"info status") == b"VM status: paused\r\n"
        client.type(b"\r")
        assert await client.until(PROMPT) == b"\r\n" + PROMPT

    play(scenario, directory, {"query-status": STATUS})


def test_lines_sent_at_once_are_run_one_by_one(directory):
    async def scenario(room):
        client = await room.client()
        await client.until(PROMPT)
        client.type(b"info status\rinfo name\r\n")
        first, second, third = [await client.until(PROMPT) for _ in range(3)]
        assert first.endswith(b"\x1b[K\r\nVM status: paused\r\n" + PROMPT)
        assert second.endswith(b"\x1b[K\r\nvm\r\n" + PROMPT)
        assert third == b"\r\n" + PROMPT

    play(scenario, directory, {"query-status": STATUS, "query-name": {"name": "vm"}})


def test_what_is_typed_while_a_command_runs_waits_for_its_end(directory):
    async def scenario(room):
        client = await room.client()
        await client.until(PROMPT)
        client.type(b"stop\r")
        await client.until(b"stop\x1b[K\r\n")
        client.type(b"info status\r")
        assert room.person.asked == []
        room.slow.set()
        assert await client.until(PROMPT) == PROMPT
        assert b"VM status: paused\r\n" in await client.until(PROMPT)

    play(scenario, directory, {"query-status": STATUS})


def test_output_of_a_command_never_reaches_the_next_client(directory):
    async def scenario(room):
        first = await room.client()
        await first.until(PROMPT)
        first.type(b"stop\r")
        await first.until(b"stop\x1b[K\r\n")
        first.close()
        second = await room.client()
        assert await second.until(PROMPT) == BANNER
        room.slow.set()
        assert await second.ask(b"info status") == b"VM status: paused\r\n"

    play(scenario, directory, {"query-status": STATUS})


def test_the_history_outlives_a_client_and_his_unfinished_line_does_not(directory):
    async def scenario(room):
        first = await room.client()
        await first.ask(b"info name")
        first.type(b"unfin")
        await first.until(b"unfin\x1b[K")
        first.close()
        second = await room.client()
        assert await second.until(PROMPT) == BANNER
        second.type(b"\x1b[A")
        assert await second.until(b"\x1b[K") == b"info name\x1b[K"
        second.type(b"\r")
        assert await second.until(PROMPT) == b"\r\nvm\r\n" + PROMPT
        assert await second.ask(b"info history") == b"0: 'info name'\r\n1: 'info history'\r\n"

    play(scenario, directory, {"query-name": {"name": "vm"}})


def test_bytes_that_are_no_text_come_back_as_they_are(directory):
    async def scenario(room):
        client = await room.client()
        await client.until(PROMPT)
        assert await client.ask(b"\xff\xc3\xa4") == b"unknown command: '\xff\xc3\xa4'\r\n"

    play(scenario, directory, {})


def test_a_stopped_monitor_ends_the_line_it_runs_and_prompts_no_more(directory):
    async def scenario(room):
        room.person.registry.add([Command("quit", room.monitor.stop)])
        client = await room.client()
        await client.until(PROMPT)
        client.type(b"quit\rinfo status\r")
        await client.until(b"quit\x1b[K\r\n")
        await room.monitor.close()
        room.devices.close()
        assert await client.rest() == b""
        assert room.person.asked == []

    play(scenario, directory, {"query-status": STATUS})


def test_echo_that_nobody_reads_takes_a_bounded_amount_of_memory(directory):
    async def scenario(room):
        with socket.socket(socket.AF_UNIX) as flooder:
            flooder.connect(room.path)
            flooder.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    flooder.send(b"a" * 4000)
            async with asyncio.timeout(PATIENCE_S):
                while room.backend.output.pending <= LOW_WATER:
                    await asyncio.sleep(0.01)
            for _ in range(100):
                await asyncio.sleep(0)
                assert room.backend.output.pending < 4 * ECHO_PIECE
        client = await room.client()
        assert await client.until(PROMPT) == BANNER

    play(scenario, directory, {})
