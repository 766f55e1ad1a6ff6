from __future__ import annotations

import random
import struct

import pytest

from kvm.state.errors import UnsupportedStateError
from kvm.state.fpu import take_xsave, xsave_of
from qemumig.savevm.devices.cpu_state import Avx512, CpuState, FpopIpDp

INTEL = {2: (576, 256), 5: (1088, 64), 6: (1152, 512), 7: (1664, 1024), 9: (2688, 8)}
AMD = {2: (576, 256), 5: (832, 64), 6: (896, 512), 7: (1408, 1024)}
SSE_ONLY: dict[int, tuple[int, int]] = {}


def random_image(components: dict[int, tuple[int, int]], seed: int = 1) -> bytearray:
    """An image with something in every place that holds state."""
    generator = random.Random(seed)
    image = bytearray(4096)
    image[0:5] = generator.randbytes(5)
    image[6:28] = generator.randbytes(22)
    for index in range(8):
        image[32 + 16 * index : 42 + 16 * index] = generator.randbytes(10)
    image[160:416] = generator.randbytes(256)
    for number, (offset, size) in components.items():
        image[offset : offset + size] = generator.randbytes(4) + bytes(4) if number == 9 else generator.randbytes(size)
    struct.pack_into("<Q", image, 512, 3 | sum(1 << number for number in components))
    return image


@pytest.mark.parametrize("components", [INTEL, AMD, SSE_ONLY], ids=["intel", "amd", "sse"])
def test_every_register_comes_out_as_it_went_in(components: dict[int, tuple[int, int]]) -> None:
    image, cpu = random_image(components), CpuState()
    take_xsave(cpu, image, components)
    assert xsave_of(cpu, 4096, components) == image


def test_registers_are_found_where_the_manual_puts_them() -> None:
    image = bytearray(4096)
    struct.pack_into("<HHB", image, 0, 0x27F, 0x3800, 0xFF)
    struct.pack_into("<I", image, 24, 0x1FA0)
    struct.pack_into("<QH", image, 32 + 16 * 2, 0x8000000000000001, 0x4001)
    struct.pack_into("<QQ", image, 160 + 16 * 3, 0x11, 0x22)
    struct.pack_into("<QQ", image, 576 + 16 * 4, 0x33, 0x44)
    cpu = CpuState()
    take_xsave(cpu, image, INTEL)
    assert (cpu.fpuc, cpu.fpus, cpu.fptag, cpu.mxcsr) == (0x27F, 0x3800, 0xFF, 0x1FA0)
    assert (cpu.fpregs[2].mantissa, cpu.fpregs[2].exponent) == (0x8000000000000001, 0x4001)
    assert (cpu.xmm_low[3], cpu.ymm_high[4]) == ([0x11, 0x22], [0x33, 0x44])


def test_state_moves_between_hosts_that_lay_it_out_differently() -> None:
    cpu, again = CpuState(), CpuState()
    take_xsave(cpu, random_image(AMD), AMD)
    take_xsave(again, xsave_of(cpu, 4096, INTEL), INTEL)
    assert (again.avx512, again.ymm_high, again.xmm_low) == (cpu.avx512, cpu.ymm_high, cpu.xmm_low)
    assert again.pkru == 0


def test_only_the_standard_format_is_written() -> None:
    image = xsave_of(CpuState(xstate_bv=7), 4096, INTEL)
    assert struct.unpack_from("<QQ", image, 512) == (7, 0)
    assert image[28:32] == bytes(4)


def test_without_its_subsection_the_last_instruction_is_zero() -> None:
    image = xsave_of(CpuState(fpop_ip_dp=None), 4096, INTEL)
    assert image[6:24] == bytes(18)
    image = xsave_of(CpuState(fpop_ip_dp=FpopIpDp(0x7FF, 1, 2)), 4096, INTEL)
    assert struct.unpack_from("<HQQ", image, 6) == (0x7FF, 1, 2)


@pytest.mark.parametrize(
    "state",
    [
        CpuState(ymm_high=[[0, 1]] + [[0, 0]] * 15),
        CpuState(avx512=Avx512(opmask=[1] + [0] * 7)),
        CpuState(pkru=0x55555554),
    ],
    ids=["avx", "avx512", "pkru"],
)
def test_state_that_the_host_has_no_place_for_is_refused(state: CpuState) -> None:
    with pytest.raises(UnsupportedStateError, match="is in use, and this machine does not have it"):
        xsave_of(state, 4096, SSE_ONLY)


def test_a_missing_component_in_its_initial_state_only_loses_its_bit() -> None:
    image = xsave_of(CpuState(xstate_bv=0x2E7, pkru=0, avx512=Avx512()), 4096, {2: (576, 256)})
    assert struct.unpack_from("<Q", image, 512) == (7,)
