from __future__ import annotations

import pytest

from kvm.state.errors import UnsupportedStateError
from kvm.state.msrs import ALWAYS_THERE, MACHINE_CHECK_BANKS, deadline_of, feature_control_of, indices, msrs_of, take_msrs
from qemumig.savevm.devices.cpu_state import CpuState

HOST = frozenset({0x10, 0x11, 0x12, 0x17A, 0x17B, 0x1A0, 0x6E0, 0x174, 0x277, 0xC0000081, 0x4B564D05})
OFFERED = HOST | ALWAYS_THERE | frozenset(MACHINE_CHECK_BANKS)


def test_every_register_that_is_read_goes_to_its_attribute_and_back() -> None:
    values = {index: 0x100 + number for number, index in enumerate(indices(OFFERED))}
    cpu = CpuState()
    take_msrs(cpu, values, 52)
    written = dict(msrs_of(cpu, OFFERED, 52)) | dict(deadline_of(cpu, OFFERED))
    assert written == values
    assert set(values) == OFFERED - {0x1B}  # the APIC's


def test_writing_follows_the_order_of_a_real_machine() -> None:
    order = [index for index, _ in msrs_of(CpuState(), OFFERED, 48)]
    assert order[:7] == [0x174, 0x277, 0xC0000081, 0x1A0, 0x10, 0x12, 0x11]
    assert order[7:11] == [0x4B564D05, 0x2FF, 0x250, 0x258]
    assert order[20:24] == [0x200, 0x201, 0x202, 0x203]
    assert order[-42:-39] == [0x17A, 0x17B, 0x400]


def test_mtrr_masks_look_like_52_bits_on_the_wire_and_fit_the_processor() -> None:
    cpu = CpuState()
    take_msrs(cpu, {0x201: 0x0000_FFFF_C000_0800}, 48)
    assert cpu.mtrr_var[0].mask == 0x000F_FFFF_C000_0800
    assert cpu.mtrr_var[1].mask == 0x000F_0000_0000_0000
    assert dict(msrs_of(cpu, OFFERED, 46))[0x201] == 0x0000_3FFF_C000_0800


def test_a_register_without_subsection_gets_its_reset_value() -> None:
    written = dict(msrs_of(CpuState(), OFFERED, 48))
    assert (written[0x1A0], written[0x4B564D05]) == (1, 1)
    assert deadline_of(CpuState(), OFFERED) == [(0x6E0, 0)]


@pytest.mark.parametrize(
    ("state", "index"),
    [
        (CpuState(spec_ctrl=1), 0x48),
        (CpuState(tsc_aux=7), 0xC0000103),
        (CpuState(steal_time_msr=0x1001), 0x4B564D03),
        (CpuState(msr_tsx_ctrl=2), 0x122),
    ],
)
def test_a_value_that_would_be_lost_is_refused(state: CpuState, index: int) -> None:
    with pytest.raises(UnsupportedStateError, match=f"MSR {index:#x} is .*does not have it"):
        msrs_of(state, OFFERED, 48)


def test_reset_values_of_missing_registers_are_no_matter() -> None:
    state = CpuState(spec_ctrl=0, smbase=0, mce_banks=[5] * 40, mcg_status=1, amd_tsc_scale_msr=1 << 32)
    assert not {0x48, 0x9E, 0x400, 0x17A} & {index for index, _ in msrs_of(state, ALWAYS_THERE, 48)}


def test_feature_control_is_written_apart() -> None:
    assert feature_control_of(CpuState(), OFFERED) == []
    assert feature_control_of(CpuState(msr_ia32_feature_control=5), {0x3A}) == [(0x3A, 5)]
    with pytest.raises(UnsupportedStateError, match="MSR 0x3a is 0x5"):
        feature_control_of(CpuState(msr_ia32_feature_control=5), OFFERED)
