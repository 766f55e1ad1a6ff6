"""Capabilities, parameters and properties: QEMU's tables, and refusals instead of silence."""

import dataclasses

import pytest

from qemumig import options as tables
from qemumig.errors import OptionError
from qemumig.options import CAPABILITIES, PARAMETERS, RULES, MigrationOptions

NEEDED = {rule.capability: rule.other for rule in RULES if rule.wanted}


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
    wanted = {"events": True, capability.name: True}
    if capability.name in NEEDED:
        wanted[NEEDED[capability.name]] = True
    with pytest.raises(OptionError, match=f"capability '({'|'.join(wanted)})' is not built"):
        options.set_capabilities(wanted.items())
    assert options.capabilities() == before, "all or nothing"
    options.set_capabilities([(capability.name, False)])


def test_an_unknown_capability_is_refused() -> None:
    with pytest.raises(OptionError, match="Parameter 'capability' does not accept value 'warp'"):
        MigrationOptions().set_capabilities([("warp", True)])


RANGES = [(p, value) for p in PARAMETERS if p.text for value in (p.low - 1, p.high + 1) if value >= 0]


@pytest.mark.parametrize(("parameter", "value"), RANGES, ids=[f"{p.name}={value}" for p, value in RANGES])
def test_a_value_out_of_range_is_refused_with_qemus_text(parameter: object, value: int) -> None:
    options = MigrationOptions()
    with pytest.raises(OptionError) as caught:
        options.set_parameters({"max-bandwidth": 1, parameter.name: value})
    assert str(caught.value).endswith(f"expects {parameter.text}")
    assert caught.value.value == value
    assert options.parameter("max-bandwidth") == 128 << 20, "all or nothing"


@pytest.fixture
def all_built(monkeypatch: pytest.MonkeyPatch) -> MigrationOptions:
    """Options of a program in which every capability and parameter is built."""
    for name, table in (("_CAPABILITY", CAPABILITIES), ("_PARAMETER", PARAMETERS)):
        monkeypatch.setattr(tables, name, {entry.name: dataclasses.replace(entry, built=True) for entry in table})
    return MigrationOptions()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.capability}-{rule.other}")
def test_capabilities_that_contradict_each_other_are_refused_with_qemus_text(rule: object, all_built: object) -> None:
    wanted = {rule.capability: True, rule.other: not rule.wanted}
    with pytest.raises(OptionError) as caught:
        all_built.set_capabilities(wanted.items())
    assert str(caught.value) == rule.text
    assert not all_built.capability(rule.capability), "all or nothing"


def test_a_contradiction_with_what_was_set_before_is_refused_too(all_built: object) -> None:
    all_built.set_capabilities([("xbzrle", True)])
    with pytest.raises(OptionError, match="Multifd is not compatible with xbzrle"):
        all_built.set_capabilities([("multifd", True)])
    all_built.set_capabilities([("multifd", True), ("xbzrle", False)])


def test_a_default_that_nobody_chose_is_in_nobodys_way(all_built: object) -> None:
    all_built.set_capabilities([("background-snapshot", True)])
    with pytest.raises(OptionError, match="not compatible with return-path"):
        all_built.set_capabilities([("return-path", True)])


def test_zero_copy_wants_plain_multifd(all_built: object) -> None:
    all_built.set_parameters({"multifd-compression": "zlib"})
    with pytest.raises(OptionError, match="Zero copy only available for non-compressed non-TLS multifd"):
        all_built.set_capabilities([("multifd", True), ("zero-copy-send", True)])
    all_built.set_parameters({"multifd-compression": "none"})
    all_built.set_capabilities([("multifd", True), ("zero-copy-send", True)])
    with pytest.raises(OptionError, match="Zero copy only available for non-compressed non-TLS multifd"):
        all_built.set_parameters({"tls-creds": "tls0"})


def test_mapped_ram_looks_at_the_parameters_that_are_set_already(all_built: object) -> None:
    all_built.set_capabilities([("mapped-ram", True)])
    all_built.set_parameters({"tls-creds": "tls0"})
    for tls in ("", "tls1"):
        with pytest.raises(OptionError, match="Mapped-ram only available for"):
            all_built.set_parameters({"tls-creds": tls})


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"max-cpu-throttle": 10}, "'max_cpu_throttle' expects an integer in the range of cpu_throttle_initial to 99"),
        ({"xbzrle-cache-size": 5000}, "'xbzrle_cache_size' expects a power of two no less than"),
        ({"vcpu-dirty-limit": 0}, "'vcpu_dirty_limit' must be greater than 1 MB/s"),
        ({"x-vcpu-dirty-limit-period": 0}, "'x-vcpu-dirty-limit-period' expects a value between 1 and 1000"),
        ({"announce-max": 100001, "multifd-channels": 0}, "'multifd_channels' expects a value between 1 and 255"),
    ],
)
def test_ranges_with_a_rule_of_their_own(parameters: dict, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        MigrationOptions().set_parameters(parameters)
    assert text in str(caught.value)


def test_cpu_throttle_bounds_are_checked_against_what_results(all_built: object) -> None:
    with pytest.raises(OptionError, match="max_cpu_throttle"):
        all_built.set_parameters({"cpu-throttle-initial": 50, "max-cpu-throttle": 40})
    all_built.set_parameters({"cpu-throttle-initial": 30, "max-cpu-throttle": 40})


def _mapping(*nodes: tuple) -> dict:
    return {
        "block-bitmap-mapping": [
            {"node-name": name, "alias": alias, "bitmaps": [{"name": b, "alias": a} for b, a in bitmaps]}
            for name, alias, *bitmaps in nodes
        ]
    }


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        (_mapping(("n", "a"), ("n", "b")), "The node name 'n' is mapped twice"),
        (_mapping(("n", "a"), ("m", "a")), "The node alias 'a' is used twice"),
        (_mapping(("n", "9a")), "The node alias '9a' is not well-formed"),
        (_mapping(("n", "a" * 256)), f"The node alias '{'a' * 256}' is longer than 255 bytes"),
        (_mapping(("n" * 32, "a")), f"The node name '{'n' * 32}' is longer than 31 bytes"),
        (_mapping(("n", "a", ("b", "x"), ("b", "y"))), "The bitmap 'n'/'b' is mapped twice"),
        (_mapping(("n", "a", ("b", "x"), ("c", "x"))), "The bitmap alias 'a'/'x' is used twice"),
        (_mapping(("n", "a", ("b" * 1024, "x"))), f"The bitmap name '{'b' * 1024}' is longer than 1023 bytes"),
        (_mapping(("n", "a", ("b", "é" * 128))), f"The bitmap alias '{'é' * 128}' is longer than 255 bytes"),
    ],
)
def test_a_bad_bitmap_mapping_is_refused(mapping: dict, text: str, all_built: object) -> None:
    with pytest.raises(OptionError) as caught:
        all_built.set_parameters(mapping)
    assert str(caught.value) == f"Invalid mapping given for block-bitmap-mapping: {text}"


def test_the_bitmap_mapping_is_shown_once_it_was_set(all_built: object) -> None:
    assert "block-bitmap-mapping" not in all_built.parameters()
    all_built.set_parameters(_mapping(("n", "a", ("b", "x"))))
    assert all_built.parameters()["block-bitmap-mapping"][0]["alias"] == "a"


def test_parameters_of_later_features_take_their_default_only() -> None:
    options = MigrationOptions()
    options.set_parameters({"x-checkpoint-delay": 20000, "mode": "normal"})
    for name, value in {"x-checkpoint-delay": 100, "mode": "cpr-reboot"}.items():
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
        ("x-x-colo", "on", "capability 'x-colo' is not built"),
    ],
)
def test_a_bad_property_is_refused(name: str, value: str, finding: str) -> None:
    with pytest.raises(OptionError) as caught:
        MigrationOptions().set_property(name, value)
    assert finding in str(caught.value)


def test_compression_of_old_qemus_is_chosen_by_their_property_names() -> None:
    made = MigrationOptions()
    made.set_property("x-compress", "on")
    made.set_property("x-compress-level", "9")
    assert (made.migration_property("x-compress"), made.migration_property("x-compress-level")) == (True, 9)
    with pytest.raises(OptionError, match="x-compress-level=10: expected a value between 0 and 9"):
        made.set_property("x-compress-level", "10")
    assert "compress" not in made.capabilities()
