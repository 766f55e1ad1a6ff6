import errno
from collections.abc import Callable, Iterator

import pytest

from kvm import Kvm, KvmError, Vm
from kvm.ioctls import Cap
from kvm.memory import HostMemory
from kvm.structs import (
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_MEM_LOG_DIRTY_PAGES,
    kvm_irq_routing_entry,
    kvm_irqchip,
)

from .machines import needs_kvm

pytestmark = needs_kvm


@pytest.fixture
def vm() -> Iterator[Vm]:
    with Kvm() as kvm, kvm.create_vm() as made:
        yield made


@pytest.fixture
def memory() -> Iterator[HostMemory]:
    with HostMemory.anonymous(0x10000) as made:
        yield made


def test_vm_outlives_the_device() -> None:
    kvm = Kvm()
    with kvm.create_vm() as vm:
        kvm.close()
        assert vm.check_extension(Cap.KVM_CAP_USER_MEMORY) == 1


def test_slot_is_known_with_its_addresses(vm: Vm, memory: HostMemory) -> None:
    vm.set_memory_slot(3, 0x100000, memory.size, memory.host_address)
    slot = vm.slots[3]
    assert (slot.guest_address, slot.size, slot.host_address) == (0x100000, 0x10000, memory.host_address)
    assert (slot.pages, slot.flags) == (16, 0)


def test_flags_change_and_nothing_else_does(vm: Vm, memory: HostMemory) -> None:
    vm.set_memory_slot(0, 0, memory.size, memory.host_address)
    before = vm.slots[0]
    vm.set_slot_flags(0, KVM_MEM_LOG_DIRTY_PAGES)
    assert vm.slots[0].flags == KVM_MEM_LOG_DIRTY_PAGES
    vm.set_slot_flags(0, 0)
    assert vm.slots[0] == before


def test_overlapping_slot_is_refused_and_not_remembered(vm: Vm, memory: HostMemory) -> None:
    vm.set_memory_slot(0, 0, memory.size, memory.host_address)
    with pytest.raises(KvmError, match=r"KVM_SET_USER_MEMORY_REGION \(slot 1: 0x1000 bytes at 0x2000\)"):
        vm.set_memory_slot(1, 0x2000, 0x1000, memory.host_address)
    assert list(vm.slots) == [0]


def test_deleted_slot_makes_room(vm: Vm, memory: HostMemory) -> None:
    vm.set_memory_slot(0, 0, memory.size, memory.host_address)
    vm.delete_memory_slot(0)
    vm.set_memory_slot(1, 0x2000, 0x1000, memory.host_address)
    assert list(vm.slots) == [1]


@pytest.mark.parametrize("values", [(0x10, 0x1000, 0), (0, 0x1800, 0), (0, 0x1000, 8), (0, 0, 0)])
def test_slot_that_is_not_whole_pages_is_refused(vm: Vm, values: tuple[int, int, int]) -> None:
    with pytest.raises(KvmError, match="whole pages of 4096"):
        vm.set_memory_slot(0, *values)


def test_unknown_slot_is_named_with_those_that_exist(vm: Vm, memory: HostMemory) -> None:
    vm.set_memory_slot(2, 0, memory.size, memory.host_address)
    with pytest.raises(KvmError, match=r"slot 7, known are \[2\]"):
        vm.set_slot_flags(7, 0)


def test_irqchip_state_comes_back(vm: Vm) -> None:
    vm.create_irqchip()
    chip = vm.get_irqchip(KVM_IRQCHIP_IOAPIC)
    assert chip.chip.ioapic.base_address == 0xFEC00000
    chip.chip.ioapic.redirtbl[5].bits = 0x0000_0000_0001_0035
    vm.set_irqchip(chip)
    assert vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.redirtbl[5].bits == 0x10035
    assert vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER).chip_id == KVM_IRQCHIP_PIC_MASTER


def test_unknown_chip_is_named(vm: Vm) -> None:
    vm.create_irqchip()
    with pytest.raises(KvmError, match=r"KVM_GET_IRQCHIP \(chip 9\)"):
        vm.get_irqchip(9)


def test_line_reaches_the_pin_it_is_routed_to(vm: Vm) -> None:
    vm.create_irqchip()
    route = kvm_irq_routing_entry(gsi=4, type=KVM_IRQ_ROUTING_IRQCHIP)
    route.u.irqchip.irqchip, route.u.irqchip.pin = KVM_IRQCHIP_IOAPIC, 9
    vm.set_gsi_routing([route])
    vm.irq_line(4, 1)
    assert vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.irr == 1 << 9


def test_split_irqchip_leaves_the_ioapic_to_us(vm: Vm) -> None:
    vm.split_irqchip(24)
    vm.set_gsi_routing([])
    vm.create_vcpu(0).get_lapic()
    with pytest.raises(KvmError, match="KVM_GET_IRQCHIP"):
        vm.get_irqchip(KVM_IRQCHIP_IOAPIC)


def test_clock_goes_on_from_where_it_is_set(vm: Vm) -> None:
    hour = 3_600_000_000_000
    vm.set_clock(hour)
    assert hour <= vm.get_clock().clock < 2 * hour


def test_refused_capability_is_named(vm: Vm) -> None:
    with pytest.raises(KvmError, match=r"KVM_ENABLE_CAP \(KVM_CAP_IRQCHIP\)") as caught:
        vm.enable_cap(Cap.KVM_CAP_IRQCHIP)
    assert caught.value.errno == errno.EINVAL


def test_addresses_that_kvm_keeps_are_set_once_before_the_vcpus(vm: Vm) -> None:
    vm.set_identity_map_address(0xFEFFC000)
    vm.set_tss_address(0xFEFFD000)
    vm.create_vcpu(0)
    with pytest.raises(KvmError, match=r"KVM_SET_IDENTITY_MAP_ADDR \(0xfeffc000\)"):
        vm.set_identity_map_address(0xFEFFC000)


def test_closing_takes_the_vcpus_along_and_may_be_repeated(vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    vm.close()
    vm.close()
    assert (vm.fd, vcpu.fd) == (-1, -1)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("KVM_CHECK_EXTENSION (KVM_CAP_IRQCHIP)", lambda vm: vm.check_extension(Cap.KVM_CAP_IRQCHIP)),
        ("KVM_ENABLE_CAP (KVM_CAP_X2APIC_API)", lambda vm: vm.enable_cap(Cap.KVM_CAP_X2APIC_API, 1)),
        ("KVM_ENABLE_CAP (KVM_CAP_SPLIT_IRQCHIP)", lambda vm: vm.split_irqchip(24)),
        ("KVM_SET_IDENTITY_MAP_ADDR (0xfeffc000)", lambda vm: vm.set_identity_map_address(0xFEFFC000)),
        ("KVM_SET_TSS_ADDR (0xfeffd000)", lambda vm: vm.set_tss_address(0xFEFFD000)),
        ("KVM_CREATE_IRQCHIP", Vm.create_irqchip),
        ("KVM_GET_IRQCHIP (chip 2)", lambda vm: vm.get_irqchip(2)),
        ("KVM_SET_IRQCHIP (chip 2)", lambda vm: vm.set_irqchip(kvm_irqchip(chip_id=2))),
        ("KVM_SET_GSI_ROUTING (1 routes)", lambda vm: vm.set_gsi_routing([kvm_irq_routing_entry()])),
        ("KVM_IRQ_LINE (GSI 4)", lambda vm: vm.irq_line(4, 1)),
        ("KVM_GET_CLOCK", Vm.get_clock),
        ("KVM_SET_CLOCK (5 ns)", lambda vm: vm.set_clock(5)),
        (
            "KVM_SET_USER_MEMORY_REGION (slot 0: 0x1000 bytes at 0x2000)",
            lambda vm: vm.set_memory_slot(0, 0x2000, 0x1000, 0x10000),
        ),
        ("KVM_SET_USER_MEMORY_REGION (slot 0: 0x0 bytes at 0x0)", lambda vm: vm.delete_memory_slot(0)),
        ("KVM_CREATE_VCPU (vCPU 3)", lambda vm: vm.create_vcpu(3)),
    ],
)
def test_dead_descriptor_names_the_request(vm: Vm, name: str, use: Callable[[Vm], object]) -> None:
    vm.close()
    with pytest.raises(KvmError) as caught:
        use(vm)
    assert str(caught.value) == f"[Errno 9] {name}: Bad file descriptor"
