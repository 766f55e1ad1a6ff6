"""kvm.user_objects: memory backends made, changed and deleted (cli.md §4, qmp.md §14)."""

import os

import pytest

from kvm.qom import Node, Tree
from kvm.user_objects import UserObjects
from qemumig.commands.command import Command, CommandError


@pytest.fixture
def objects():
    instance = UserObjects()
    yield instance
    instance.close()


def add(objects, kind="memory-backend-ram", name="m0", **values):
    """What object-add does with these members."""
    members = {"qom-type": kind, "id": name, **{key.replace("_", "-"): value for key, value in values.items()}}
    checked = Command("object-add", print, objects.arguments()).check(members)
    del checked["qom_type"], checked["id"]
    objects.create(kind, name, {key.replace("_", "-"): value for key, value in checked.items()})


def refusal(objects, **values):
    with pytest.raises(CommandError) as caught:
        add(objects, **values)
    return caught.value.desc


@pytest.mark.parametrize(
    ("values", "desc"),
    [
        ({}, "Parameter 'size' is missing"),
        ({"kind": "x", "size": 4096}, "Parameter 'qom-type' does not accept value 'x'"),
        ({"name": "9", "size": 4096}, "Parameter 'id' expects an identifier"),
        ({"size": "x"}, "Parameter 'size' expects uint64"),
        ({"size": 0}, "property 'size' of memory-backend-ram doesn't take value '0'"),
        ({"size": 4096, "foo": 1}, "Parameter 'foo' is unexpected"),
        ({"size": 4096, "share": "x"}, "Invalid parameter type for 'share', expected: boolean"),
        ({"size": 4096, "policy": "bind"}, "host-nodes must be set for policy bind"),
        ({"size": 4096, "host_nodes": [0]}, "binding memory to host nodes is not built in this version of qemumig"),
        ({"kind": "memory-backend-file", "size": 4096}, "Parameter 'mem-path' is missing"),
        ({"kind": "memory-backend-shm", "size": 4096, "share": False}, "can't create shm backend with `share=off`"),
        ({"kind": "memory-backend-shm", "size": 4096, "seal": True}, "Parameter 'seal' is unexpected"),
    ],
)
def test_a_bad_backend_is_refused_in_the_words_of_qemu(objects, values, desc):
    assert refusal(objects, **values) == desc
    assert objects.memories() == []


@pytest.mark.parametrize(
    ("kind", "finding"),
    [
        ("memory-backend-ram", "Cannot allocate memory"),
        ("memory-backend-memfd", "File too large"),
        ("memory-backend-shm", "File too large"),
    ],
)
def test_a_size_that_no_host_has_is_refused(objects, no_leaks, kind, finding):
    assert refusal(objects, kind=kind, size=-1).endswith(finding)
    assert objects.memories() == []


def test_shared_memory_has_no_name_that_could_stay_behind(objects, no_leaks):
    before = set(os.listdir("/dev/shm"))
    add(objects, kind="memory-backend-shm", size=1 << 20)
    assert {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("qemumig-")} == set()
    assert objects.memories()[0]["share"] is True
    assert objects.find("m0").fd is not None
    objects.close()


def test_a_file_that_cannot_be_opened_is_named(objects):
    desc = refusal(objects, kind="memory-backend-file", size=4096, mem_path="/nosuch/x")
    assert desc == "can't open backing store /nosuch/x for guest RAM: No such file or directory"


def test_backends_are_listed_and_their_ids_are_their_own(objects, no_leaks):
    add(objects, size=5000)
    add(objects, kind="memory-backend-memfd", name="m1", size=4096, merge=False)
    assert refusal(objects, size=4096) == "attempt to add duplicate property 'm0' to object (type 'container')"
    assert [(one["id"], one["size"], one["share"], one["merge"]) for one in objects.memories()] == [
        ("m0", 5000, False, True),
        ("m1", 4096, True, False),
    ]
    objects.close()


def test_a_deleted_object_gives_its_memory_back(objects, no_leaks):
    add(objects, kind="memory-backend-memfd", size=1 << 20)
    objects.delete("m0")
    assert objects.memories() == []
    with pytest.raises(CommandError, match="object 'm0' not found"):
        objects.delete("m0")
    add(objects, size=4096)


def test_what_the_machine_uses_is_not_deleted(objects):
    add(objects, size=4096)
    objects.get("m0").in_use = True
    with pytest.raises(CommandError, match="object 'm0' is in use, can not be deleted"):
        objects.delete("m0")


@pytest.mark.parametrize(
    ("name", "value", "desc"),
    [
        ("size", 5, "cannot change property size of memory-backend-ram "),
        ("share", True, "cannot change property value"),
        ("reserve", False, "cannot change property value"),
        ("policy", "foo", "Parameter 'policy' does not accept value 'foo'"),
        ("policy", "bind", "binding memory to host nodes is not built in this version of qemumig"),
    ],
)
def test_what_cannot_be_changed_any_more_is_refused(objects, name, value, desc):
    add(objects, size=4096)
    with pytest.raises(CommandError) as caught:
        tree_of(objects).set("m0", name, value)
    assert caught.value.desc == desc


@pytest.mark.parametrize("name", ["merge", "dump", "prealloc"])
def test_advice_can_be_changed_and_is_shown(objects, name):
    add(objects, size=4096, merge=True, dump=True)
    for value in (False, True):
        tree_of(objects).set("/objects/m0", name, value)
        assert tree_of(objects).get("/objects/m0", name) is value
        assert objects.memories()[0][name] is value


# ---- what channels use ----


def test_credentials_are_made_by_those_who_use_them(objects):
    add(objects, kind="tls-creds-anon", name="t0", endpoint="server")
    assert objects.find("t0") is not None
    assert objects.find("nosuch") is None
    tree = tree_of(objects)
    assert tree.get("t0", "endpoint") == "server"
    assert tree.get("t0", "verify-peer") is True
    objects.delete("t0")
    assert objects.find("t0") is None


def test_a_key_may_have_its_password_in_another_object(objects):
    add(objects, kind="secret", name="s0", data="password")
    values = {"kind": "tls-creds-x509", "name": "t0", "dir": "/nosuch"}
    assert "nosuch" in refusal(objects, **values, passwordid="s0")
    assert refusal(objects, **values, passwordid="s1") == "No secret with id 's1'"


@pytest.mark.parametrize(
    ("values", "desc"),
    [
        ({"kind": "tls-creds-x509", "endpoint": "foo"}, "Parameter 'endpoint' does not accept value 'foo'"),
        ({"kind": "tls-creds-x509"}, "Missing 'dir' property value"),
        ({"kind": "authz-simple"}, "Parameter 'identity' is missing"),
        ({"kind": "authz-list", "rules": [{"match": "*"}]}, "Parameter 'rules[0].policy' is missing"),
        ({"kind": "authz-list", "rules": 5}, "Invalid parameter type for 'rules', expected: array"),
    ],
)
def test_a_bad_channel_object_is_refused_in_the_words_of_qemu(objects, values, desc):
    assert refusal(objects, **values) == desc
    assert objects.find("m0") is None


def tree_of(objects):
    root = Node("container")
    root.add("objects", objects.container)
    return Tree(root)
