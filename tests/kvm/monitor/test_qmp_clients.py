"""kvm.monitor.qmp: what clients get when they ask much, leave early or do harm; out-of-band (qmp.md §1)."""

import asyncio
import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvm import chardev
from kvm.monitor.qmp import MAX_LEFT_BEHIND
from qemumig.commands.command import ANY, Argument, Command

from .harness import PATIENCE_S, error, serve

# ---- order, queue, out-of-band ----


class Gate:
    """Commands that wait until a test lets them go, and a record of their order."""

    def __init__(self, house):
        self.order = []
        self.gates = {}
        house.registry.add(
            [
                Command("wait", self.wait, (Argument("for", ANY),)),
                Command("poke", lambda: self.order.append("poke"), oob=True),
            ]
        )

    async def wait(self, **arguments):
        name = arguments["for"]
        self.order.append(name)
        await self.gates.setdefault(name, asyncio.Event()).wait()

    def open(self, name):
        self.gates.setdefault(name, asyncio.Event()).set()

    async def entered(self, name):
        while name not in self.order:
            await asyncio.sleep(0)


def wait_for(name, identity=None):
    return json.dumps({"execute": "wait", "arguments": {"for": name}, "id": identity}).encode()


def test_pipelined_requests_are_answered_in_order(directory):
    async def scenario(house):
        client = await house.client()
        client.send(b"".join(b'{"execute": "query-name", "id": %d}' % number for number in range(100)))
        return [(await client.response())["id"] for _ in range(100)]

    assert serve(scenario, directory) == list(range(100))


def test_one_command_of_a_monitor_runs_at_a_time(directory):
    async def scenario(house):
        gate = Gate(house)
        client = await house.client()
        client.send(wait_for("a", 1) + wait_for("b", 2))
        await gate.entered("a")
        gate.open("b")
        for _ in range(10):
            await asyncio.sleep(0)
        assert gate.order == ["a"]
        gate.open("a")
        return [(await client.response())["id"], (await client.response())["id"]], gate.order

    assert serve(scenario, directory) == ([1, 2], ["a", "b"])


def test_a_slow_command_does_not_hold_up_another_monitor(directory):
    async def scenario(house):
        gate = Gate(house)
        first, second = await house.client(0), await house.client(1)
        first.send(wait_for("a", 1))
        await gate.entered("a")
        assert await second.ask("query-name") == {"return": {}}
        gate.open("a")
        return await first.response()

    assert serve(scenario, directory, monitors=2) == {"return": {}, "id": 1}


def test_out_of_band_overtakes_the_queue(directory):
    async def scenario(house):
        gate = Gate(house)
        client = await house.client(enable=["oob"])
        client.send(wait_for("a", 1) + wait_for("b", 2) + b'{"exec-oob": "poke", "id": "now"}')
        assert (await client.response())["id"] == "now"
        assert "b" not in gate.order
        gate.open("a")
        gate.open("b")
        return [(await client.response())["id"] for _ in range(2)]

    assert serve(scenario, directory) == [1, 2]


@pytest.mark.parametrize(
    ("request_text", "desc"),
    [
        (b'{"exec-oob": "query-name"}', "The command query-name does not support OOB"),
        (b'{"execute": "poke", "exec-oob": "poke"}', "QMP input member 'exec-oob' clashes with 'execute'"),
        (b'{"exec-oob": 5}', "QMP input member 'exec-oob' must be a string"),
        (b'{"exec-oob": "nosuch"}', "The command nosuch has not been found"),
    ],
)
def test_out_of_band_requests_are_checked(directory, request_text, desc):
    async def scenario(house):
        Gate(house)
        client = await house.client(enable=["oob"])
        return await client.raw(request_text)

    assert serve(scenario, directory)["error"]["desc"] == desc


@pytest.mark.parametrize(("enable", "room"), [([], 1), (["oob"], 8)])
def test_input_is_read_only_while_the_queue_has_room(directory, enable, room):
    async def scenario(house):
        gate = Gate(house)
        client = await house.client(enable=enable)
        client.send(wait_for("a"))
        await gate.entered("a")
        request = b'{"execute": "query-name"}' + b" " * 100
        accepted = 0
        with pytest.raises(BlockingIOError), socket.socket(fileno=os.dup(client.socket.fileno())) as plain:
            while True:
                accepted += plain.send(request)
                await asyncio.sleep(0)
        assert len(house.monitors[0]._session._queue) == room
        gate.open("a")
        for _ in range(1 + accepted // len(request)):
            assert "return" in await client.response()

    serve(scenario, directory)


def test_a_client_that_leaves_takes_its_queue_along(directory):
    async def scenario(house):
        gate = Gate(house)
        client = await house.client(enable=["oob"])
        client.send(wait_for("a") + wait_for("b"))
        await gate.entered("a")
        client.close()
        second = await house.client(negotiate=False)
        gate.open("a")
        gate.open("b")
        # Nothing of the first client's reaches the second, and its second request never ran.
        return await second.ask("qmp_capabilities"), gate.order

    assert serve(scenario, directory) == ({"return": {}}, ["a"])


def test_a_client_that_leaves_during_a_slow_command_does_not_hold_up_the_next(directory):
    async def scenario(house):
        gate = Gate(house)
        client = await house.client()
        client.send(wait_for("a"))
        await gate.entered("a")
        client.close()
        second = await house.client()
        answer = await second.ask("query-name")
        gate.open("a")
        return answer, await second.ask("query-name")

    assert serve(scenario, directory) == ({"return": {}}, {"return": {}})


def test_a_client_that_only_closed_its_sending_side_gets_its_answers_while_nobody_waits(directory):
    async def scenario(house):
        gate = Gate(house)
        client = await house.client()
        client.send(wait_for("a", 1) + wait_for("b", 2))
        client.socket.shutdown(socket.SHUT_WR)
        await gate.entered("a")
        gate.open("a")
        gate.open("b")
        return [(await client.response())["id"] for _ in range(2)]

    assert serve(scenario, directory) == [1, 2]


def test_only_so_much_work_of_former_clients_runs_at_a_time(directory):
    async def scenario(house):
        gate = Gate(house)
        for number in range(MAX_LEFT_BEHIND):
            client = await house.client()
            client.send(wait_for(number))
            await gate.entered(number)
            client.close()
        late = await house.client(negotiate=False)
        late.send(b'{"execute": "qmp_capabilities"}')
        for _ in range(100):
            await asyncio.sleep(0)
        assert not late._reader._buffer
        gate.open(3)
        answer = await late.response()
        for number in range(MAX_LEFT_BEHIND):
            gate.open(number)
        return answer

    assert serve(scenario, directory) == {"return": {}}


def test_a_command_that_serves_its_client_alone_is_given_up_with_it(directory):
    async def scenario(house):
        entered, left = asyncio.Event(), asyncio.Event()

        async def wait():
            entered.set()
            try:
                await asyncio.Event().wait()
            finally:
                left.set()

        house.registry.add([Command("linger", wait, leaves_with_client=True)])
        client = await house.client()
        client.send(b'{"execute": "linger"}')
        await entered.wait()
        client.close()
        await house.client()
        async with asyncio.timeout(PATIENCE_S):
            await left.wait()

    serve(scenario, directory)


def test_events_of_a_command_come_before_its_response(directory):
    async def scenario(house):
        client = await house.client()
        client.send(b'{"execute": "stop"}')
        return [await client.message(), await client.message()]

    event, response = serve(scenario, directory)
    assert event["event"] == "STOP"
    assert response == {"return": {}}


def test_all_negotiated_monitors_get_events(directory):
    async def scenario(house):
        clients = [await house.client(index) for index in range(3)]
        await clients[0].ask("stop")
        return [(await client.event("STOP"))["event"] for client in clients]

    assert serve(scenario, directory, monitors=3) == ["STOP"] * 3


# ---- hostile clients ----


def test_garbage_is_answered_and_survived(directory):
    async def scenario(house):
        client = await house.client()
        client.send(bytes(range(256)) * 20 + b"\xff" + b"}]" * 50)
        client.send(b'\xff{"execute": "query-name", "id": "still here"}')
        while (answer := await client.response()).get("id") != "still here":
            assert answer["error"]["class"] == "GenericError"
        return answer

    assert serve(scenario, directory) == {"return": {}, "id": "still here"}


def test_deep_nesting_is_refused_and_survived(directory):
    async def scenario(house):
        client = await house.client()
        first = await client.raw(b'{"execute": "query-name", "id": ' + b"[" * 5000)
        client.send(b'\xff{"execute": "query-name", "id": "still here"}')
        while (await client.response()).get("id") != "still here":
            pass
        return first

    assert serve(scenario, directory) == error("JSON nesting depth limit exceeded")


def test_half_a_message_does_not_reach_the_next_client(directory):
    async def scenario(house):
        client = await house.client()
        client.send(b'{"execute": "quit", "id": "')
        await client._writer.drain()
        client.close()
        second = await house.client()
        return await second.ask("query-name"), house.quits

    assert serve(scenario, directory) == ({"return": {}}, 0)


def test_a_client_that_never_reads_is_not_served_beyond_a_limit(directory):
    served = []

    async def scenario(house):
        house.registry.add([Command("big", lambda: served.append(1) or "x" * 10000)])
        deaf, lively = await house.client(0), await house.client(1)
        deaf._reader._transport.pause_reading()
        deaf.send(b'{"execute": "big"}' * 1000)
        while len(served) < 20:
            assert await lively.ask("query-name") == {"return": {}}
        count = 0
        while count != len(served):  # until it serves no more
            count = len(served)
            for _ in range(20):
                assert await lively.ask("query-name") == {"return": {}}
        assert house.monitors[0]._backend.output.pending < chardev.LOW_WATER + 20000
        deaf.close()

    serve(scenario, directory, monitors=2)
    assert len(served) < 1000


def test_a_client_that_sleeps_through_too_many_events_is_dropped(directory):
    async def scenario(house):
        deaf, lively = await house.client(0), await house.client(1)
        deaf._reader._transport.pause_reading()
        for _ in range(200):
            house.hub.emit("NOISE", {"text": "x" * 20000})
            await lively.event("NOISE")
        assert house.monitors[0]._backend.output.pending == 0
        again = await house.client(0)
        return await again.ask("query-name")

    assert serve(scenario, directory, monitors=2) == {"return": {}}


def test_a_hundred_clients_are_served_one_after_the_other(directory, no_leaks):
    async def scenario(house):
        async def one(number):
            client = await house.client(negotiate=False)
            client.send(b'{"execute": "qmp_capabilities"}{"execute": "query-name", "id": %d}' % number)
            await client.response()
            identity = (await client.response())["id"]
            client.close()
            return identity

        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(100))
        return await asyncio.gather(*(one(number) for number in range(100)))

    assert sorted(serve(scenario, directory)) == list(range(100))
