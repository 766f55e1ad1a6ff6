"""The devices of the machine, one file each, and the buses that lead the guest to them.

    a vCPU's exit ─▶ bus ─▶ device.read / device.write           ports: serial, fw_cfg, pit, rtc
    a character device ─▶ serial.receive                         memory: virtio_mmio, ged, ioapic
    deadlines ─▶ pit, rtc                                        interrupts: a line of irqchip

    board          all of them but the vCPUs, wired to buses, interrupt lines and sections
    processor      a vCPU: its thread and its three sections
    memory         RAM and firmware, where the guest sees them
    bus            address → device
    serial, fw_cfg, virtio_mmio, virtio_blk    what the guest talks to
    virtio_queue   the ring that a disk's requests come by
    pit, rtc, ged, ioapic                      the same, if the machine's chipset has them
    irqchip, pic, kvmclock, timer, vapic       what keeps state for it, mostly in the kernel
    client_time    virtual time that a test harness moves instead
    deadlines      a thread that calls timers when their time has come
    acpi, fdt      what the machine says of itself: tables, a device tree
    blobs          RAM blocks for the ACPI files

A device is a plain object: `read` and `write` by (offset, size) from the first address of its range, `reset`, and
`save` and `load` for a record of `qemumig.savevm.devices`.  Which addresses are its own is for the board to say.

Threads   vCPU threads read and write, the loop thread brings serial input; whoever holds the machine's transition lock
          resets, saves and loads.  A device with registers of its own has one lock and takes no other while it holds
          it, but that of the clock, of the deadlines, or of the second I/O APIC, which come last; calls into KVM are made
          with it held, so that an interrupt line follows the registers in order.
"""
