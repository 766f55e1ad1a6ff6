"""The same lines to a real QEMU's human monitor and to ours, and the two transcripts compared (hmp.md).

The lines go through human-monitor-command: no echo, no prompt.  QEMU's texts change between versions; ours are those of
10.0.  A line says where it is the same: `7+` everywhere, `10+` in 10 and later, `-10` up to 10, `10` only there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.support.host import qemumig_system
from tests.support.vmm import MIB, Stage, Vmm, wait_until

pytestmark = [pytest.mark.needs("kvm", "qemu"), pytest.mark.usefixtures("no_leaks")]

GENERAL = r"""
-10 info status
7+ info name
7+ info uuid
7+ info kvm
-10 info cpus
7+ info history
7+ info nosuch
7+ info/bar
7+ info  nosuch/x y
7+ info status extra
7+  info  status x
7+ infostatus
7+ help nosuch
7+ help  nosuch x
7+ help info  nosuch
7+ foo
7+   foo bar
7+ foo/bar
7+ a ; b
7+ /
7+ "stop"
7+ STOP
7+ stop x
7+ s x
7+ stop/x
7+ c x
7+ q x
7+ system_reset x
7+ system_powerdown
7+ system_wakeup
7+ cpu
7+ cpu 1
7+ cpu 0x1
7+ cpu 1+0
7+ cpu 2
7+ cpu -1
7+ cpu 4294967296
7+ cpu a
-10 info cpus
7+ cont
7+ stop
7+ info status
7+ system_reset
-10 info status
7+ cont
7+ info status
7+ stop
"""

NUMBERS = r"""
7+ print/x 1+2*3
7+ print 5|1&2+3
7+ print/d 7%4*2
7+ print -5/2
7+ p/x ~0
7+ p --1
7+ p (1+2) * 3
7+ p ((((((((((1))))))))))
7+ p 017
7+ p 'A'
7+ p -1
7+ p/u -1
7+ p/o 8
7+ p/o -1
7+ p/c 10
7+ p/c 39
7+ p/c 92
7+ p/c 127
7+ p/c 256
7+ p/i 4
7+ p/x 0
7+ p 08
7+ p 0x
7+ p 1k
7+ p 1.5
7+ p 1<<4
7+ p 1 2
7+ p 1)
7+ p (
7+ p ()
7+ p 3*
7+ p "
7+ p '
7+ p 'A
7+ p 'AB'
7+ p foo
7+ p 7/0
7+ p 7%0
7+ p 99999999999999999999
7+ p 0x1ffffffffffffffff
7+ p $nosuch
7+ p
7+ p/z 1
7+ p/x1 1
7+ x
7+ xp/
7+ xp/3
7+ xp/1 x 0
7+ xp/-1x 0
7+ xp/1x 0 0
7+ xp/1x (1+2
7+ x/0x 0
"""

MEMORY = (
    "".join(
        f"-10 xp/5{letter}{size} {address}\n"
        for letter in "xduoc"
        for size in "bhwg"
        for address in ("0xffff0000", "0xfffffff0", "0x2000")
    )
    + """
-10 xp/20xh 0xffff0000
-10 xp 0xffff0010
-10 xp /1xb 0xfffffff0
-10 xp/1x 0x10000+0x20*2
-10 xp/20xb 0xfffffff0
-10 xp/4xb 0x3fffffe
-10 xp/4xb 0xd0000000
-10 xp/4xb -1
-10 xp/4xb 0xfeb00ffe
7+ x/8xb 0x1000
7+ x/8xw 0x2000
7+ x/40xb 0x1ff0
"""
)

MIGRATION = r"""
-10 info migrate
-10 info migrate -a
7+ info migrate foo
10 info migrate_parameters
10 info migrate_capabilities
7+ migrate
7+ migrate -x
7+ migrate --
7+ migrate -d
7+ migrate -d -d u
7+ migrate -r -d u
7+ migrate -dr u
7+ migrate -d "abc
7+ migrate -d "a"b
7+ migrate -d "tcp:127.0.0.1:1" extra
7+ migrate u -d
10+ migrate -d foo:1
10+ migrate -d tcp
7+ migrate -d tcp:x
7+ migrate -d unix:
7+ migrate -d fd:foo
10+ migrate -d file:/nonexistent/x
7+ migrate -d -r tcp:127.0.0.1:1
7+ migrate_cancel
7+ migrate_cancel x
7+ migrate_continue
7+ migrate_continue foo
7+ migrate_continue ""
7+ migrate_continue "a\"b"
7+ migrate_continue "a\nb"
7+ migrate_continue "a\qb"
7+ migrate_continue a"b
7+ migrate_continue 'a'
7+ migrate_incoming
7+ migrate_incoming tcp:127.0.0.1:1
7+ migrate_set_capability
7+ migrate_set_capability xbzrle
7+ migrate_set_capability foo on
7+ migrate_set_capability xbzrle maybe
7+ migrate_set_capability events ON
7+ migrate_set_capability xbzrle on x
7+ migrate_set_capability "events" on
7+ migrate_set_capability events off
7+ migrate_set_capability postcopy-preempt on
7+ migrate_set_parameter
7+ migrate_set_parameter downtime-limit
7+ migrate_set_parameter foo 1
7+ migrate_set_parameter downtime_limit 300
7+ migrate_set_parameter downtime-limit q
7+ migrate_set_parameter downtime-limit 10x
7+ migrate_set_parameter downtime-limit 1.5
7+ migrate_set_parameter downtime-limit ""
10+ migrate_set_parameter downtime-limit -1
7+ migrate_set_parameter downtime-limit 18446744073709551616
-10 migrate_set_parameter downtime-limit 2000001
7+ migrate_set_parameter downtime-limit 1.5k
7+ migrate_set_parameter announce-max 1k
7+ migrate_set_parameter announce-rounds 0x3
-10 migrate_set_parameter announce-initial 100001
-10 migrate_set_parameter announce-step 0
7+ migrate_set_parameter max-bandwidth 10q
7+ migrate_set_parameter max-bandwidth -1
7+ migrate_set_parameter max-bandwidth 1e3
7+ migrate_set_parameter max-bandwidth 1kk
7+ migrate_set_parameter max-bandwidth 8E
7+ migrate_set_parameter max-bandwidth 8796093022208
7+ migrate_set_parameter max-bandwidth 99999999999999999999
-10 migrate_set_parameter max-bandwidth 1 2
10+ migrate_set_parameter max-bandwidth 0x1k
10+ migrate_set_parameter avail-switchover-bandwidth 1.3
7+ migrate_set_parameter multifd-channels 300
-10 migrate_set_parameter multifd-channels 0
7+ migrate_set_parameter multifd-channels -1
7+ migrate_set_parameter multifd-channels abc
7+ migrate_set_parameter multifd-channels 1k
7+ migrate_set_parameter multifd-channels 1.0
7+ migrate_set_parameter multifd-channels 99999999999999999999999
7+ migrate_set_parameter multifd-channels ""
7+ migrate_set_parameter x-checkpoint-delay 4294967296
7+ migrate_set_parameter x-checkpoint-delay 1k
7+ migrate_set_parameter cpu-throttle-tailslow foo
7+ migrate_set_parameter cpu-throttle-tailslow ON
7+ migrate_set_parameter cpu-throttle-tailslow 1
-10 migrate_set_parameter cpu-throttle-initial 100
-10 migrate_set_parameter max-cpu-throttle 10
7+ migrate_set_parameter multifd-compression foo
7+ migrate_set_parameter multifd-compression qpl
10 migrate_set_parameter multifd-zlib-level 10
10+ migrate_set_parameter mode foo
-10 migrate_set_parameter xbzrle-cache-size 100
10 migrate_set_parameter vcpu-dirty-limit 0
10 migrate_set_parameter x-vcpu-dirty-limit-period 2000
7+ migrate_set_parameter block-bitmap-mapping foo
7+ migrate_set_parameter max-bandwidth 1b
10 info migrate_parameters
7+ migrate_set_parameter max-bandwidth 1.3
10 info migrate_parameters
7+ migrate_set_parameter max-bandwidth 7E
7+ migrate_set_parameter max-bandwidth 0
10 info migrate_parameters
7+ announce_self
7+ announce_self a b
7+ announce_self a b c
7+ client_migrate_info
7+ client_migrate_info spice
7+ client_migrate_info vnc h
7+ client_migrate_info spice h 1
7+ client_migrate_info spice h x
7+ client_migrate_info spice h 1 2 s t
"""

SCRIPTS = {"general": GENERAL, "numbers": NUMBERS, "memory": MEMORY, "migration": MIGRATION}

# What differs for a reason: whose threads they are, and the defaults in which ours is not QEMU's.
NORMAL = (
    (re.compile(r"thread_id=\d+"), "thread_id=N"),
    (re.compile(r"^(send-switchover-start|decompress-error-check|return-path): \w+", re.MULTILINE), "DEFAULT"),
    (re.compile(r"^clear-bitmap-shift: \d+", re.MULTILINE), "clear-bitmap-shift: N"),
)


def normal(text: str) -> str:
    for pattern, replacement in NORMAL:
        text = pattern.sub(replacement, text)
    return text


def lines_for(script: str, major: int) -> Iterator[tuple[str, bool]]:
    """Each line, and whether that version answers it as ours does."""
    for entry in filter(None, script.splitlines()):
        where, _, line = entry.partition(" ")
        low, high = {"7+": (7, 99), "10+": (10, 99), "-10": (7, 10), "10": (10, 10)}[where]
        yield line, low <= major <= high


def human(vmm: Vmm, line: str) -> str:
    printed: str = vmm.command("human-monitor-command", command_line=line)
    return printed


def major_version(vmm: Vmm) -> int:
    major: int = vmm.command("query-version")["qemu"]["major"]
    return major


@pytest.mark.parametrize("script", list(SCRIPTS))
def test_both_print_the_same(stage: Stage, qemu: str, script: str) -> None:
    theirs = stage.vmm("theirs", qemu, memory=64 * MIB, stopped=True, unlimited=False)
    ours = stage.vmm("ours", qemumig_system(), memory=64 * MIB, stopped=True, unlimited=False)
    differences = []
    for line, comparable in lines_for(SCRIPTS[script], major_version(theirs)):
        expected, found = normal(human(theirs, line)), normal(human(ours, line))
        if comparable and found != expected:
            differences.append(f"{line!r}\n  QEMU {expected!r}\n  ours {found!r}")
    assert not differences, "\n".join(differences)


def test_a_line_for_another_cpu_is_the_same(stage: Stage, qemu: str) -> None:
    """`*` marks the CPU that cpu-index names."""
    transcripts = []
    for name, system in (("theirs", qemu), ("ours", qemumig_system())):
        vmm = stage.vmm(name, system, memory=64 * MIB, stopped=True, extra=("-smp", "2"))
        printed = vmm.command("human-monitor-command", command_line="info cpus", cpu_index=1)
        transcripts.append(re.sub(r" thread_id=\d+( model=\w+)?", "", printed))
    assert transcripts[0] == transcripts[1] == "  CPU #0:\r\n* CPU #1:\r\n"


# ---- info migrate, before, during and after a migration ----

NUMBER = re.compile(r"\d+(\.\d+)?")
OPTIONAL = re.compile(r"^(dirty pages rate|precopy ram|downtime ram): .*\r\n", re.MULTILINE)  # only when not 0
ONCE = re.compile(r"^(skipped|decompress-error-check|send-switchover-start): .*\r\n", re.MULTILINE)  # of some versions


def shape_of(printed: str) -> str:
    """The words of `info migrate` without its numbers."""
    text = ONCE.sub("", OPTIONAL.sub("", printed))
    return NUMBER.sub("N", re.sub(r"unix:\S+", "unix:PLACE", text))


def stages(stage: Stage, name: str, system: str) -> tuple[int, list[str]]:
    """The major version, and what `info migrate` prints at each stage of two migrations, the first one cancelled."""
    source = stage.vmm(f"{name}-source", system, memory=64 * MIB, unlimited=False)
    first = stage.vmm(f"{name}-first", system, memory=64 * MIB, incoming=True)
    printed = [human(source, "info migrate"), human(first, "info migrate")]

    def migrate_to(destination: Vmm, status: str) -> None:
        path = stage.directory / f"{destination.name}.sock"
        human(destination, f"migrate_incoming unix:{path}")
        assert human(source, f"migrate -d unix:{path}") == ""
        wait_for(status)

    def wait_for(status: str) -> None:
        def is_there() -> bool:
            report = source.command("query-migrate")
            assert report.get("status") != "failed", report
            return bool(report.get("status") == status)

        wait_until(is_there, f"{source.name}: migration to be {status}")
        printed.append(human(source, "info migrate"))

    human(source, "migrate_set_parameter max-bandwidth 64k")
    migrate_to(first, "active")
    human(source, "migrate_cancel")
    wait_for("cancelled")
    human(source, "migrate_set_parameter max-bandwidth 0")
    second = stage.vmm(f"{name}-second", system, memory=64 * MIB, incoming=True)
    migrate_to(second, "completed")
    second.wait_runstate("running")
    printed.append(human(second, "info migrate"))
    return major_version(source), printed


def test_info_migrate_has_the_same_lines_at_every_stage(stage: Stage, qemu: str) -> None:
    """Later QEMUs than 10.0 have another layout: of theirs only the status is compared."""
    major, theirs = stages(stage, "theirs", qemu)
    _, ours = stages(stage, "ours", qemumig_system())
    for expected, found in zip(theirs, ours, strict=True):
        if major <= 10:
            assert shape_of(found) == shape_of(expected)
        else:
            assert re.findall(r"[sS]tatus:\s*(\w+)", found) == re.findall(r"Status:\s*(\w+)", expected)
