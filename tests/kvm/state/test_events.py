from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from kvm.state.events import events_of, take_events
from kvm.structs import kvm_vcpu_events
from qemumig.savevm.devices.cpu_state import CpuState, ExceptionInfo

HOST = SimpleNamespace(has_smm=False, has_payload=True, has_triple_fault=True)
PLAIN_HOST = SimpleNamespace(has_smm=False, has_payload=False, has_triple_fault=False)
PAGE_FAULT, DEBUG, UNDEFINED, GENERAL = 14, 1, 6, 13


def events(**parts: dict) -> kvm_vcpu_events:
    """Events with fields of their parts: events(nmi={"masked": 1})."""
    result = kvm_vcpu_events()
    for name, fields in parts.items():
        for field, value in fields.items():
            setattr(getattr(result, name), field, value)
    return result


def taken(source: kvm_vcpu_events, **state: object) -> CpuState:
    cpu = CpuState(**state)  # type: ignore[arg-type]
    take_events(cpu, source)
    return cpu


def test_nothing_under_way_is_minus_one_and_not_vector_zero() -> None:
    cpu = taken(events())
    assert (cpu.exception_nr, cpu.interrupt_injected, cpu.hflags2) == (-1, -1, 0x101)
    back = events_of(cpu, HOST)  # type: ignore[arg-type]
    assert (back.exception.injected, back.interrupt.injected, back.flags) == (0, 0, 0x31)


def test_vector_zero_is_a_vector() -> None:
    cpu = taken(events(exception={"injected": 1, "nr": 0}, interrupt={"injected": 1, "nr": 0}))
    assert (cpu.exception_nr, cpu.interrupt_injected) == (0, 0)
    back = events_of(cpu, HOST)  # type: ignore[arg-type]
    assert (back.exception.injected, back.exception.nr, back.interrupt.injected, back.interrupt.nr) == (1, 0, 1, 0)


def test_interrupts_and_nmis_come_back() -> None:
    source = events(interrupt={"injected": 1, "nr": 64, "soft": 1}, nmi={"injected": 1, "pending": 1, "masked": 1})
    back = events_of(taken(source), HOST)  # type: ignore[arg-type]
    assert bytes(back.interrupt) == bytes(source.interrupt)
    assert bytes(back.nmi) == bytes(source.nmi)


def test_a_pending_exception_is_injected_at_the_destination() -> None:
    cpu = taken(events(exception={"pending": 1, "nr": UNDEFINED}))
    back = events_of(cpu, HOST)  # type: ignore[arg-type]
    assert (cpu.exception_nr, back.exception.injected, back.exception.pending) == (UNDEFINED, 1, 0)


@pytest.mark.parametrize("state", ["injected", "pending"])
def test_a_fault_with_an_error_code_is_left_for_its_instruction_to_raise_again(state: str) -> None:
    cpu = taken(events(exception={state: 1, "nr": GENERAL, "has_error_code": 1, "error_code": 0x10}))
    assert (cpu.exception_nr, cpu.has_error_code) == (-1, 0)


def test_error_code_zero_needs_no_help() -> None:
    cpu = taken(events(exception={"injected": 1, "nr": GENERAL, "has_error_code": 1, "error_code": 0}))
    assert (cpu.exception_nr, cpu.has_error_code) == (GENERAL, 1)


def test_an_error_code_that_newer_senders_give_is_used() -> None:
    cpu = CpuState(exception_nr=GENERAL, has_error_code=1, error_code=0x10)
    assert events_of(cpu, HOST).exception.error_code == 0x10  # type: ignore[arg-type]


def test_the_address_of_a_pending_page_fault_is_in_cr2_already() -> None:
    source = events(exception={"pending": 1, "nr": PAGE_FAULT, "has_error_code": 1, "error_code": 2})
    source.exception_has_payload, source.exception_payload = 1, 0xDEADB000
    assert taken(source).cr2 == 0xDEADB000


def test_a_pending_debug_trap_is_in_dr6_already() -> None:
    source = events(exception={"pending": 1, "nr": DEBUG})
    source.exception_has_payload, source.exception_payload = 1, 1 << 14
    cpu = taken(source, dr=[0, 0, 0, 0, 0xFFFF0FFF, 0x2402, 0xFFFF0FFF, 0x2402])
    assert cpu.dr[4:] == [0xFFFF4FF0, 0x402, 0xFFFF4FF0, 0x402]
    assert cpu.exception_nr == DEBUG


def test_the_start_up_vector_is_loaded_only_by_who_waits_for_it() -> None:
    assert not events_of(CpuState(sipi_vector=0xF1), HOST).flags & 2  # type: ignore[arg-type]
    back = events_of(CpuState(sipi_vector=0xF1, mp_state=4), HOST)  # type: ignore[arg-type]
    assert (back.flags & 2, back.sipi_vector) == (2, 0xF1)


def test_a_pending_triple_fault_comes_back() -> None:
    source = events(triple_fault={"pending": 1})
    source.flags = 0x20
    cpu = taken(source)
    assert cpu.triple_fault == 1
    assert events_of(cpu, HOST).triple_fault.pending == 1  # type: ignore[arg-type]


def test_flags_name_only_what_kvm_was_told_of() -> None:
    info = ExceptionInfo(1, 0, 1, 0x5000)
    cpu = CpuState(exception_nr=PAGE_FAULT, exception_info=info, triple_fault=1)
    assert events_of(cpu, PLAIN_HOST).flags == 1  # type: ignore[arg-type]
    back = events_of(cpu, HOST)  # type: ignore[arg-type]
    assert (back.exception.pending, back.exception.injected) == (1, 0)
    assert (back.exception_has_payload, back.exception_payload) == (1, 0x5000)


def test_events_that_kvm_holds_survive_a_round_trip() -> None:
    source = events(interrupt={"injected": 1, "nr": 65}, nmi={"pending": 1})
    cpu = taken(source)
    assert taken(events_of(cpu, HOST)) == dataclasses.replace(cpu, triple_fault=0)  # type: ignore[arg-type]
