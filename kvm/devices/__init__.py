"""The devices of the machine, one file each, and the buses that lead the guest to them.

    a vCPU's exit ─▶ bus ─▶ device.read / device.write           ports: serial, fw_cfg   memory: virtio_mmio
    a character device ─▶ serial.receive                         interrupts: a line of irqchip

    board          all of them but the vCPUs, wired to buses, interrupt lines and sections
    processor      a vCPU: its thread and its three sections
    memory         RAM and firmware, where the guest sees them
    bus            address → device
    serial, fw_cfg, virtio_mmio, virtio_blk    what the guest talks to
    virtio_queue   the ring that a disk's requests come by
    irqchip, kvmclock, timer, vapic            what keeps state for it, mostly in the kernel

A device is a plain object: `read` and `write` by (offset, size) from the first address of its range, `reset`, and
`save` and `load` for a record of `qemumig.savevm.devices`.  Which addresses are its own is for the board to say.

Threads   vCPU threads read and write, the loop thread brings serial input; whoever holds the machine's transition lock
          resets, saves and loads.  A device with registers of its own has one lock and takes no other while it holds it;
          calls into KVM are made with it held, so that an interrupt line follows the registers in order.
"""
