"""The migration commands as people type them, and what `info` prints of them (hmp.md §2–§6, §8)."""

import pytest

from kvm.monitor.hmp.migration import bandwidth, integer
from qemumig.commands.command import CommandError
from qemumig.options import PARAMETERS
from tests.kvm.monitor.human import Person

SUFFIX_HINT = "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.\n"
GLOBALS = """\
globals:
store-global-state: on
only-migratable: off
send-configuration: on
send-section-footer: on
send-switchover-start: off
clear-bitmap-shift: 14
"""
RAM = {
    "transferred": 4422240,
    "remaining": 1 << 20,
    "total": 67174400,
    "duplicate": 15362,
    "normal": 1038,
    "normal-bytes": 4251648,
    "dirty-pages-rate": 0,
    "mbps": 86.92363636363636,
    "dirty-sync-count": 3,
    "postcopy-requests": 0,
    "page-size": 4096,
    "multifd-bytes": 0,
    "pages-per-second": 2461,
    "precopy-bytes": 0,
    "downtime-bytes": 4398270,
    "postcopy-bytes": 0,
    "dirty-sync-missed-zero-copy": 0,
}


def report(**record):
    return Person({"query-migrate": record}).type("info migrate").removeprefix(GLOBALS)


# ---- info migrate ----


def test_before_any_migration_there_are_only_the_globals():
    assert Person({"query-migrate": {}}).type("info migrate") == GLOBALS


def test_a_completed_migration_prints_qemus_lines():
    record = {"status": "completed", "setup-time": 1, "downtime": 1, "total-time": 408, "ram": {**RAM, "remaining": 0}}
    assert report(**record) == (
        "Migration status: completed\ntotal time: 408 ms\ndowntime: 1 ms\nsetup: 1 ms\ntransferred ram: 4318 kbytes\n"
        "throughput: 86.92 mbps\nremaining ram: 0 kbytes\ntotal ram: 65600 kbytes\nduplicate: 15362 pages\n"
        "normal: 1038 pages\nnormal bytes: 4152 kbytes\ndirty sync count: 3\npage size: 4 kbytes\n"
        "multifd bytes: 0 kbytes\npages-per-second: 2461\ndowntime ram: 4295 kbytes\n"
    )


def test_optional_lines_come_with_their_values():
    busy = {**RAM, "dirty-pages-rate": 7, "postcopy-requests": 2, "precopy-bytes": 2048, "postcopy-bytes": 4096}
    busy["dirty-sync-missed-zero-copy"] = 5
    printed = report(status="postcopy-active", ram=busy).splitlines()
    assert printed[printed.index("pages-per-second: 2461") + 1 :] == [
        "dirty pages rate: 7 pages",
        "postcopy request count: 2",
        "precopy ram: 2 kbytes",
        "downtime ram: 4295 kbytes",
        "postcopy ram: 4 kbytes",
        "Zero-copy-send fallbacks happened: 5 times",
    ]


def test_features_add_their_lines():
    cache = {"cache-size": 64, "bytes": 1024, "pages": 1, "cache-miss": 2, "cache-miss-rate": 0.5, "encoding-rate": 3.0}
    printed = report(
        **{"status": "completed", "xbzrle-cache": {**cache, "overflow": 4}, "cpu-throttle-percentage": 20},
        **{"dirty-limit-throttle-time-per-round": 1, "dirty-limit-ring-full-time": 2, "postcopy-blocktime": 3},
        **{"postcopy-vcpu-blocktime": [4, 5], "vfio": {"transferred": 2048}, "blocked-reasons": ["a", "b"]},
    )
    assert printed.splitlines() == [
        *("Outgoing migration blocked:", "  a", "  b", "Migration status: completed", "total time: 0 ms"),
        *("cache size: 64 bytes", "xbzrle transferred: 1 kbytes", "xbzrle pages: 1 pages", "xbzrle cache miss: 2 pages"),
        *("xbzrle cache miss rate: 0.50", "xbzrle encoding rate: 3.00", "xbzrle overflow: 4"),
        *("cpu throttle percentage: 20", "dirty-limit throttle time: 1 us", "dirty-limit ring full time: 2 us"),
        *("postcopy blocktime: 3", "postcopy vcpu blocktime: 4,5", "vfio device transferred: 2 kbytes"),
    ]


def test_only_a_failure_shows_its_reason():
    assert report(**{"status": "failed", "error-desc": "no"}) == "Migration status: failed (no)\ntotal time: 0 ms\n"
    assert report(**{"status": "cancelled", "error-desc": "no"}) == "Migration status: cancelled\ntotal time: 0 ms\n"


def test_a_listening_destination_shows_where():
    addresses = [
        {"type": "inet", "host": "127.0.0.1", "port": "4444", "ipv4": True},
        {"type": "inet", "host": "::1", "port": "4444", "ipv6": True},
        {"type": "unix", "path": "/a"},
        {"type": "vsock", "cid": "1", "port": "2"},
    ]
    assert report(**{"status": "setup", "socket-address": addresses}) == (
        "Migration status: setup\ntotal time: 0 ms\n"
        "socket address: [\n\ttcp:127.0.0.1:4444\n\ttcp:[::1]:4444\n\tunix:/a\n\tvsock:1:2\n]\n"
    )


# ---- info migrate_capabilities, migrate_parameters ----


def test_capabilities_are_listed_as_qmp_lists_them():
    entries = [{"capability": "xbzrle", "state": False}, {"capability": "events", "state": True}]
    printed = Person({"query-migrate-capabilities": entries}).type("info migrate_capabilities")
    assert printed == "xbzrle: off\nevents: on\n"


def test_parameters_are_listed_in_the_layout_of_qemu_10():
    parameters = {parameter.name: parameter.default for parameter in PARAMETERS if parameter.default is not None}
    printed = Person({"query-migrate-parameters": parameters}).type("info migrate_parameters")
    assert printed == (
        "announce-initial: 50 ms\nannounce-max: 550 ms\nannounce-rounds: 5\nannounce-step: 100 ms\n"
        "throttle-trigger-threshold: 50\ncpu-throttle-initial: 20\ncpu-throttle-increment: 10\n"
        "cpu-throttle-tailslow: off\nmax-cpu-throttle: 99\ntls-creds: ''\ntls-hostname: ''\n"
        "max-bandwidth: 134217728 bytes/second\navail-switchover-bandwidth: 0 bytes/second\ndowntime-limit: 300 ms\n"
        "x-checkpoint-delay: 20000 ms\nmultifd-channels: 2\nmultifd-compression: none\nzero-page-detection: multifd\n"
        "xbzrle-cache-size: 67108864 bytes\nmax-postcopy-bandwidth: 0\ntls-authz: ''\n"
        "x-vcpu-dirty-limit-period: 1000 ms\nvcpu-dirty-limit: 1 MB/s\nmode: normal\ndirect-io: off\n"
    )


def test_a_bitmap_mapping_is_listed_once_there_is_one():
    nodes = [{"node-name": "n", "alias": "a", "bitmaps": [{"name": "b", "alias": "c"}]}]
    answers = {"query-migrate-parameters": {"block-bitmap-mapping": nodes, "mode": "normal"}}
    assert Person(answers).type("info migrate_parameters") == (
        "block-bitmap-mapping:\n  'n' -> 'a'\n    'b' -> 'c'\nmode: normal\n"
    )


# ---- migrate_set_parameter ----


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("downtime-limit 1k", "downtime_limit", 1024),
        ("downtime-limit 1.5k", "downtime_limit", 1536),
        ("downtime-limit 0x100", "downtime_limit", 256),
        ("max-bandwidth 10", "max_bandwidth", 10 << 20),
        ("max-bandwidth 10k", "max_bandwidth", 10 << 10),
        ("avail-switchover-bandwidth 1.5G", "avail_switchover_bandwidth", 3 << 29),
        ("max-postcopy-bandwidth 10", "max_postcopy_bandwidth", 10),
        ("multifd-channels 0x10", "multifd_channels", 16),
        ("multifd-channels 010", "multifd_channels", 8),
        ("multifd-channels +3", "multifd_channels", 3),
        ("multifd-channels -1", "multifd_channels", -1),  # QMP says that it is no uint8_t
        ("cpu-throttle-tailslow yes", "cpu_throttle_tailslow", True),
        ("cpu-throttle-tailslow n", "cpu_throttle_tailslow", False),
        ("multifd-compression zlib", "multifd_compression", "zlib"),
        ('tls-hostname "a b"', "tls_hostname", "a b"),
        ('tls-creds ""', "tls_creds", ""),
    ],
)
def test_a_value_is_understood_by_the_type_of_its_parameter(line, name, value):
    person = Person({"migrate-set-parameters": {}})
    assert person.type(f"migrate_set_parameter {line}") == ""
    assert person.asked == [("migrate-set-parameters", {name: value})]


@pytest.mark.parametrize(
    ("line", "printed"),
    [
        ("foo 1", "invalid parameter value: foo\n"),
        ("downtime_limit 1", "invalid parameter value: downtime_limit\n"),
        ("block-bitmap-mapping x", "The block-bitmap-mapping parameter can only be set through QMP\n"),
        ("downtime-limit q", f"Parameter 'downtime-limit' expects a non-negative number below 2^64\n{SUFFIX_HINT}"),
        ("downtime-limit 1.5", f"Parameter 'downtime-limit' expects a non-negative number below 2^64\n{SUFFIX_HINT}"),
        ("downtime-limit -1", "Value '-1' is out of range for parameter 'downtime-limit'\n"),
        ("max-bandwidth 10q", "Invalid size 10q\n"),
        ('max-bandwidth ""', "Invalid size \n"),
        ("multifd-channels abc", "Parameter 'multifd-channels' expects uint64\n"),
        ("multifd-channels 1k", "Parameter 'multifd-channels' expects uint64\n"),
        ("multifd-channels 99999999999999999999999", "Parameter 'multifd-channels' expects uint64\n"),
        ("cpu-throttle-tailslow ON", "Parameter 'cpu-throttle-tailslow' expects 'on' or 'off'\n"),
    ],
)
def test_a_value_of_another_kind_is_refused_in_qemus_words(line, printed):
    person = Person({"migrate-set-parameters": {}})
    assert person.type(f"migrate_set_parameter {line}") == f"Error: {printed}"
    assert person.asked == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.3", 1363149),
        ("1.", 1 << 20),
        (".5", 1 << 19),
        ("1b", 1),
        ("1B", 1),
        ("0x10", 16 << 20),
        ("7E", 7 << 60),
        ("8796093022207", 8796093022207 << 20),
        ("0", 0),
    ],
)
def test_bandwidths_count_mebibytes_and_round(text, value):
    assert bandwidth(text) == value


@pytest.mark.parametrize("text", ["8E", "8796093022208", "0x1k", "0x1.8", "1kk", "1e3", "-1", "1 2", ".", "", "9" * 5000])
def test_a_bandwidth_that_is_none_or_too_large_is_refused(text):
    with pytest.raises(CommandError, match="Invalid size"):
        bandwidth(text)


def test_a_number_of_thousands_of_digits_is_refused():
    with pytest.raises(CommandError, match="expects uint64"):
        integer("multifd-channels", "9" * 5000)


# ---- the other commands ----


def test_an_unknown_capability_or_state_is_refused_before_qmp_is_asked():
    person = Person({"migrate-set-capabilities": {}, "migrate-continue": {}})
    assert person.type("migrate_set_capability foo on") == "Error: invalid parameter value: foo\n"
    assert person.type("migrate_continue foo") == "Error: invalid parameter value: foo\n"
    assert person.asked == []


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("migrate_cancel", ("migrate_cancel", {})),
        ("migrate_pause", ("migrate-pause", {})),
        ("migrate_start_postcopy", ("migrate-start-postcopy", {})),
        ("migrate_incoming tcp:a:1", ("migrate-incoming", {"uri": "tcp:a:1", "exit_on_error": False})),
        ("migrate_recover tcp:a:1", ("migrate-recover", {"uri": "tcp:a:1"})),
        ("migrate_continue pre-switchover", ("migrate-continue", {"state": "pre-switchover"})),
        (
            "migrate_set_capability events on",
            ("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}),
        ),
        (
            "client_migrate_info spice h 1 2 s",
            (
                "client_migrate_info",
                {"protocol": "spice", "hostname": "h", "port": 1} | {"tls_port": 2, "cert_subject": "s"},
            ),
        ),
        ("client_migrate_info spice h", ("client_migrate_info", {"protocol": "spice", "hostname": "h"})),
        ("x_colo_lost_heartbeat", ("x-colo-lost-heartbeat", {})),
    ],
)
def test_a_command_becomes_its_qmp_command(line, asked):
    person = Person({asked[0]: {}})
    assert person.type(line) == ""
    assert person.asked == [asked]


def test_announce_self_announces_as_the_parameters_say():
    parameters = {"announce-initial": 1, "announce-max": 2, "announce-rounds": 3, "announce-step": 4, "mode": "normal"}
    person = Person({"announce-self": {}, "query-migrate-parameters": parameters})
    assert person.type("announce_self a,b x") == ""
    timing = {"initial": 1, "max": 2, "rounds": 3, "step": 4}
    assert person.asked[-1] == ("announce-self", {**timing, "interfaces": ["a", "b"], "id": "x"})
    person.type("announce_self")
    assert person.asked[-1] == ("announce-self", timing)


def test_who_cannot_wait_is_told_that_migration_goes_on_alone():
    person = Person({"migrate": {}, "query-migrate": {"status": "active"}})
    printed = person.type_to_qmp("migrate tcp:a:1")
    assert printed == "terminal does not allow synchronous migration, continuing detached\r\n"
    assert person.type_to_qmp("migrate -d tcp:a:1") == ""


def test_a_terminal_waits_until_migration_is_over_and_reports_a_failure():
    states = [lambda: {"status": "setup"}, lambda: {"status": "active"}, lambda: {"status": "failed", "error-desc": "no"}]
    person = Person({"migrate": {}, "query-migrate": states}, wait_seconds=0)
    assert person.type("migrate tcp:a:1") == ""
    assert states == []
    assert person.reported == ["no"]


# ---- dirty rate and limit ----


def test_a_dirty_rate_measurement_is_started_and_shown():
    rate = {"status": "measured", "start-time": 7, "calc-time": 1, "sample-pages": 512, "mode": "page-sampling"}
    person = Person({"calc-dirty-rate": {}, "query-dirty-rate": {**rate, "dirty-rate": 32}})
    assert person.type("calc_dirty_rate 1 200") == (
        "Starting dirty rate measurement with period 1 seconds\n[Please use 'info dirty_rate' to check results]\n"
    )
    assert person.asked == [("calc-dirty-rate", {"calc_time": 1, "mode": "page-sampling", "sample_pages": 200})]
    assert person.type("info dirty_rate") == (
        "Status: measured\nStart Time: 7 (ms)\nSample Pages: 512 (per GB)\nPeriod: 1 (sec)\nMode: page-sampling\n"
        "Dirty rate: 32 (MB/s)\n"
    )


def test_a_rate_by_vcpu_is_shown_by_vcpu():
    rate = {"status": "measuring", "start-time": 7, "calc-time": 1, "sample-pages": 0, "mode": "dirty-ring"}
    person = Person({"query-dirty-rate": {**rate, "vcpu-dirty-rate": [{"id": 0, "dirty-rate": 95}]}})
    assert person.type("info dirty_rate").splitlines()[2:] == [
        *("Period: 1 (sec)", "Mode: dirty-ring", "Dirty rate: (not ready)", "vcpu[0], Dirty rate: 95 (MB/s)")
    ]


def test_impossible_measurements_are_refused():
    person = Person({"calc-dirty-rate": {}})
    assert person.type("calc_dirty_rate 0") == "Incorrect period length specified!\n"
    assert person.type("calc_dirty_rate -r -b 1") == "Either dirty ring or dirty bitmap can be specified!\n"
    assert person.asked == []


def test_dirty_limits_are_set_lifted_and_shown():
    limits = [{"cpu-index": 0, "limit-rate": 10, "current-rate": 0}]
    person = Person({"set-vcpu-dirty-limit": {}, "cancel-vcpu-dirty-limit": {}, "query-vcpu-dirty-limit": limits})
    assert person.type("set_vcpu_dirty_limit 10 1") == ""
    assert person.asked == [("set-vcpu-dirty-limit", {"dirty_rate": 10, "cpu_index": 1})]
    assert person.type("set_vcpu_dirty_limit -1") == "Error: invalid dirty page limit -1\n"
    assert person.type("cancel_vcpu_dirty_limit") == (
        "[Please use 'info vcpu_dirty_limit' to query dirty limit for virtual CPU]\n"
    )
    assert person.type("info vcpu_dirty_limit") == "vcpu[0], limit rate 10 (MB/s), current rate 0 (MB/s)\n"
    limits.clear()
    assert person.type("info vcpu_dirty_limit") == "Dirty page limit not enabled!\n"
