"""FPU and vector registers between an XSAVE image and a CpuState (cpu-state.md §2, §3).

    offset   0   FCW FSW tag   6 FOP   8 FIP   16 FDP   24 MXCSR        the standard format, never the compacted one
            32   8 x 16        x87 registers: mantissa, sign and exponent
           160   16 x 16       XMM registers
           512   u64           XSTATE_BV: components that are not in their initial state
             …                 further components, where leaf 0xD of CPUID says

A component that the machine lacks is refused when the guest has something in it; when it is all zeroes, which is what
the missing bit of XSTATE_BV would mean, that bit is dropped.
"""

from __future__ import annotations

import struct
from typing import Any

from qemumig.savevm.devices.cpu_state import Avx512, CpuState, FpopIpDp, FpReg

from .errors import UnsupportedStateError

_FPREGS, _XMM, _XSTATE_BV = 32, 160, 512
_AVX, _OPMASK, _ZMM_HIGH, _ZMM_HI16, _PKRU = 2, 5, 6, 7, 9
_CONTROL = struct.Struct("<HHBxHQQI")  # FCW, FSW, tag, FOP, FIP, FDP, MXCSR

Components = dict[int, tuple[int, int]]  # number → offset, size in bytes


def take_xsave(cpu: CpuState, image: bytearray, components: Components) -> None:
    """Fill *cpu* from an XSAVE *image*."""
    cpu.fpuc, cpu.fpus, cpu.fptag, fop, fip, fdp, cpu.mxcsr = _CONTROL.unpack_from(image)
    cpu.fpop_ip_dp = FpopIpDp(fop, fip, fdp)
    cpu.fpregs = [FpReg(*struct.unpack_from("<QH", image, _FPREGS + 16 * index)) for index in range(8)]
    cpu.xmm_low = _rows(image, _XMM, 16, 2)
    (cpu.xstate_bv,) = struct.unpack_from("<Q", image, _XSTATE_BV)

    parts = {number: bytes(image[offset : offset + size]) for number, (offset, size) in components.items()}
    if _AVX in parts:
        cpu.ymm_high = _rows(parts[_AVX], 0, 16, 2)
    if _ZMM_HI16 in parts:
        opmask = list(struct.unpack_from("<8Q", parts[_OPMASK]))
        cpu.avx512 = Avx512(opmask, _rows(parts[_ZMM_HIGH], 0, 16, 4), _rows(parts[_ZMM_HI16], 0, 16, 8))
    if _PKRU in parts:
        (cpu.pkru,) = struct.unpack_from("<I", parts[_PKRU])


def xsave_of(cpu: CpuState, size: int, components: Components) -> bytearray:
    """The XSAVE image of *size* bytes that holds *cpu*; UnsupportedStateError when there is no place for it."""
    image = bytearray(size)
    last = cpu.fpop_ip_dp or FpopIpDp()
    _CONTROL.pack_into(image, 0, cpu.fpuc, cpu.fpus, cpu.fptag & 0xFF, last.fpop, last.fpip, last.fpdp, cpu.mxcsr)
    for index, register in enumerate(cpu.fpregs):
        struct.pack_into("<QH", image, _FPREGS + 16 * index, register.mantissa, register.exponent)
    _put_rows(image, _XMM, cpu.xmm_low)

    xstate_bv = cpu.xstate_bv
    contents = _extended_contents(cpu)
    for number in range(2, 64):
        content = contents.get(number, b"")
        if number in components:
            offset, length = components[number]
            image[offset : offset + min(length, len(content))] = content[:length]
        elif any(content):
            raise UnsupportedStateError(f"XSAVE component {number} is in use, and this machine does not have it")
        else:
            xstate_bv &= ~(1 << number)
    struct.pack_into("<Q", image, _XSTATE_BV, xstate_bv)
    return image


def _extended_contents(cpu: CpuState) -> dict[int, bytes]:
    """The bytes of each component beyond SSE that *cpu* has, wherever they may go."""
    contents = {_AVX: _packed(cpu.ymm_high)}
    if cpu.avx512 is not None:
        contents[_OPMASK] = struct.pack("<8Q", *cpu.avx512.opmask)
        contents[_ZMM_HIGH] = _packed(cpu.avx512.zmm_high)
        contents[_ZMM_HI16] = _packed(cpu.avx512.zmm_hi16)
    if cpu.pkru is not None:
        contents[_PKRU] = struct.pack("<I", cpu.pkru)
    return contents


def _rows(image: bytes | bytearray, offset: int, count: int, words: int) -> list[list[int]]:
    row = struct.Struct(f"<{words}Q")
    return [list(row.unpack_from(image, offset + row.size * index)) for index in range(count)]


def _packed(rows: list[list[int]]) -> bytes:
    return b"".join(struct.pack(f"<{len(row)}Q", *row) for row in rows)


def _put_rows(image: bytearray, offset: int, rows: Any) -> None:
    data = _packed(rows)
    image[offset : offset + len(data)] = data
