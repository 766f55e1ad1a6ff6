"""kvm.options and kvm.keyval: QEMU's command line, and what is said about one that cannot be (cli.md)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm import keyval
from kvm.arguments import Actions, HelpRequested, RunWith
from kvm.config import Chipset
from kvm.cpuid import CpuModel
from kvm.keyval import UsageError
from kvm.machine_options import CPU_MODELS
from kvm.options import OPTIONS, help_text, parse

MICROVM = "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=off"
BASE = ["-M", MICROVM, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm"]
BASE += ["-cpu", "qemu64,pni=off", "-m", "16M", "-bios", "guest.bin"]


def refusal(*argv):
    """The lines about a command line that is refused, without the program's name."""
    with pytest.raises(UsageError) as caught:
        parse([*BASE, *argv])
    return [*caught.value.messages, *caught.value.hints]


class TestKeyval:
    @pytest.mark.parametrize(
        ("text", "pairs"),
        [
            ("microvm,acpi=off", [("type", "microvm"), ("acpi", "off")]),
            ("microvm,", [("type", "microvm")]),
            ("", []),
            ("a=1", [("a", "1")]),
            ("a=b,,c,d", [("a", "b,c"), ("d", None)]),
            ("a=1=2", [("a", "1=2")]),
            ("a,,b", [("type", "a,b")]),
            ("x,,,y", [("type", "x,"), ("y", None)]),
        ],
    )
    def test_split(self, text, pairs):
        assert keyval.split(text, "type") == pairs

    @given(st.lists(st.text("ab,", min_size=1, max_size=6), min_size=1, max_size=4))
    def test_doubled_commas_bring_any_value_through(self, values):
        text = ",".join(f"k{index}=" + value.replace(",", ",,") for index, value in enumerate(values))
        assert [value for _, value in keyval.split(text)] == values

    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("0", 0),
            ("4097", 4097),
            ("64M", 64 << 20),
            ("64m", 64 << 20),
            ("1.5G", 3 << 29),
            ("0.3k", 307),
            ("0x10", 16),
            ("2T", 2 << 40),
            ("5b", 5),
            ("1P", 1 << 50),
            ("18446744073709551615", (1 << 64) - 1),
        ],
    )
    def test_sizes(self, text, number):
        assert keyval.size("size", text) == number

    def test_a_bare_number_counts_in_the_default_unit(self):
        assert keyval.size("size", "16", default_unit="m") == 16 << 20

    @pytest.mark.parametrize("text", ["abc", "-S", "1e3", "16X", "16MB", "1.5", "", " 1", "1 ", "0x", "१"])
    def test_what_is_no_size(self, text):
        with pytest.raises(UsageError) as caught:
            keyval.size("size", text)
        assert caught.value.messages == ("Parameter 'size' expects a non-negative number below 2^64",)
        assert len(caught.value.hints) == 2

    @pytest.mark.parametrize("text", ["-1", "99999999999999999999", "16E"])
    def test_sizes_out_of_range(self, text):
        with pytest.raises(UsageError, match=f"Value '{text}' is out of range for parameter 'size'"):
            keyval.size("size", text)


class TestMeaning:
    def test_the_usual_command_line(self):
        arguments = parse([*BASE, "-smp", "2", "-serial", "file:out", "-qmp", "unix:q,server=on,wait=off", "-S"])
        assert arguments.ram_size == 16 << 20
        assert (arguments.cpus, arguments.max_cpus) == (2, 2)
        assert (arguments.cpu_model, arguments.cpu_features) == ("qemu64", {"pni": False})
        assert arguments.bios == "guest.bin"
        assert arguments.serial_devices() == ["file:out"]
        assert [request.device for request in arguments.monitors] == ["unix:q,server=on,wait=off"]
        assert arguments.paused
        assert arguments.kernel_irqchip == "split"

    def test_one_dash_or_two(self):
        assert parse(["--M", "microvm", "--bios", "x", "--m", "8"]).ram_size == 8 << 20

    def test_a_value_may_look_like_an_option(self):
        assert refusal("-m", "-S")[0] == "-m -S: Parameter 'size' expects a non-negative number below 2^64"

    def test_machine_options_add_up_and_the_last_one_wins(self):
        arguments = parse([*BASE, "-machine", "isa-serial=off", "-M", "kernel-irqchip=on,"])
        assert not arguments.machine_switch("isa-serial", True)
        assert arguments.kernel_irqchip == "on"

    @pytest.mark.parametrize(
        ("machine", "there"),
        [
            ("microvm", {"acpi", "ioapic2", "pit", "pic"}),
            ("microvm,acpi=auto,ioapic2=auto,pit=auto,pic=auto,rtc=auto", {"acpi", "ioapic2", "pit", "pic"}),
            ("microvm,rtc=on", {"acpi", "ioapic2", "pit", "pic", "rtc"}),
            ("microvm,ioapic2=off", {"acpi", "pit", "pic"}),
            ("microvm,acpi=off", {"pit", "pic"}),
            ("microvm,acpi=off,ioapic2=on", {"pit", "pic"}),
            ("microvm,acpi=on,pit=off,pic=off", {"acpi", "ioapic2"}),
            (MICROVM, set()),
        ],
    )
    def test_the_machine_has_what_qemus_has(self, machine, there):
        found = parse(["-M", machine, "-bios", "guest.bin"]).chipset
        assert {name for name in vars(found) if getattr(found, name)} == there

    def test_of_two_words_about_a_device_the_last_one_wins(self):
        assert parse([*BASE, "-M", "rtc=on", "-M", "acpi=on,rtc=auto"]).chipset == Chipset(acpi=True, ioapic2=True)

    @pytest.mark.parametrize("device", ["acpi", "pit", "pic", "rtc", "pcie", "ioapic2"])
    def test_a_device_is_on_or_off_or_automatic(self, device):
        for value in ("off", "auto"):
            parse([*BASE, "-M", f"{device}={value}"])
        assert refusal("-M", f"{device}=yes") == [f"Parameter '{device}' does not accept value 'yes'"]

    @pytest.mark.parametrize("device", ["pcie", "usb"])
    def test_a_device_that_does_not_exist_cannot_be_asked_for(self, device):
        assert refusal("-M", f"{device}=on") == [
            f"{device}=on: this microvm has no {device}; leave it out or say {device}=off"
        ]

    @pytest.mark.parametrize(
        ("value", "size"),
        [("16", 16 << 20), ("1.5G", 3 << 29), ("size=8", 8 << 20), ("0", 0), ("5b", 8192), ("4097k", 4104 << 10)],
    )
    def test_memory_is_in_mebibytes_and_whole_pages(self, value, size):
        assert parse([*BASE, "-m", value]).ram_size == size

    @pytest.mark.parametrize(
        ("value", "counts"),
        [
            ("3", (3, 3)),
            ("cpus=2", (2, 2)),
            ("2,maxcpus=4", (2, 4)),
            ("cores=2", (2, 2)),
            ("2,sockets=2,cores=1,threads=1", (2, 2)),
            ("1,sockets=2,cores=1,threads=1", (1, 2)),
        ],
    )
    def test_topology(self, value, counts):
        arguments = parse([*BASE, "-smp", value])
        assert (arguments.cpus, arguments.max_cpus) == counts

    def test_cpu_features_in_all_spellings(self):
        arguments = parse([*BASE, "-cpu", "host,+avx,-sse3,pni=off,x2apic"])
        assert arguments.cpu_features == {"avx": True, "sse3": False, "pni": False, "x2apic": True}

    def test_the_first_accelerator_that_works_is_used(self):
        assert parse([*BASE, "-accel", "kvm,foo=1"]).warnings == []

    def test_those_before_it_are_told_of(self):
        arguments = parse(["-bios", "x", "-accel", "foo", "-accel", "kvm"])
        assert arguments.warnings == ["-accel foo: invalid accelerator foo", "falling back to KVM"]
        assert parse(["-bios", "x", "-M", "accel=foo:kvm"]).warnings == ["invalid accelerator foo", "falling back to KVM"]

    def test_the_accelerator_of_harnesses_runs_no_guest_unless_another_one_works(self):
        assert not parse(["-bios", "x", "-accel", "qtest"]).runs_guest
        assert parse([*BASE, "-accel", "qtest"]).runs_guest

    @pytest.mark.parametrize(
        "argv",
        [["-accel", "kvm"], ["-enable-kvm"], ["-M", "accel=kvm:tcg"], ["-accel", "tcg", "-accel", "kvm"], []],
    )
    def test_ways_to_ask_for_kvm(self, argv):
        parse(["-bios", "x", *argv])

    def test_accel_properties(self):
        arguments = parse(["-bios", "x", "-accel", "kvm,kernel-irqchip=on,dirty-ring-size=0"])
        assert arguments.kernel_irqchip == "on"

    def test_the_serial_port_without_an_option(self):
        assert parse(["-bios", "x"]).serial_devices() == ["null"]
        assert parse(["-bios", "x", "-nographic"]).serial_devices() == ["mon:stdio"]
        assert parse(["-bios", "x", "-nographic", "-monitor", "none"]).serial_devices() == ["stdio"]
        assert parse(["-bios", "x", "-nographic", "-nodefaults"]).serial_devices() == []
        assert parse(["-bios", "x", "-nographic", "-serial", "none"]).serial_devices() == ["none"]

    def test_monitors(self):
        arguments = parse([*BASE, "-mon", "c0,mode=control,pretty=on", "-qmp-pretty", "stdio"])
        first, second = arguments.monitors
        assert not (first.human or second.human)
        assert (first.chardev, first.pretty) == ("c0", True)
        assert (second.device, second.pretty) == ("stdio", True)

    def test_monitors_for_people(self):
        arguments = parse([*BASE, "-mon", "c0", "-monitor", "stdio", "-monitor", "none"])
        assert [(one.chardev, one.device, one.human) for one in arguments.monitors] == [
            ("c0", "", True),
            ("", "stdio", True),
        ]

    def test_a_memory_backend(self):
        arguments = parse(
            [*BASE, "-object", "memory-backend-file,id=m0,size=16M,mem-path=/x,share=on", "-M", "memory-backend=m0"]
        )
        (backend,) = arguments.objects
        assert (backend.kind, backend.id) == ("memory-backend-file", "m0")
        assert backend.properties == {"size": 16 << 20, "mem-path": "/x", "share": True}
        assert arguments.memory_backend == "m0"

    def test_a_memory_backend_in_json(self):
        text = '{"qom-type": "memory-backend-memfd", "id": "m0", "size": 4096, "seal": false}'
        (backend,) = parse([*BASE, "-object", text]).objects
        assert backend.properties == {"size": 4096, "seal": False}

    @pytest.mark.parametrize("text", ["apic-common.vapic=off", "driver=apic-common,property=vapic,value=off"])
    def test_vapic(self, text):
        assert parse(BASE).vapic
        assert not parse([*BASE, "-global", text]).vapic

    def test_migration_properties_are_handed_on_in_order(self):
        arguments = parse([*BASE, "-global", "migration.x-events=on", "-global", "migration.foo=a=b.c"])
        assert arguments.migration_properties == [("x-events", "on"), ("foo", "a=b.c")]

    def test_an_unknown_class_is_a_warning(self):
        assert parse([*BASE, "-global", "foo.bar=1"]).warnings == ["warning: global foo.bar has invalid class name"]

    @pytest.mark.parametrize("text", ["vm", "guest=vm", "vm,debug-threads=on,process=x"])
    def test_names(self, text):
        assert parse([*BASE, "-name", text]).name == "vm"

    def test_uuid(self):
        arguments = parse([*BASE, "-uuid", "00010203-0405-0607-0809-0a0B0c0d0e0f"])
        assert arguments.uuid == bytes(range(16))

    @pytest.mark.parametrize("text", ["defer", "tcp:127.0.0.1:0", "unix:/x,y", "exec:cat a=b,c=d", "fd:5"])
    def test_incoming(self, text):
        assert parse([*BASE, "-incoming", text]).incoming == text

    def test_the_last_incoming_wins(self):
        assert parse([*BASE, "-incoming", "defer", "-incoming", "unix:/x"]).incoming == "unix:/x"

    def test_actions(self):
        assert parse(BASE).actions == Actions("reset", "poweroff", "shutdown", "reset")
        assert parse([*BASE, "-no-reboot", "-no-shutdown"]).actions == Actions("shutdown", "pause")
        told = parse([*BASE, "-action", "reboot=shutdown,shutdown=pause", "-action", "panic=none,watchdog=pause"])
        assert told.actions == Actions("shutdown", "pause", "none", "pause")

    def test_what_the_process_does_to_itself(self):
        assert parse([*BASE, "-run-with", "exit-with-parent=on"]).run_with == RunWith(True)
        assert parse([*BASE, "-run-with", "async-teardown=on,user=1:2,chroot=/x"]).run_with == RunWith(False, "/x", "1:2")

    @pytest.mark.parametrize(
        ("name", "wire_name", "split"),
        [
            ("q35", "qemumig-q35", (0xB0000000, 2 << 30)),
            ("pc-q35-10.0,", "qemumig-q35", (0xB0000000, 2 << 30)),
            ("pc", "qemumig-i440fx", (0xE0000000, 3 << 30)),
            ("microvm", "microvm", (3 << 30, 3 << 30)),
        ],
    )
    def test_machines_by_name_and_alias(self, name, wire_name, split):
        kind = parse(["-M", name, "-bios", "x"]).machine_type
        assert kind.wire_name == wire_name
        limit, low = split
        assert (kind.low_memory(limit - 1), kind.low_memory(limit)) == (limit - 1, low)

    def test_a_pc_needs_no_firmware_and_takes_a_disk_in_all_spellings(self):
        arguments = parse(["-M", "q35", "-hda", "a,b", "-drive", "file=c", "d"])
        assert [(drive.option, drive.text) for drive in arguments.drives] == [
            ("-hda a,b", "file=a,,b,if=ide,index=0,media=disk"),
            ("-drive file=c", "file=c"),
            ("d", "file=d,if=ide,index=0,media=disk"),
        ]

    def test_the_command_line_of_a_harness(self):
        words = "-qtest unix:/q -qtest-log /dev/null -chardev socket,path=/m,id=char0 -mon chardev=char0,mode=control"
        words += " -display none -audio none -run-with exit-with-parent=on -accel kvm -accel tcg -machine q35,"
        words += " -machine memory-backend=m -object memory-backend-ram,id=m,size=4M -name source,debug-threads=on"
        words += " -m 4M -serial file:/s -global migration.x-events=on -accel qtest"
        arguments = parse(words.split())
        assert (arguments.qtest, arguments.qtest_log) == ("unix:/q", "/dev/null")
        assert (arguments.machine_type.alias, arguments.memory_backend, arguments.runs_guest) == ("q35", "m", True)

    def test_things_that_are_so_anyway(self):
        words = "-vga none -audio none -net none -nic none -parallel none -monitor none -L /tmp -msg timestamp=on"
        assert parse([*BASE, *words.split()]).timestamps


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        ("-nosuch", ["-nosuch: invalid option"]),
        ("--nosuch", ["--nosuch: invalid option"]),
        ("-m", ["-m: requires an argument"]),
        ("-m 16,foo=1", ["-m 16,foo=1: Invalid parameter 'foo'"]),
        ("-m 16M,slots=2", ["slots specified but no max-size"]),
        (
            "-m 16M,maxmem=8M",
            [
                "invalid value of maxmem: maximum memory size (0x800000) must be at least "
                "the initial memory size (0x1000000)"
            ],
        ),
        ("-m -1", ["-m -1: Value '-1' is out of range for parameter 'size'"]),
        ("-smp 0", ["Invalid CPU topology: CPU topology parameters must be greater than zero"]),
        ("-smp x", ["Parameter 'smp.cpus' expects integer"]),
        ("-smp 2,foo=1", ["Parameter 'smp.foo' is unexpected"]),
        ("-smp 300", ["Invalid SMP CPUs 300. The max CPUs supported by machine 'microvm' is 255"]),
        (
            "-smp 4,maxcpus=2",
            ["Invalid CPU topology: maxcpus must be equal to or greater than smp: maxcpus (2) < smp_cpus (4)"],
        ),
        (
            "-smp 2,sockets=1,cores=3",
            ["Invalid CPU topology: product of the hierarchy must match maxcpus: sockets (1) * cores (3) != maxcpus (2)"],
        ),
        (
            "-cpu qemu64,pni=maybe",
            ["can't apply global qemu64-x86_64-cpu.pni=maybe: Parameter 'pni' expects 'on' or 'off'"],
        ),
        ("-enable-kvm", ['The -accel and "-machine accel=" options are incompatible']),
        ("-machine accel=kvm", ['The -accel and "-machine accel=" options are incompatible']),
        (
            "-M foo",
            ['unsupported machine type: "foo"', "Use -machine help to list supported machines"],
        ),
        ("-M microvm,acpi", ["-M microvm,acpi: Expected '=' after parameter 'acpi'"]),
        ("-machine =on", ["-machine =on: Invalid parameter ''"]),
        ("-machine foo=on", ["Property 'microvm-machine.foo' not found"]),
        ("-machine acpi=maybe", ["Parameter 'acpi' does not accept value 'maybe'"]),
        ("-machine isa-serial=2", ["Parameter 'isa-serial' expects 'on' or 'off'"]),
        ("-machine kernel-irqchip=off", ["KVM does not support userspace APIC"]),
        ("-machine memory-backend=nope", ["Memory backend 'nope' not found"]),
        ("-object foo,id=x", ["-object foo,id=x: Parameter 'qom-type' does not accept value 'foo'"]),
        ("-object memory-backend-ram", ["-object memory-backend-ram: Parameter 'id' is missing"]),
        ("-object memory-backend-ram,id=m", ["-object memory-backend-ram,id=m: Parameter 'size' is missing"]),
        (
            "-object memory-backend-ram,id=m,size=1M,foo=1",
            ["-object memory-backend-ram,id=m,size=1M,foo=1: Invalid parameter 'foo'"],
        ),
        (
            "-object memory-backend-ram,id=m,size=abc",
            ["-object memory-backend-ram,id=m,size=abc: Parameter 'size' expects a size value"],
        ),
        (
            "-object memory-backend-ram,id=m,size=1M,share=maybe",
            ["-object memory-backend-ram,id=m,size=1M,share=maybe: Parameter 'share' expects 'on' or 'off'"],
        ),
        (
            "-object memory-backend-file,id=m,size=1M",
            ["-object memory-backend-file,id=m,size=1M: Parameter 'mem-path' is missing"],
        ),
        (
            "-object memory-backend-ram,id=m,size=1M -object memory-backend-ram,id=m,size=1M",
            ["-object memory-backend-ram,id=m,size=1M: Duplicate ID 'm' for object"],
        ),
        ("-object {", ["-object {: JSON parse error, premature EOI"]),
        ("-object {]", ["-object {]: JSON parse error, expecting value"]),
        ("-mon mode=control", ["-mon mode=control: Parameter 'chardev' is missing"]),
        ("-mon c0,mode=foo", ["-mon c0,mode=foo: Parameter 'mode' does not accept value 'foo'"]),
        ("-mon c0,pretty=on", ["-mon c0,pretty=on: 'pretty' is not compatible with HMP monitors"]),
        ("-mon c0,mode=control,foo=1", ["-mon c0,mode=control,foo=1: Invalid parameter 'foo'"]),
        ("-incoming main", ["-incoming main: Parameter 'addr' is missing"]),
        ("-incoming {", ["-incoming {: JSON parse error, premature EOI"]),
        (
            "-incoming main,addr.transport=foo",
            ["-incoming main,addr.transport=foo: Parameter 'transport' does not accept value 'foo'"],
        ),
        (
            "-incoming cpr,addr.transport=exec,addr.args.0=x",
            ["-incoming cpr,addr.transport=exec,addr.args.0=x: channels of type 'cpr' are not built"],
        ),
        ("-incoming defer -loadvm x", ["'incoming' and 'loadvm' options are mutually exclusive"]),
        ("-loadvm x", ["no block device can store vmstate for snapshot"]),
        ("-run-with foo=1", ["-run-with foo=1: Invalid parameter 'foo'"]),
        ("-action panic=foo", ["-action panic=foo: Parameter 'panic' does not accept value 'foo'"]),
        ("-msg foo=on", ["-msg foo=on: Invalid parameter 'foo'"]),
        ("-boot order=z", ["Invalid boot device 'z'"]),
        ("-boot foo=z", ["Parameter 'boot.foo' is unexpected"]),
        ("-overcommit foo=1", ["-overcommit foo=1: Invalid parameter 'foo'"]),
        ("-add-fd set=1", ["-add-fd set=1: fd option is required and must be non-negative"]),
        ("-add-fd fd=1,set=1", ["-add-fd fd=1,set=1: fd cannot be a standard I/O stream"]),
        ("-object foo,id=m", ["-object foo,id=m: Parameter 'qom-type' does not accept value 'foo'"]),
        ("-object authz-list", ["-object authz-list: Parameter 'id' is missing"]),
        (
            "-object authz-list,id=a,rules.0.match=x",
            ["-object authz-list,id=a,rules.0.match=x: Invalid parameter 'rules.0.match'"],
        ),
        (
            "-object tls-creds-x509,id=t,dir=/x,verify-peer=maybe",
            ["-object tls-creds-x509,id=t,dir=/x,verify-peer=maybe: Parameter 'verify-peer' expects 'on' or 'off'"],
        ),
        (
            "-object authz-simple,id=a,identity=x -object authz-simple,id=a,identity=x",
            ["-object authz-simple,id=a,identity=x: Duplicate ID 'a' for object"],
        ),
        ("-incoming foo", ["-incoming foo: Parameter 'channel-type' does not accept value 'foo'"]),
        (
            "-incoming main,addr.transport=socket",
            ["-incoming main,addr.transport=socket: Parameter 'addr.type' is missing"],
        ),
        ("-name vm,bar=1", ["-name vm,bar=1: Invalid parameter 'bar'"]),
        ("-uuid xyz", ["-uuid xyz: failed to parse UUID string: wrong format"]),
        ("-display foo", ["-display foo: Parameter 'type' does not accept value 'foo'"]),
        ("-display none,foo=1", ["-display none,foo=1: Parameter 'foo' is unexpected"]),
        ("-vga foo", ["unknown vga type: foo"]),
        ("-audio foo", ["-audio foo: Parameter 'driver' does not accept value 'foo'"]),
        ("-action foo=x", ["-action foo=x: Invalid parameter 'foo'"]),
        ("-action shutdown=foo", ["-action shutdown=foo: Parameter 'shutdown' does not accept value 'foo'"]),
        ("-msg timestamp=maybe", ["-msg timestamp=maybe: Parameter 'timestamp' expects 'on' or 'off'"]),
        (
            "-global driver=migration",
            ["-global driver=migration: options 'driver', 'property', and 'value' are required"],
        ),
        ("-global foo", ["-global foo: Invalid parameter 'foo'"]),
        (
            "-global apic-common.vapic=maybe",
            ["can't apply global apic-common.vapic=maybe: Parameter 'vapic' expects 'on' or 'off'"],
        ),
        (
            "-global virtio-mmio.foo=1",
            ["can't apply global virtio-mmio.foo=1: Property 'virtio-mmio.foo' not found"],
        ),
        ("-serial null -serial null", ["-serial null: machine 'microvm' has one serial port here"]),
        ("-M isa-serial=off -serial stdio", ["-serial stdio: there is no serial port with isa-serial=off"]),
    ],
)
def test_a_mistake_is_named(argv, lines):
    assert refusal(*argv.split(" ")) == lines


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        (["-cpu", ""], ["-cpu option cannot be empty"]),
        (["-incoming", ""], ["-incoming : Parameter 'channel-type' is missing"]),
        (["-object", ""], ["-object : Parameter 'qom-type' is missing"]),
        (["-uuid", ""], ["-uuid : failed to parse UUID string: wrong format"]),
    ],
)
def test_empty_values_are_named(argv, lines):
    assert refusal(*argv) == lines


def test_an_id_that_is_no_identifier_is_explained():
    assert refusal("-object", "memory-backend-ram,id=0m,size=1M") == [
        "-object memory-backend-ram,id=0m,size=1M: Parameter 'id' expects an identifier",
        "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
    ]


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        (["-accel", "foo"], ["-accel foo: invalid accelerator foo"]),
        (["-accel", "tcg"], ["-accel tcg: guests run with KVM only here; use -accel kvm"]),
        (["-accel", "kvm,foo=1"], ["-accel kvm,foo=1: Property 'kvm-accel.foo' not found"]),
        (
            ["-accel", "kvm,kernel-irqchip=foo"],
            ["-accel kvm,kernel-irqchip=foo: Parameter 'kernel-irqchip' does not accept value 'foo'"],
        ),
        (
            ["-accel", "kvm,dirty-ring-size=4096", "-accel", "tcg", "-accel", "qtest"],
            [
                "-accel kvm,dirty-ring-size=4096: dirty-ring-size: the dirty ring is not available yet; "
                "leave it out or say 0"
            ],
        ),
        (
            ["-accel", "kvm,dirty-ring-size=3"],
            ["-accel kvm,dirty-ring-size=3: dirty-ring-size must be a power of two."],
        ),
        (
            ["-accel", "kvm,dirty-ring-size=16"],
            [
                "-accel kvm,dirty-ring-size=16: Enabling of KVM dirty ring failed: Invalid argument. "
                "Suggested minimum value is 1024.",
                "-accel kvm,dirty-ring-size=16: failed to initialize kvm: Input/output error",
            ],
        ),
        (
            ["-accel", "kvm,dirty-ring-size=131072"],
            [
                "-accel kvm,dirty-ring-size=131072: KVM dirty ring size 131072 too big (maximum is 65536).  "
                "Please use a smaller value.",
                "-accel kvm,dirty-ring-size=131072: failed to initialize kvm: Invalid argument",
            ],
        ),
        (
            ["-accel", "kvm,dirty-ring-size=x"],
            ["-accel kvm,dirty-ring-size=x: Parameter 'dirty-ring-size' expects uint64"],
        ),
        (
            ["-accel", "kvm,dirty-ring-size=-1", "-accel", "qtest"],
            ["-accel kvm,dirty-ring-size=-1: Parameter 'dirty-ring-size' expects uint32_t"],
        ),
        (["-accel", "qtest,foo=1"], ["-accel qtest,foo=1: Property 'qtest-accel.foo' not found"]),
        (["-M", "accel=foo:bar"], ["invalid accelerator foo", "invalid accelerator bar"]),
    ],
)
def test_accelerators_that_cannot_be_are_told_why(argv, lines):
    with pytest.raises(UsageError) as caught:
        parse(["-bios", "x", *argv])
    assert list(caught.value.messages) == lines


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("-M none -smp 2", "Invalid SMP CPUs 2. The max CPUs supported by machine 'none' is 1"),
        ("-M q35,foo=on", "Property 'pc-q35-10.0-machine.foo' not found"),
        ("-M q35,acpi=auto", "Parameter 'acpi' expects 'on' or 'off'"),
        ("-M pc-q35-9.9", 'unsupported machine type: "pc-q35-9.9"'),
    ],
)
def test_what_another_machine_has_not(argv, line):
    with pytest.raises(UsageError) as caught:
        parse(argv.split())
    assert list(caught.value.messages) == [line]


def test_firmware_is_needed():
    with pytest.raises(UsageError, match="-bios FILE"):
        parse(["-M", "microvm"])


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ("-help", "usage: qemumig-system"),
        ("-h", "usage: qemumig-system"),
        ("-version", "QEMU emulator version 10.0.0 (qemumig 0.1.0)"),
        ("-M help", "microvm"),
        ("-M microvm,help", "kernel-irqchip"),
        ("-cpu help", "qemu64"),
        ("-accel help", "kvm"),
        ("-object help", "tls-creds-x509"),
        ("-object authz-list,help", "policy="),
        ("-M help", "not QEMU's device model"),
        ("-M q35,help", "memory-backend"),
    ],
)
def test_help_in_its_places(argv, text):
    with pytest.raises(HelpRequested) as caught:
        parse(argv.split())
    assert text in str(caught.value)


def test_help_names_every_option_that_does_something():
    text = help_text()
    for option in OPTIONS.values():
        assert not option.help or f"\n-{option.name}" in text


@pytest.mark.parametrize("name", CPU_MODELS)
def test_the_models_in_the_help_exist(name):
    assert CpuModel(name, {}, []).name == name


@given(st.lists(st.sampled_from([f"-{name}" for name in OPTIONS]) | st.text(max_size=8), max_size=6))
def test_no_command_line_breaks_the_parser(words):
    try:
        parse(words)
    except (UsageError, HelpRequested) as said:
        assert str(said)
