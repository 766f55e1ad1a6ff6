"""kvm.monitor.yank: connections broken out of band (qmp.md §13)."""

import asyncio
import socket

import pytest

from kvm.monitor.yank import Yank

from .harness import PATIENCE_S, serve


class PretendMigration:
    """Is under way, or not, and remembers that it was yanked."""

    is_under_way = False
    yanked = 0

    def yank(self):
        self.yanked += 1


def yankable(house):
    migration = PretendMigration()
    house.devices.add_chardev(f"socket,id=extra,path={house.directory}/extra,server=on,wait=off")
    house.devices.add_chardev("null,id=nothing")
    house.registry.add(Yank(house.devices, migration).commands())
    return migration


def with_yank(scenario, directory):
    async def run(house):
        migration = yankable(house)
        backend = next(backend for backend in house.devices if backend.label == "extra")
        await backend.start()
        return await scenario(house, migration, await house.client(enable=["oob"]))

    return serve(run, directory)


def test_instances_are_sockets_and_the_migration_that_is_under_way(directory):
    async def scenario(house, migration, client):
        before = await client.result("query-yank")
        migration.is_under_way = True
        return before, await client.result("query-yank")

    before, during = with_yank(scenario, directory)
    assert before == [{"type": "chardev", "id": "m0"}, {"type": "chardev", "id": "extra"}]
    assert during == [*before, {"type": "migration"}]


@pytest.mark.parametrize(
    "instance",
    [
        {"type": "migration"},
        {"type": "chardev", "id": "nosuch"},
        {"type": "chardev", "id": "nothing"},
        {"type": "block-node", "node-name": "extra"},
    ],
)
def test_what_does_not_exist_cannot_be_yanked_and_nothing_else_is_then(directory, instance):
    async def scenario(house, migration, client):
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(f"{house.directory}/extra")
        response = await client.ask("yank", instances=[{"type": "chardev", "id": "extra"}, instance])
        peer.setblocking(False)
        with pytest.raises(BlockingIOError):
            peer.recv(1)
        peer.close()
        return response

    response = with_yank(scenario, directory)
    assert response == {"error": {"class": "DeviceNotFound", "desc": "Instance not found"}}


def test_a_yanked_socket_loses_its_client_and_takes_another(directory):
    async def scenario(house, migration, client):
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(2):
                reader, writer = await asyncio.open_unix_connection(f"{house.directory}/extra")
                while next(one for one in house.devices if one.label == "extra")._client is None:
                    await asyncio.sleep(0)
                assert await client.ask("yank", instances=[{"type": "chardev", "id": "extra"}]) == {"return": {}}
                assert await reader.read() == b""
                writer.close()

    with_yank(scenario, directory)


def test_the_migration_is_yanked_out_of_band(directory):
    async def scenario(house, migration, client):
        migration.is_under_way = True
        answer = await client.raw(b'{"exec-oob": "yank", "arguments": {"instances": [{"type": "migration"}]}, "id": 1}')
        return answer, migration.yanked

    assert with_yank(scenario, directory) == ({"return": {}, "id": 1}, 1)
