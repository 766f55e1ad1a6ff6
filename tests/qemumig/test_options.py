"""Capabilities, parameters and properties: QEMU's tables, and refusals instead of silence."""

import pytest

from qemumig.errors import OptionError
from qemumig.options import CAPABILITIES, PARAMETERS, MigrationOptions


def test_defaults_are_qemus_but_for_the_return_path() -> None:
    options = MigrationOptions()
    on = [name for name, state in options.capabilities().items() if state]
    assert on == ["return-path"]
    assert options.parameter("max-bandwidth") == 128 << 20
    assert options.parameter("downtime-limit") == 300
    assert not options.is_chosen("return-path")


@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if not c.built], ids=lambda c: c.name)
def test_what_is_not_built_is_refused_and_says_so(capability: object) -> None:
    options = MigrationOptions()
    before = options.capabilities()
    with pytest.raises(OptionError, match=f"capability '{capability.name}' is not built"):
        options.set_capabilities([("events", True), (capability.name, True)])
    assert options.capabilities() == before, "all or nothing"
    options.set_capabilities([(capability.name, False)])


def test_an_unknown_capability_is_refused() -> None:
    with pytest.raises(OptionError, match="Parameter 'capability' does not accept value 'warp'"):
        MigrationOptions().set_capabilities([("warp", True)])


RANGES = [(p, value) for p in PARAMETERS if p.text and p.kind != "enum" for value in (p.low - 1, p.high + 1) if value >= 0]


@pytest.mark.parametrize(("parameter", "value"), RANGES, ids=[f"{p.name}={value}" for p, value in RANGES])
def test_a_value_out_of_range_is_refused_with_qemus_text(parameter: object, value: int) -> None:
    options = MigrationOptions()
    with pytest.raises(OptionError) as caught:
        options.set_parameters({"max-bandwidth": 1, parameter.name: value})
    assert str(caught.value).endswith(f"expects {parameter.text}")
    assert caught.value.value == value
    assert options.parameter("max-bandwidth") == 128 << 20, "all or nothing"


def test_parameters_of_later_features_take_their_default_only() -> None:
    options = MigrationOptions()
    options.set_parameters({"multifd-channels": 2, "tls-creds": None, "multifd-compression": "none"})
    for name, value in {"multifd-channels": 4, "tls-creds": "tls0", "multifd-compression": "zstd"}.items():
        with pytest.raises(OptionError, match=f"parameter '{name}' is not built"):
            options.set_parameters({name: value})


def test_global_properties_by_qemus_names() -> None:
    options = MigrationOptions()
    options.set_property("send-switchover-start", "on")
    options.set_property("x-max-bandwidth", "0")
    options.set_property("x-events", "on")
    options.set_property("x-return-path", "off")
    options.set_property("x-clear-bitmap-shift", "0x12")
    assert options.migration_property("send-switchover-start") is True
    assert options.migration_property("x-clear-bitmap-shift") == 18
    assert options.parameter("max-bandwidth") == 0
    assert options.capability("events")
    assert not options.capability("return-path") and options.is_chosen("return-path")


@pytest.mark.parametrize(
    ("name", "value", "finding"),
    [
        ("warp", "1", "Property 'migration.warp' not found"),
        ("send-configuration", "maybe", "Parameter 'send-configuration' expects 'on' or 'off'"),
        ("x-max-bandwidth", "fast", "expects a number"),
        ("x-max-bandwidth", "-1", "expects uint64"),
        ("x-downtime-limit", "2000001", "an integer in the range of 0 to"),
        ("x-multifd", "on", "capability 'multifd' is not built"),
    ],
)
def test_a_bad_property_is_refused(name: str, value: str, finding: str) -> None:
    with pytest.raises(OptionError) as caught:
        MigrationOptions().set_property(name, value)
    assert finding in str(caught.value)
