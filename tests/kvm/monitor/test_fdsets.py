"""kvm.monitor.fdsets: descriptors that clients pass in, by number (qmp.md §13)."""

import os

import pytest

from kvm.monitor import fdsets
from kvm.monitor.fdsets import FdSets
from qemumig.commands.command import CommandError
from qemumig.errors import ChannelError

from .harness import pipe, serve


async def add(client, descriptor, **arguments):
    named = ", ".join(f'"{name.replace("_", "-")}": {value}' for name, value in arguments.items())
    client.send_with_descriptor(f'{{"execute": "add-fd", "arguments": {{{named}}}}}'.encode(), descriptor)
    return await client.response()


def test_a_set_gets_the_lowest_free_number_and_sets_are_shown_from_the_highest(directory, no_leaks):
    async def scenario(house):
        client = await house.client()
        with pipe() as (_, writer):
            for arguments in ({}, {"fdset_id": 5, "opaque": '"mine"'}, {"fdset_id": 5}, {}):
                assert "return" in await add(client, writer, **arguments)
        shown = await client.result("query-fdsets")
        client.close()
        return [(entry["fdset-id"], [fd.get("opaque") for fd in entry["fds"]]) for entry in shown]

    assert serve(scenario, directory) == [(5, ["mine", None]), (1, [None]), (0, [None])]


def test_sets_outlive_the_client_and_are_seen_on_every_monitor(directory, no_leaks):
    async def scenario(house):
        client = await house.client(0)
        with pipe() as (_, writer):
            added = (await add(client, writer))["return"]
        client.close()
        other = await house.client(1)
        return added, await other.result("query-fdsets")

    added, shown = serve(scenario, directory, monitors=2)
    assert shown == [{"fdset-id": added["fdset-id"], "fds": [{"fd": added["fd"]}]}]


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({"fdset_id": 77}, "File descriptor named 'fdset-id:77' not found"),
        ({"fdset_id": -1}, "File descriptor named 'fdset-id:-1' not found"),
        ({"fdset_id": 0, "fd": 999}, "File descriptor named 'fdset-id:0, fd:999' not found"),
    ],
)
def test_what_is_not_in_a_set_cannot_be_removed(directory, arguments, desc):
    async def scenario(house):
        client = await house.client()
        with pipe() as (_, writer):
            await add(client, writer)
        return await client.refusal("remove-fd", **arguments)

    assert serve(scenario, directory) == desc


def test_a_set_goes_with_its_last_descriptor(directory, no_leaks):
    async def scenario(house):
        client = await house.client()
        with pipe() as (_, writer):
            first = (await add(client, writer))["return"]["fd"]
            await add(client, writer, fdset_id=0)
        await client.result("remove-fd", fdset_id=0, fd=first)
        left = len((await client.result("query-fdsets"))[0]["fds"])
        await client.result("remove-fd", fdset_id=0)
        return left, await client.result("query-fdsets")

    assert serve(scenario, directory) == (1, [])


def test_a_refused_descriptor_is_closed(directory, no_leaks, monkeypatch):
    monkeypatch.setattr(fdsets, "MAX_DESCRIPTORS", 1)

    async def scenario(house):
        client = await house.client()
        with pipe() as (_, writer):
            answers = [await add(client, writer, fdset_id=-1), await add(client, writer), await add(client, writer)]
        client.close()
        return [answer["error"]["desc"] for answer in answers if "error" in answer]

    assert serve(scenario, directory) == [
        "Parameter 'fdset-id' expects a non-negative value",
        "The fd sets hold 1 file descriptors already, no more are taken",
    ]


def test_add_fd_without_a_descriptor_is_refused(directory):
    async def scenario(house):
        return await (await house.client()).refusal("add-fd", fdset_id=-1)

    assert serve(scenario, directory) == "No file descriptor supplied via SCM_RIGHTS"


# ---- opening one ----


@pytest.fixture
def sets():
    instance = FdSets()
    yield instance
    instance.close()


def test_open_gives_a_duplicate_of_the_one_that_fits(sets, directory, no_leaks):
    path = directory / "file"
    path.write_bytes(b"abc")
    for flags in (os.O_RDONLY, os.O_WRONLY):
        sets.add(os.open(path, flags), 3)
    reader = sets.open_path("/dev/fdset/3", os.O_RDONLY)
    writer = sets.open_path("/dev/fdset/3", os.O_WRONLY | os.O_CREAT)
    sets.remove(3)
    assert os.read(reader, 3) == b"abc"
    os.write(writer, b"x")
    os.close(reader)
    os.close(writer)
    assert path.read_bytes() == b"xbc"


@pytest.mark.parametrize(
    ("path", "desc"),
    [
        ("/dev/fdset/3", "Failed to find file descriptor with matching flags=0x41"),
        ("/dev/fdset/4", "Failed to find fdset /dev/fdset/4"),
        ("/dev/fdset/x", "Could not parse fdset /dev/fdset/x"),
        ("/dev/fdset/-1", "Could not parse fdset /dev/fdset/-1"),
        ("/dev/fdset/99999999999999999999999", "Could not parse fdset /dev/fdset/99999999999999999999999"),
    ],
)
def test_open_says_what_is_missing(sets, path, desc):
    sets.add(os.open("/dev/null", os.O_RDWR), 3)
    with pytest.raises(ChannelError) as caught:
        sets.open_path(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    assert str(caught.value) == desc


def test_other_paths_are_none_of_its_business(sets):
    assert sets.open_path("/dev/null", os.O_RDONLY) is None


def test_removing_from_an_empty_house_is_refused(sets):
    with pytest.raises(CommandError):
        sets.remove(0)
