"""kvm.qom: a tree of objects, walked by path."""

import pytest

from kvm.qom import Node, Property, Tree, constant
from qemumig.commands.command import BOOL, CommandError


@pytest.fixture
def tree():
    root = Node("container")
    objects = root.add("objects", Node("container"))
    root.add("other", Node("container")).add("twin", Node("lamp"))
    state = {"on": False}
    lamp = Node(
        "lamp",
        {
            "on": Property("bool", lambda: state["on"], lambda value: state.update(on=value), BOOL),
            "watts": constant("int", 9),
        },
    )
    objects.add("lamp0", lamp)
    objects.add("twin", Node("lamp"))
    return Tree(root)


@pytest.mark.parametrize("path", ["/objects/lamp0", "lamp0", "objects/lamp0", "//objects//lamp0/", "lamp0/"])
def test_an_object_is_found_by_its_path_or_the_end_of_it(tree, path):
    assert tree.find(path)[0] == "/objects/lamp0"


@pytest.mark.parametrize("path", ["/lamp0", "nosuch", "/objects/lamp0/on", "lamp0/lamp0"])
def test_a_path_that_leads_nowhere_is_refused(tree, path):
    with pytest.raises(CommandError) as caught:
        tree.find(path)
    assert (caught.value.desc, caught.value.error_class) == (f"Device '{path}' not found", "DeviceNotFound")


@pytest.mark.parametrize("path", ["twin", ""])
def test_a_path_that_fits_several_objects_is_refused(tree, path):
    with pytest.raises(CommandError, match=f"Path '{path}' is ambiguous"):
        tree.find(path)


def test_an_object_shows_its_properties_and_children(tree):
    assert tree.find("/objects/lamp0")[1].describe() == [
        {"name": "type", "type": "string"},
        {"name": "on", "type": "bool"},
        {"name": "watts", "type": "int"},
    ]
    assert {"name": "lamp0", "type": "child<lamp>"} in tree.find("/objects")[1].describe()


def test_properties_are_read_and_written(tree):
    assert tree.get("lamp0", "on") is False
    tree.set("lamp0", "on", True)
    assert tree.get("lamp0", "on") is True
    assert tree.get("lamp0", "type") == "lamp"
    assert tree.get("/objects", "lamp0") == "/objects/lamp0"
    assert tree.get("/", "objects") == "/objects"


@pytest.mark.parametrize(
    ("path", "name", "value", "desc"),
    [
        ("lamp0", "nosuch", 1, "Property 'lamp.nosuch' not found"),
        ("lamp0", "watts", 1, "Property 'lamp.watts' is not writable"),
        ("lamp0", "type", "x", "Property 'lamp.type' is not writable"),
        ("/objects", "lamp0", "x", "Property 'container.lamp0' is not writable"),
        ("lamp0", "on", 1, "Invalid parameter type for 'on', expected: boolean"),
    ],
)
def test_what_cannot_be_written_is_refused(tree, path, name, value, desc):
    with pytest.raises(CommandError) as caught:
        tree.set(path, name, value)
    assert caught.value.desc == desc


def test_a_name_is_given_once(tree):
    with pytest.raises(CommandError, match=r"attempt to add duplicate property 'twin' to object \(type 'container'\)"):
        tree.find("/objects")[1].add("twin", Node("lamp"))
