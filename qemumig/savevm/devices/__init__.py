"""Descriptions: what each section of the machine looks like on the wire, over plain records.

One file a section: a dataclass whose defaults are the reset values, then its VMState.  No file knows KVM or a device
model: `kvm/state/` moves the records to and from them, and so every recorded stream loads without either.

    timer           the virtual clock                   cpu_common   halted or not
    fw_cfg          the firmware configuration port     cpu          registers of a vCPU
    kvm_tpr_opt     task priority patching              apic         local APIC of a vCPU
    ioapic          I/O APIC                            kvmclock     paravirtual clock
    serial          16550                               globalstate  run state before the switchover
    acpi_ged        with acpi=on                        i8259, i8254, mc146818rtc   with pic, pit, rtc=on
    virtio_mmio     virtio devices on the MMIO transport
"""
