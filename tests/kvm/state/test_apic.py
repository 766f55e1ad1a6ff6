from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvm.state.apic import apic_of, lapic_of, load_apic, save_apic
from kvm.system import Kvm
from kvm.vcpu import Vcpu
from qemumig.errors import MachineError
from qemumig.savevm.devices.apic import ApicState

IN_USE = ApicState(
    apicbase=0xFEE00900,
    id=0,
    tpr=0x30,
    spurious_vec=0x1FF,
    log_dest=0x02,
    dest_mode=0xF,
    isr=[0, 0, 1, 0, 0, 0, 0, 0],
    tmr=[0, 0, 0, 0, 4, 0, 0, 0],
    irr=[0, 0, 0, 8, 0, 0, 0, 0],
    lvt=[0x10040, 0x10000, 0x10000, 0x10700, 0x400, 0x10000],
    esr=0,
    icr=[0xC46F1, 0x01000000],
    divide_conf=0xB,
    count_shift=0,
    initial_count=10_000_000,
)


def test_registers_are_sixteen_bytes_apart() -> None:
    page = bytes(lapic_of(IN_USE).regs)
    word = {at: int.from_bytes(page[at : at + 4], "little") for at in range(0, 0x400, 16)}
    assert (word[0x80], word[0xD0], word[0xE0], word[0xF0]) == (0x30, 0x02000000, 0xFFFFFFFF, 0x1FF)
    assert (word[0x120], word[0x1C0], word[0x230]) == (1, 4, 8)
    assert (word[0x300], word[0x310], word[0x320], word[0x360]) == (0xC46F1, 0x01000000, 0x10040, 0x400)
    assert (word[0x380], word[0x3E0]) == (10_000_000, 0xB)
    assert sum(word.values()) == sum(word[at] for at in word if at not in (0x30, 0x390))


def test_the_record_survives_the_register_page() -> None:
    assert apic_of(lapic_of(IN_USE), IN_USE.apicbase) == IN_USE


def test_no_timer_is_claimed_outside_of_kvm() -> None:
    again = apic_of(lapic_of(IN_USE), IN_USE.apicbase)
    assert (again.initial_count_load_time, again.next_time, again.timer_expiry) == (0, 0, -1)


@pytest.fixture
def vcpu() -> Iterator[Vcpu]:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        yield vm.create_vcpu(0)


@pytest.mark.needs("kvm")
def test_kvm_gives_back_what_it_was_given(vcpu: Vcpu) -> None:
    load_apic(vcpu, IN_USE)
    assert save_apic(vcpu) == IN_USE


@pytest.mark.needs("kvm")
def test_the_priority_of_the_task_reaches_cr8(vcpu: Vcpu) -> None:
    load_apic(vcpu, IN_USE)
    assert vcpu.get_sregs().cr8 == 3


@pytest.mark.needs("kvm")
def test_a_base_that_kvm_refuses_is_named(vcpu: Vcpu) -> None:
    with pytest.raises(MachineError, match=r"vCPU 0: setting the local APIC .*base 0xfee00fff.*MSR 0x1b"):
        load_apic(vcpu, ApicState(apicbase=0xFEE00FFF))
