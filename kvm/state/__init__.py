"""CPU state between KVM and the plain records of `qemumig.savevm.devices` (cpu-state.md).

    KVM's structures  ◀─ cpu.py: which ioctl, in which order ─▶  CpuState
                         registers.py   general, segment, control and debug registers
                         fpu.py         the XSAVE image
                         msrs.py        model-specific registers, in one table
                         events.py      exceptions, interrupts and NMIs under way
                      ◀─ apic.py ─▶  ApicState
    host.py: what this host's KVM has of all that, asked once

The small modules are conversions between a structure and a record, without any ioctl.

Threads   Everything is called while the vCPU is parked, by one thread.
Holds     (1) save(load(record)) == record on one host, for all that KVM holds
          (2) state that the guest uses and KVM cannot take is refused, never dropped
"""
