"""kvm.monitor.inventory: what the machine is made of, and what it has none of (qmp.md §14)."""

import asyncio

import pytest

from kvm.block import RawImage
from kvm.chardev_options import CharDevices
from kvm.config import MachineConfig
from kvm.monitor.disks import Disk
from kvm.monitor.inventory import Inventory
from qemumig.commands.command import CommandError
from qemumig.qapi import RunState


class PretendMachine:
    runstate = RunState.RUNNING

    def vcpu_thread_ids(self):
        return [11, 12, 13]


class House:
    def __init__(self, directory, **config):
        self.machine = PretendMachine()
        self.devices = CharDevices(print)
        self.memories = []
        (directory / "disk").write_bytes(bytes(1024))
        self.image = RawImage(str(directory / "disk"))
        inventory = Inventory(
            self.machine,
            MachineConfig(ram_size=1 << 20, **config),
            devices=self.devices,
            disks=[Disk("d0", "#block000", "disk", self.image)],
            memories=lambda: list(self.memories),
        )
        self._commands = {command.name: command for command in inventory.commands()}

    def ask(self, name, /, **arguments):
        command = self._commands[name]
        result = asyncio.run(command.call({key.replace("_", "-"): value for key, value in arguments.items()}))
        command.returns.check(result, "return")
        return result

    def close(self):
        self.image.close()
        self.devices.close()


@pytest.fixture
def house(directory):
    house = House(directory)
    yield house
    house.close()


def test_vcpus_have_threads_and_places_in_the_tree(house):
    cpus = house.ask("query-cpus-fast")
    assert [(cpu["cpu-index"], cpu["thread-id"], cpu["props"]["core-id"]) for cpu in cpus] == [
        (0, 11, 0),
        (1, 12, 1),
        (2, 13, 2),
    ]
    assert [cpu["qom-path"][-9:] for cpu in cpus] == ["device[0]", "device[2]", "device[3]"]


def test_without_vapic_vcpus_follow_each_other(directory):
    house = House(directory, vapic=False)
    assert [cpu["qom-path"][-9:] for cpu in house.ask("query-cpus-fast")] == ["device[0]", "device[1]", "device[2]"]
    house.close()


def test_every_machine_type_is_listed_with_its_alias(house):
    machines = {machine["name"]: machine for machine in house.ask("query-machines")}
    assert {name: machine.get("alias") for name, machine in machines.items()} == {
        "microvm": None,
        "pc-q35-10.0": "q35",
        "pc-i440fx-10.0": "pc",
        "none": None,
    }
    assert [name for name, machine in machines.items() if machine.get("is-default")] == ["microvm"]
    assert machines["microvm"]["default-ram-id"] == "microvm.ram"
    assert machines["pc-q35-10.0"]["default-ram-id"] == "pc.ram"
    assert "default-ram-id" not in machines["none"]
    assert all(machine["compat-props"] == [] for machine in house.ask("query-machines", compat_props=True))


def test_memory_backends_are_listed(house):
    switches = {"merge": True, "dump": True, "prealloc": False, "share": False, "reserve": True}
    house.memories.append({"id": "m0", "size": 5, **switches})
    assert house.ask("query-memdev") == [{"id": "m0", "size": 5, **switches, "host-nodes": [], "policy": "default"}]
    assert house.ask("query-memory-size-summary") == {"base-memory": 1 << 20, "plugged-memory": 0}


def test_character_devices_say_who_they_are_and_whether_they_are_used(house, directory):
    house.devices.add_chardev("null,id=c0")
    house.devices.add_device("-serial", f"unix:{directory}/s,server=on,wait=off", "serial0")
    assert house.ask("query-chardev") == [
        {"label": "c0", "filename": "null", "frontend-open": False},
        {"label": "serial0", "filename": f"disconnected:unix:{directory}/s,server=on", "frontend-open": True},
    ]


@pytest.mark.parametrize(
    ("state", "active"),
    [
        (RunState.RUNNING, True),
        (RunState.PAUSED, True),
        (RunState.INMIGRATE, False),
        (RunState.FINISH_MIGRATE, False),
        (RunState.POSTMIGRATE, False),
    ],
)
def test_a_disk_is_active_where_the_guest_is(house, state, active):
    house.machine.runstate = state
    (block,) = house.ask("query-block")
    assert (block["device"], block["qdev"], block["inserted"]["active"]) == ("d0", "disk", active)
    assert house.ask("query-named-block-nodes") == [block["inserted"]]


@pytest.mark.parametrize("name", ["query-iothreads", "query-pci", "query-rx-filter"])
def test_what_the_machine_never_has_is_an_empty_list(house, name):
    assert house.ask(name) == []


def test_what_would_need_a_device_says_that_there_is_none(house):
    for name, arguments, desc in (
        ("query-balloon", {}, "No balloon device has been activated"),
        ("query-rx-filter", {"name": "n0"}, "invalid net client name: n0"),
    ):
        with pytest.raises(CommandError) as caught:
            house.ask(name, **arguments)
        assert caught.value.desc == desc


def test_an_announcement_is_checked_though_nobody_announces(house):
    schedule = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
    assert house.ask("announce-self", **schedule, interfaces=["n0"], id="a") == {}
    with pytest.raises(CommandError, match="Parameter 'step' is missing"):
        house.ask("announce-self", initial=50, max=550, rounds=5)


def test_cpu_models_are_those_of_the_command_line(house):
    models = {model["name"]: model for model in house.ask("query-cpu-definitions")}
    assert models["qemu64"]["migration-safe"] and not models["host"]["migration-safe"]
    assert models["qemu64"]["typename"] == "qemu64-x86_64-cpu"
