"""The qtest protocol over a machine of a page of memory, a few ports and an interrupt controller (qtest.md §2)."""

import asyncio
import contextlib
import io
import re
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.chardev_options import CharDevices
from kvm.devices.client_time import ClientTime
from kvm.monitor.qtest import MAX_LINE, MAX_SIZE, QtestLog, QtestServer, Requests, open_log

PATIENCE_S = 10
SIZE = 0x10000


class PretendMachine:
    """Memory from 0 to SIZE, ports that keep what is written to them."""

    def __init__(self):
        self.memory = bytearray(SIZE)
        self.ports = {}
        self.gate = threading.Event()  # `read` waits for it
        self.gate.set()

    def read(self, address, size):
        assert self.gate.wait(PATIENCE_S)
        return bytes(self.memory[address : address + size]).ljust(size, b"\0")

    def write(self, address, data):
        if address + len(data) <= SIZE:
            self.memory[address : address + len(data)] = data

    def read_port(self, port, size):
        if port == 0x666:
            raise RuntimeError("the device is\nbroken")
        return self.ports.get(port, (1 << 8 * size) - 1)

    def write_port(self, port, size, value):
        self.ports[port] = value


class Pins:
    count = 24

    def __init__(self):
        self.observer = None

    def set_level(self, pin, level):
        if self.observer is not None:
            self.observer(pin, level)

    def observe(self, observer):
        self.observer = observer


def make_requests(pins=None):
    reported = []
    controllers = {"ioapic": pins or Pins(), "other": Pins()}
    return Requests(PretendMachine(), controllers, lambda pin, level: reported.append((pin, level))), reported


def answers(*requests):
    asked, _ = make_requests()
    return [asked.answer(request) for request in requests]


# ---- requests ----


@pytest.mark.parametrize(
    ("requests", "answer"),
    [
        (["endianness"], "OK little"),
        (["endianness "], "OK little"),
        (["endianness x"], "OK little"),
        ([""], ""),
        ([" endianness"], "FAIL Unknown command ''"),
        (["endianness\r"], "FAIL Unknown command 'endianness\r'"),
        (["ENDIANNESS"], "FAIL Unknown command 'ENDIANNESS'"),
        (["clock_step"], "FAIL Unknown command 'clock_step'"),
        (["clock_set 5"], "FAIL Unknown command 'clock_set'"),
        (["rtas x"], "FAIL Unknown command 'rtas'"),
        (["inb 0x80"], "OK 0x00ff"),
        (["inw 128"], "OK 0xffff"),
        (["inl 0200"], "OK 0xffffffff"),
        (["outb 0x80 0x155", "inb 0x80"], "OK 0x0055"),
        (["outl 0x10080 0x80000000", "inl 0x80"], "OK 0x80000000"),
        (["readb 0"], "OK 0x0000000000000000"),
        (["writeb 0x10 0x1ff", "readw 0x10"], "OK 0x00000000000000ff"),
        (["writeq 0x10 0x1122334455667788", "readq 0x10"], "OK 0x1122334455667788"),
        (["writeq 0x10 0x1122334455667788", "readl 0x10"], "OK 0x0000000055667788"),
        (["writeq 0x10 0x1122334455667788", "writel 0x10 -1", "readq 0x10"], "OK 0x11223344ffffffff"),
        (["readq 0xffffffffffffffff"], "OK 0x0000000000000000"),
        (["write 0x20 4 0xaabbccdd", "read 0x20 5"], "OK 0xaabbccdd00"),
        (["write 0x20 4 0xffffffff", "write 0x20 4 0xaabb", "read 0x20 4"], "OK 0xaabb0000"),
        (["write 0x20 2 0x1122334455", "read 0x20 3"], "OK 0x112200"),
        (["write 0x20 4 zz01020304", "read 0x20 4"], "OK 0x01020304"),
        (["write 0x20 4 0xABCDEF01", "read 0x20 4"], "OK 0xabcdef01"),
        (["write 0x20 4 0xa"], "OK"),
        (["write 0x20 4 0x"], "ERR invalid argument size"),
        (["memset 0x30 2 0x1ff", "read 0x30 3"], "OK 0xffff00"),
        (["memset 0x30 0 1", "read 0x30 1"], "OK 0x00"),
        (["b64write 0x40 5 aGVsbG8=", "b64read 0x40 5"], "OK aGVsbG8="),
        (["b64write 0x40 2 aGVsbG8=", "b64read 0x40 5"], "OK aGUAAAA="),
        (["b64write 0x40 8 aGVsbG8="], "OK"),
        (["b64write 0x40 8 aa"], "ERR invalid argument size"),
        (["b64read 0x40 0"], "OK "),
        (["irq_intercept_in nosuch"], "FAIL Unknown device"),
        (["irq_intercept_out nosuch"], "FAIL Unknown device"),
        (["irq_intercept_in /machine/ioapic"], "OK"),
        (["irq_intercept_in ioapic", "irq_intercept_in ioapic"], "OK"),
        (["irq_intercept_in ioapic", "irq_intercept_in other"], "FAIL IRQ intercept already enabled"),
        (["irq_intercept_in ioapic", "irq_intercept_out other"], "FAIL IRQ intercept already enabled"),
        (["irq_intercept_out ioapic"], "FAIL No intercepts installed"),
        (["irq_intercept_in ioapic x"], "FAIL Interception of named in-GPIOs not yet supported"),
        (["set_irq_in ioapic unnamed-gpio-in 4 1"], "OK"),
        (["set_irq_in /machine/x unnamed-gpio-in 4 1"], "FAIL Unknown device"),
        (["module_load accel- foo"], "FAIL"),
    ],
)
def test_requests_are_answered_as_qemu_answers_them(requests, answer):
    assert answers(*requests)[-1] == answer


@pytest.mark.parametrize(
    ("request_line", "answer"),
    [
        ("readb", "FAIL operand 1, the address, is missing"),
        ("inb  0x511", "FAIL operand 1, the port, is missing"),
        ("readb zz", "FAIL operand 1, the address, is no number below 2^64"),
        ("readb -", "FAIL operand 1, the address, is no number below 2^64"),
        ("readb 09", "FAIL operand 1, the address, is no number below 2^64"),
        ("readb 0x10000000000000000", "FAIL operand 1, the address, is no number below 2^64"),
        (f"readb {'9' * 5000}", "FAIL operand 1, the address, is no number below 2^64"),
        ("writeb 1", "FAIL operand 2, the value, is missing"),
        (f"read 0 {MAX_SIZE + 1}", f"FAIL operand 2, the size, is {MAX_SIZE + 1}, at most {MAX_SIZE} is expected"),
        ("read 0 0", "FAIL read: size is 0, at least 1 is expected"),
        ("write 0 2 0xzzzz", "FAIL write: data is not hexadecimal"),
        ("b64write 0 3 !!!!", "FAIL b64write: data is not base64: Only base64 data is allowed"),
        (
            "set_irq_in ioapic unnamed-gpio-in 24 1",
            "FAIL set_irq_in: no pin 24 'unnamed-gpio-in', expected 'unnamed-gpio-in' 0 … 23",
        ),
        ("set_irq_in ioapic foo 1 1", "FAIL set_irq_in: no pin 1 'foo', expected 'unnamed-gpio-in' 0 … 23"),
        ("inb 0x666", "FAIL inb: RuntimeError: the device is broken"),
    ],
)
def test_what_aborts_a_real_qemu_is_a_failure_with_a_reason(request_line, answer):
    assert answers(request_line) == [answer]


def harnessed_answers(*requests):
    """With accelerator `qtest`; a device wants to be called at 50."""
    time = ClientTime()
    time.new(lambda: None).set(50)
    asked = Requests(PretendMachine(), {}, lambda pin, level: None, time)
    return [asked.answer(request) for request in requests]


NO_DEADLINE = "FAIL cannot advance clock to the next deadline because there is no pending deadline"


@pytest.mark.parametrize(
    ("requests", "answer"),
    [
        (["clock_step"], "OK 50"),
        (["clock_step", "clock_step"], NO_DEADLINE),
        (["clock_step 100", "clock_step"], NO_DEADLINE),
        (["clock_step 0x10"], "OK 16"),
        (["clock_step 7", "clock_step 5 6"], "OK 12"),
        (["clock_step 7 ", "clock_step"], "OK 50"),
        (["clock_step 0"], "FAIL could not advance time"),
        (["clock_step -5"], "FAIL could not advance time"),
        (["clock_step 9", "clock_step 9223372036854775807"], "FAIL could not advance time"),
        (["clock_set 100", "clock_set 99"], "FAIL 100"),
        (["clock_set 100", "clock_set -1"], "FAIL 100"),
        (["clock_set 100", "clock_set 100"], "OK 100"),
        (["clock_set 010", "clock_step 1"], "OK 9"),
        (["clock_set 99999999999 3"], "OK 99999999999"),
        (["clock_set 9223372036854775808"], "FAIL 0"),
        (["clock_step abc"], "FAIL operand 1, the time, is no number below 2^64"),
        (["clock_step "], "FAIL operand 1, the time, is missing"),
        (["clock_set"], "FAIL operand 1, the time, is missing"),
    ],
)
def test_virtual_time_goes_where_the_harness_puts_it(requests, answer):
    assert harnessed_answers(*requests)[-1] == answer


@given(st.text("0123456789abcdefx-rwb64eq lmst_in", max_size=60))
def test_any_line_has_one_line_for_an_answer(line):
    [answer] = answers(line)
    assert "\n" not in answer
    assert answer.startswith(("OK", "FAIL", "ERR")) or not line


def test_intercepted_lines_are_reported_when_they_change():
    pins = Pins()
    asked, reported = make_requests(pins)
    pins.set_level(4, 1)
    assert reported == []
    asked.answer("irq_intercept_in ioapic")
    for level in (0, 1, 1, 0):
        asked.answer(f"set_irq_in ioapic unnamed-gpio-in 4 {level}")
    assert reported == [(4, 1), (4, 0)]
    asked.reset()
    assert pins.observer is None


# ---- the connection ----


class House:
    def __init__(self, directory, log=None):
        self.path = f"{directory}/qtest"
        self.machine = PretendMachine()
        self.pins = Pins()
        self.devices = CharDevices(print)
        self.backend = self.devices.add_device("-qtest", f"unix:{self.path},server=on,wait=off", "qtest", "")
        self.server = QtestServer(self.backend, self.machine, {"ioapic": self.pins}, log)

    async def client(self):
        return await asyncio.open_unix_connection(self.path, limit=1 << 27)


def play(scenario, directory, **options):
    async def run():
        house = House(directory, **options)
        await house.devices.start()
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await scenario(house)
        finally:
            house.machine.gate.set()
            await house.server.close()
            house.devices.close()

    asyncio.run(run())
    assert "qtest" not in [thread.name for thread in threading.enumerate()]


def test_requests_may_be_cut_anywhere_and_sent_at_once(directory):
    async def scenario(house):
        reader, writer = await house.client()
        writer.write(b"endian")
        await writer.drain()
        writer.write(b"ness\nwriteb 0x10 7\nreadb 0x10\n\nfoo\nread 0x")
        answers = [await reader.readline() for _ in range(4)]
        assert answers == [b"OK little\n", b"OK\n", b"OK 0x0000000000000007\n", b"FAIL Unknown command 'foo'\n"]
        writer.write(b"10 1\n")
        assert await reader.readline() == b"OK 0x07\n"

    play(scenario, directory)


def test_interrupts_are_reported_from_any_thread_before_the_answer_that_follows_them(directory):
    async def scenario(house):
        reader, writer = await house.client()
        writer.write(b"irq_intercept_in ioapic\n")
        assert await reader.readline() == b"OK\n"
        await asyncio.to_thread(house.pins.set_level, 4, 1)
        assert await reader.readline() == b"IRQ raise 4\n"
        writer.write(b"set_irq_in ioapic unnamed-gpio-in 4 0\n")
        assert [await reader.readline(), await reader.readline()] == [b"IRQ lower 4\n", b"OK\n"]

    play(scenario, directory)


def test_the_next_client_begins_anew(directory):
    async def scenario(house):
        reader, writer = await house.client()
        writer.write(b"irq_intercept_in ioapic\nunfinished")
        assert await reader.readline() == b"OK\n"
        writer.close()
        await writer.wait_closed()
        reader, writer = await house.client()
        writer.write(b"endianness\n")
        assert await reader.readline() == b"OK little\n"
        assert house.pins.observer is None

    play(scenario, directory)


def test_an_answer_never_reaches_the_next_client(directory):
    async def scenario(house):
        house.machine.gate.clear()
        reader, writer = await house.client()
        writer.write(b"read 0 4\nread 0 4\n")
        while not house.server._waiting:
            await asyncio.sleep(0.001)
        writer.close()
        reader, writer = await house.client()
        writer.write(b"endianness\n")
        house.machine.gate.set()
        assert await reader.readline() == b"OK little\n"

    play(scenario, directory)


def test_a_request_that_waits_holds_up_nothing_but_the_requests_behind_it(directory):
    async def scenario(house):
        house.machine.gate.clear()
        reader, writer = await house.client()
        writer.write(b"readb 0\n")
        await asyncio.sleep(0)
        answer = asyncio.ensure_future(reader.readline())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not answer.done()
        house.machine.gate.set()
        assert await answer == b"OK 0x0000000000000000\n"

    play(scenario, directory)


def test_a_line_without_end_costs_the_connection(directory):
    async def scenario(house):
        reader, writer = await house.client()
        with contextlib.suppress(ConnectionError):
            for _ in range(MAX_LINE // (1 << 20) + 2):
                writer.write(b"x" * (1 << 20))
                await writer.drain()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        reader, writer = await house.client()
        writer.write(b"endianness\n")
        assert await reader.readline() == b"OK little\n"

    play(scenario, directory)


def test_requests_wait_while_their_answers_are_not_read(directory):
    async def scenario(house):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(house.path)
            client.sendall(b"read 0 65536\n" * 1000)
            while not house.backend.output.pending:
                await asyncio.sleep(0.001)
            for _ in range(200):
                await asyncio.sleep(0.0005)
                assert house.backend.output.pending < 1 << 20
            got = 0
            while got < 1000 * (len("OK 0x\n") + 2 * SIZE):
                got += len(await asyncio.to_thread(client.recv, 1 << 20))

    play(scenario, directory)


def test_the_server_ends_although_nobody_reads_its_answers(directory):
    async def scenario(house):
        client = socket.socket(socket.AF_UNIX)
        client.connect(house.path)
        client.sendall(b"read 0 65536\n" * 100)
        while not house.backend.output.pending:
            await asyncio.sleep(0.001)
        await house.server.close()
        client.close()

    play(scenario, directory)


# ---- the log ----


def test_the_log_has_every_line_with_its_time(directory):
    class Log(io.StringIO):
        def close(self):
            pass

    log = Log()

    async def scenario(house):
        reader, writer = await house.client()
        writer.write(b"endianness\nfoo x\n")
        assert [await reader.readline(), await reader.readline()]
        writer.close()
        await writer.wait_closed()
        while "CLOSED" not in log.getvalue():
            await asyncio.sleep(0.001)

    play(scenario, directory, log=QtestLog(log))
    lines = [re.sub(r"\d+\.\d{6}", "T", line) for line in log.getvalue().splitlines()]
    assert lines == [
        *("[I T] OPENED", "[R +T] endianness", "[S +T] OK little", "[R +T] foo x"),
        *("[S +T] FAIL Unknown command 'foo'", "[I +T] CLOSED"),
    ]
    assert log.getvalue().startswith("[I 0.000000] OPENED\n")


def test_a_log_goes_where_the_option_says(directory, capsys):
    assert open_log("none") is None
    assert open_log(f"{directory}/no/such/folder") is None
    written = open_log(f"{directory}/log")
    written.opened()
    written.close()
    assert (directory / "log").read_text() == "[I 0.000000] OPENED\n"
    open_log(None).opened()
    assert capsys.readouterr().err == "[I 0.000000] OPENED\n"
