"""`i8259`: a legacy interrupt controller (pic=on only); version 1, instance 0 the master, 1 the slave."""

from __future__ import annotations

from dataclasses import dataclass

from ..fields import uint8
from ..vmstate import VMState, plain_subsection


@dataclass
class I8259State:
    """The registers of one controller of eight lines."""

    last_irr: int = 0
    irr: int = 0
    imr: int = 0
    isr: int = 0
    priority_add: int = 0
    irq_base: int = 0
    read_reg_select: int = 0
    poll: int = 0
    special_mask: int = 0
    init_state: int = 0
    auto_eoi: int = 0
    rotate_on_auto_eoi: int = 0
    special_fully_nested_mode: int = 0
    init4: int = 0
    single_mode: int = 0
    elcr: int = 0
    ltim: int | None = None  # since 10.0: level triggered


_REGISTERS = tuple(name for name in vars(I8259State()) if name != "ltim")

I8259 = VMState(
    "i8259",
    1,
    tuple(uint8(name) for name in _REGISTERS),
    subsections=(plain_subsection("ltim", "i8259/ltim", uint8, "ltim"),),
    record=I8259State,
)
