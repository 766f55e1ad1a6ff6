"""kvm.monitor.objects: the tree of a machine, and what clients may do with it (qmp.md §14)."""

import asyncio

import pytest

from kvm.block import RawImage
from kvm.chardev_options import CharDevices
from kvm.config import MachineConfig
from kvm.monitor.disks import Disk
from kvm.monitor.objects import ObjectCommands, make_tree
from kvm.user_objects import UserObjects
from qemumig.commands.command import CommandError


class Client:
    """Calls commands and holds them to what they declare."""

    def __init__(self, objects, commands):
        self.objects = objects
        self._commands = {command.name: command for command in commands}

    def ask(self, name, **arguments):
        command = self._commands[name]
        result = asyncio.run(command.call({key.replace("_", "-"): value for key, value in arguments.items()}))
        command.returns.check(result, "return")
        return result

    def refusal(self, name, **arguments):
        with pytest.raises(CommandError) as caught:
            self.ask(name, **arguments)
        return caught.value.desc


@pytest.fixture
def client(directory):
    (directory / "disk").write_bytes(bytes(512))
    devices = CharDevices(print)
    devices.add_chardev("null,id=c0")
    devices.add_chardev(f"file,id=c1,path={directory}/out")
    objects = UserObjects()
    with RawImage(str(directory / "disk")) as image:
        disks = [Disk("d0", "#block000", "disk", image), Disk("", "n0", "/machine/peripheral-anon/device[0]", image)]
        config = MachineConfig(cpus=3, max_cpus=3, ram_size=1 << 20, bios="fw.bin")
        tree = make_tree(config, {"acpi": "off", "memory-backend": "m0", "usb": "on"}, objects, devices, disks)
        yield Client(objects, ObjectCommands(tree, objects).commands())
    objects.close()
    devices.close()


def names(entries):
    return {entry["name"]: entry["type"] for entry in entries}


def test_the_tree_has_the_parts_of_the_machine(client):
    assert names(client.ask("qom-list", path="/")) == {
        "type": "string",
        "machine": "child<microvm-machine>",
        "objects": "child<container>",
        "chardevs": "child<container>",
        "backend": "child<container>",
    }
    assert names(client.ask("qom-list", path="/machine/peripheral"))["disk"] == "child<virtio-blk-device>"
    assert names(client.ask("qom-list", path="/machine/peripheral-anon"))["device[0]"] == "child<virtio-blk-device>"
    assert names(client.ask("qom-list", path="/chardevs")) == {
        "type": "string",
        "c0": "child<chardev-null>",
        "c1": "child<chardev-file>",
    }


def test_vcpus_are_where_query_cpus_fast_says(client):
    cpus = names(client.ask("qom-list", path="/machine/unattached"))
    assert list(cpus)[1:] == ["device[0]", "device[2]", "device[3]"]
    assert client.ask("qom-get", path="/machine/unattached/device[2]", property="core-id") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("type", "microvm-machine"),
        ("firmware", "fw.bin"),
        ("memory", {"size": 1 << 20}),
        ("memory-backend", "/objects/m0"),
        ("acpi", "off"),
        ("pit", "auto"),
        ("usb", True),
        ("isa-serial", True),
        ("peripheral", "/machine/peripheral"),
    ],
)
def test_the_machine_tells_its_properties(client, name, value):
    assert client.ask("qom-get", path="/machine", property=name) == value


def test_objects_come_and_go(client):
    client.ask("object-add", qom_type="memory-backend-ram", id="m0", size=4096)
    assert client.ask("qom-get", path="m0", property="size") == 4096
    assert names(client.ask("qom-list", path="/objects"))["m0"] == "child<memory-backend-ram>"
    client.ask("object-del", id="m0")
    assert client.refusal("qom-list", path="/objects/m0") == "Device '/objects/m0' not found"
    assert client.refusal("object-del", id="m0") == "object 'm0' not found"


def test_a_property_is_set_in_its_type(client):
    client.ask("object-add", qom_type="memory-backend-ram", id="m0", size=4096)
    client.ask("qom-set", path="m0", property="merge", value=False)
    assert client.ask("qom-get", path="m0", property="merge") is False
    assert client.refusal("qom-set", path="m0", property="merge", value=1).endswith("'merge', expected: boolean")
    assert client.refusal("qom-set", path="m0", property="merge") == "Parameter 'value' is missing"


def test_types_are_listed_by_what_they_implement(client):
    def listed(**arguments):
        return [entry["name"] for entry in client.ask("qom-list-types", **arguments)]

    backends = ["memory-backend-ram", "memory-backend-file", "memory-backend-memfd", "memory-backend-shm"]
    assert sorted(listed(implements="memory-backend")) == sorted(backends)
    assert sorted(listed(implements="memory-backend", abstract=True)) == sorted([*backends, "memory-backend"])
    assert set(backends) <= set(listed(implements="user-creatable"))
    assert sorted(listed(implements="accel")) == ["accel", "kvm-accel", "qtest-accel"]
    machines = ["microvm-machine", "none-machine", "pc-i440fx-10.0-machine", "pc-q35-10.0-machine"]
    assert sorted(listed(implements="machine", abstract=False)) == machines
    assert listed(implements="nosuch") == []
    assert "object" in listed(abstract=True) and "object" not in listed()


def test_a_type_names_the_one_above_it(client):
    (host,) = [entry for entry in client.ask("qom-list-types") if entry["name"] == "host-x86_64-cpu"]
    assert host == {"name": "host-x86_64-cpu", "parent": "max-x86_64-cpu"}
