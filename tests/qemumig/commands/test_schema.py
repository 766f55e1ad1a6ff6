"""qemumig.commands.schema: declarations as query-qmp-schema tells them."""

from qemumig.commands.command import (
    ANY,
    BOOL,
    NUMBER,
    STR,
    STR_OR_NULL,
    UINT8,
    Argument,
    Command,
    Enum,
    Event,
    ListOf,
    Struct,
)
from qemumig.commands.schema import describe


def nothing():
    """No handler is called here."""


def entries(*declared):
    commands = [one for one in declared if isinstance(one, Command)]
    return {
        (entry["meta-type"], entry["name"]): entry
        for entry in describe(commands, [one for one in declared if isinstance(one, Event)])
    }


def object_type(found, name):
    return {member["name"]: member for member in found["object", name]["members"]}


def test_a_command_leads_to_its_arguments_and_its_return():
    returns = Struct(Argument("name", STR, optional=True))
    found = entries(Command("do", nothing, (Argument("n", UINT8),), returns=returns, oob=True, features=("deprecated",)))
    command = found["command", "do"]
    assert object_type(found, command["arg-type"]) == {"n": {"name": "n", "type": "int"}}
    assert object_type(found, command["ret-type"]) == {"name": {"name": "name", "type": "str", "default": None}}
    assert (command["allow-oob"], command["features"]) == (True, ["deprecated"])
    assert found["builtin", "int"] == {"name": "int", "meta-type": "builtin", "json-type": "int"}
    assert found["builtin", "str"]["json-type"] == "string"


def test_what_a_command_does_not_have_is_not_said():
    command = entries(Command("do", nothing))["command", "do"]
    assert set(command) == {"name", "meta-type", "arg-type", "ret-type"}
    assert command["arg-type"] == command["ret-type"]


def test_an_event_leads_to_its_data():
    found = entries(Event("BANG", Argument("loud", BOOL)))
    assert "loud" in object_type(found, found["event", "BANG"]["arg-type"])


def test_lists_enums_and_alternates():
    found = entries(
        Command(
            "do",
            nothing,
            (
                Argument("l", ListOf(Enum(("a", "b")))),
                Argument("s", STR_OR_NULL),
                Argument("x", ANY),
                Argument("f", NUMBER),
            ),
        )
    )
    members = object_type(found, found["command", "do"]["arg-type"])
    array = found["array", members["l"]["type"]]
    assert array["name"] == f"[{array['element-type']}]"
    enum = found["enum", array["element-type"]]
    assert enum["values"] == [member["name"] for member in enum["members"]] == ["a", "b"]
    assert found["alternate", members["s"]["type"]]["members"] == [{"type": "str"}, {"type": "null"}]
    assert found["builtin", "any"]["json-type"] == "value"
    assert members["f"]["type"] == "number"


def test_a_union_names_its_tag_and_a_type_for_every_case():
    union = Struct(Argument("kind", Enum(("one", "two"))), tag="kind", variants={"one": Struct(Argument("size", UINT8))})
    found = entries(Command("do", nothing, union))
    entry = found["object", found["command", "do"]["arg-type"]]
    assert entry["tag"] == "kind"
    assert [variant["case"] for variant in entry["variants"]] == ["one", "two"]
    one, two = (object_type(found, variant["type"]) for variant in entry["variants"])
    assert (list(one), list(two)) == (["size"], [])


def test_equal_declarations_are_one_type_and_every_type_that_is_named_is_there():
    address = Struct(Argument("host", STR))
    schema = describe(
        [
            Command("a", nothing, (Argument("to", address),)),
            Command("b", nothing, (Argument("to", Struct(Argument("host", STR))),), returns=ListOf(address)),
        ]
    )
    hosts = [entry for entry in schema if entry.get("members") == [{"name": "host", "type": "str"}]]
    assert len(hosts) == 1
    names = [entry["name"] for entry in schema]
    assert len(names) == len(set(names))
    named = {value for entry in schema for key, value in entry.items() if key in ("arg-type", "ret-type", "element-type")}
    named |= {member["type"] for entry in schema for member in entry.get("members", ()) if "type" in member}
    assert named <= set(names)
