"""kvm.monitor.qmp: greeting, negotiation, the form of requests, descriptors (qmp.md §1)."""

import asyncio
import json
import os

import pytest
from qemu.qmp import QMPClient

from kvm.monitor.qmp import MAX_NAMED_DESCRIPTORS, take_fd
from qemumig.commands.command import Command
from qemumig.errors import ChannelError

from .harness import Client, error, pipe, serve

EXPECTING = "Expecting capabilities negotiation with 'qmp_capabilities'"


# ---- greeting and negotiation ----


def test_the_greeting_says_who_we_are(directory):
    async def scenario(house):
        client = await house.client(negotiate=False)
        return client.greeting

    greeting = serve(scenario, directory)
    assert greeting["QMP"]["version"] == {
        "qemu": {"major": 10, "minor": 0, "micro": 0},
        "package": "qemumig 0.1.0",
    }
    assert greeting["QMP"]["capabilities"] == ["oob"]


@pytest.mark.parametrize("command", ["query-commands", "query-status", "no-such-command"])
def test_before_negotiation_nothing_else_runs(directory, command):
    async def scenario(house):
        return await (await house.client(negotiate=False)).ask(command)

    assert serve(scenario, directory) == error(EXPECTING, "CommandNotFound")


def test_negotiation_may_be_tried_again_and_ends_once(directory):
    async def scenario(house):
        client = await house.client(negotiate=False)
        return [
            await client.ask("qmp_capabilities", enable=["foo"]),
            await client.ask("qmp_capabilities"),
            await client.ask("qmp_capabilities"),
        ]

    assert serve(scenario, directory) == [
        error("Parameter 'null' does not accept value 'foo'"),
        {"return": {}},
        error("Capabilities negotiation is already complete, command ignored", "CommandNotFound"),
    ]


def test_events_come_only_after_negotiation(directory):
    async def scenario(house):
        early = await house.client(negotiate=False)
        house.hub.emit("STOP")
        assert await early.ask("qmp_capabilities") == {"return": {}}
        house.hub.emit("RESUME", {"a": 1})
        return await early.message()

    event = serve(scenario, directory)
    assert event["event"] == "RESUME"
    assert event["data"] == {"a": 1}
    assert set(event["timestamp"]) == {"seconds", "microseconds"}


def test_the_next_client_starts_anew(directory):
    async def scenario(house):
        first = await house.client()
        second = Client(house.path())
        opening = asyncio.create_task(second.open())
        await first.result("query-status")
        assert not opening.done()  # one client at a time
        first.close()
        await opening
        return await second.ask("query-status")

    assert serve(scenario, directory) == error(EXPECTING, "CommandNotFound")


# ---- the form of requests ----


@pytest.mark.parametrize(
    ("request_text", "response"),
    [
        (b"[]", error("QMP input must be a JSON object")),
        (b"null ", error("QMP input must be a JSON object")),
        (b"{}", error("QMP input lacks member 'execute'")),
        (b'{"id": 1}', error("QMP input lacks member 'execute'", id=1)),
        (b'{"execute": 1}', error("QMP input member 'execute' must be a string")),
        (
            b'{"execute": "query-name", "arguments": []}',
            error("QMP input member 'arguments' must be an object"),
        ),
        (
            b'{"execute": "nosuch", "arguments": 5}',
            error("QMP input member 'arguments' must be an object"),
        ),
        (
            b'{"execute": "query-name", "foo": 2, "id": [1]}',
            error("QMP input member 'foo' is unexpected", id=[1]),
        ),
        (b'{"exec-oob": "query-name"}', error("QMP input member 'exec-oob' is unexpected")),
        (
            b'{"execute": "nosuch", "id": null}',
            error("The command nosuch has not been found", "CommandNotFound", id=None),
        ),
        (b'{"execute": "query-name", "arguments": {"a": 1}}', error("Parameter 'a' is unexpected")),
        (b"{'execute': 'query-name', 'id': 'it\\'s'}", {"return": {}, "id": "it's"}),
        (b'{"execute" "query-name"}', error("JSON parse error, missing : in object pair")),
    ],
)
def test_each_request_has_its_answer(directory, request_text, response):
    async def scenario(house):
        client = await house.client()
        assert await client.raw(request_text) == response
        return await client.ask("query-name")

    assert serve(scenario, directory) == {"return": {}}


def test_a_request_is_answered_however_it_is_cut_or_glued(directory):
    request = b'{"execute": "query-name", "id": 7}'

    async def scenario(house):
        client = await house.client()
        for index in range(len(request)):
            client.send(request[index : index + 1])
            await asyncio.sleep(0)
        answers = [await client.response()]
        client.send(request * 3)
        return answers + [await client.response() for _ in range(3)]

    assert serve(scenario, directory) == [{"return": {}, "id": 7}] * 4


@pytest.mark.parametrize("identity", [None, "x", 18446744073709551615, [1, {"a": [None]}], {}, 2.5])
def test_the_id_comes_back_as_it_was(directory, identity):
    async def scenario(house):
        client = await house.client()
        return await client.raw(json.dumps({"execute": "query-name", "id": identity}).encode())

    assert serve(scenario, directory) == {"return": {}, "id": identity}


def test_the_answer_goes_out_byte_for_byte_as_qemu_writes_it(directory):
    async def scenario(house):
        client = await house.client()
        client.send('{"execute": "query-name", "id": "\u00e9"}'.encode())
        return await client.line()

    assert serve(scenario, directory) == b'{"return": {}, "id": "\\u00E9"}\r\n'


def test_a_handler_that_breaks_costs_one_response(directory, capsys):
    def broken():
        raise KeyError("secret")

    async def scenario(house):
        house.registry.add([Command("break", broken), Command("unwritable", lambda: object())])
        client = await house.client()
        return [await client.refusal("break"), await client.refusal("unwritable"), await client.ask("query-name")]

    first, second, third = serve(scenario, directory)
    assert first == "Internal error: KeyError: 'secret'"
    assert second.startswith("Internal error: TypeError: ")
    assert third == {"return": {}}
    assert "KeyError" in capsys.readouterr().err


# ---- descriptors ----


def test_a_named_descriptor_is_handed_out_once(directory, no_leaks):
    async def scenario(house):
        taken = []
        house.registry.add([Command("take", lambda: taken.append(take_fd("x")))])
        client = await house.client()
        with pipe() as (reader, writer):
            client.send_with_descriptor(b'{"execute": "getfd", "arguments": {"fdname": "x"}}', writer)
            assert await client.response() == {"return": {}}
            assert await client.ask("take") == {"return": {}}
            os.write(taken[0], b"through")
            assert os.read(reader, 10) == b"through"
            os.close(taken[0])
        client_again = await client.refusal("take")
        client.close()
        return client_again

    assert serve(scenario, directory) == "File descriptor named 'x' has not been found"


def test_descriptors_stay_with_the_monitor_until_it_ends(directory, no_leaks):
    async def scenario(house):
        client = await house.client()
        with pipe() as (_, writer):
            for name in ("x", "y", "x"):
                client.send_with_descriptor(b'{"execute": "getfd", "arguments": {"fdname": "%s"}}' % name.encode(), writer)
                assert await client.response() == {"return": {}}
        client.close()
        again, other = await house.client(0), await house.client(1)
        answers = [await again.ask("closefd", fdname="x"), await other.refusal("closefd", fdname="y")]
        again.close()
        other.close()
        return answers

    assert serve(scenario, directory, monitors=2) == [{"return": {}}, "File descriptor named 'y' not found"]


def test_descriptors_nobody_asked_for_are_closed(directory, no_leaks):
    async def scenario(house):
        client = await house.client()
        with pipe() as (_, writer):
            for text in (b'{"execute": "query-name"}', b'{"execute": "query-', b'name"}', b'{"half'):
                client.send_with_descriptor(text, writer)
                if text.endswith(b"}"):
                    await client.response()
        client.close()

    serve(scenario, directory)


@pytest.mark.parametrize(
    ("name", "desc"),
    [
        ("x", "No file descriptor supplied via SCM_RIGHTS"),
        ("7x", "No file descriptor supplied via SCM_RIGHTS"),
    ],
)
def test_getfd_without_a_descriptor_is_refused(directory, name, desc):
    async def scenario(house):
        return await (await house.client()).refusal("getfd", fdname=name)

    assert serve(scenario, directory) == desc


def test_a_name_that_starts_with_a_digit_is_refused(directory, no_leaks):
    async def scenario(house):
        client = await house.client()
        with pipe() as (_, writer):
            client.send_with_descriptor(b'{"execute": "getfd", "arguments": {"fdname": "7x"}}', writer)
            response = await client.response()
        client.close()
        return response

    assert serve(scenario, directory) == error("Parameter 'fdname' expects a name not starting with a digit")


def test_named_descriptors_are_limited(directory, no_leaks):
    async def scenario(house):
        client = await house.client()
        answers = []
        with pipe() as (_, writer):
            for number in range(MAX_NAMED_DESCRIPTORS + 1):
                client.send_with_descriptor(b'{"execute": "getfd", "arguments": {"fdname": "x%d"}}' % number, writer)
                answers.append(await client.response())
        client.close()
        return answers

    *fine, last = serve(scenario, directory)
    assert all("return" in answer for answer in fine)
    assert last == error(f"Monitor already holds {MAX_NAMED_DESCRIPTORS} named file descriptors")


def test_no_monitor_no_descriptor():
    with pytest.raises(ChannelError, match="File descriptor named 'x' has not been found"):
        take_fd("x")


# ---- clients that are not ours ----


def test_the_stock_client_can_talk_to_us(directory):
    async def scenario(house):
        client = QMPClient("test")
        await client.connect(house.path())
        status = await client.execute("query-status")
        with client.listener("STOP") as listener:
            await client.execute("stop")
            event = await listener.get()
        with pytest.raises(Exception, match="The command nosuch has not been found"):
            await client.execute("nosuch")
        await client.disconnect()
        return status, event["event"]

    assert serve(scenario, directory) == ({"status": "running", "running": True}, "STOP")
