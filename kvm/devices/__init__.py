"""The devices of the machine, one file each, and the buses that lead the guest to them.

    a vCPU's exit ─▶ bus ─▶ device.read / device.write           ports: serial, fw_cfg   memory: virtio_mmio
    a character device ─▶ serial.receive                         interrupts: a line of irqchip

A device is a plain object: registers behind a lock, `reset`, and `save` and `load` for a record of
`qemumig.savevm.devices`.  Its registers are reached by (offset, size) from the first address of its range; which
addresses those are is for the machine to say.  Devices that live in the kernel (irqchip, kvmclock) have only the
record half.

Threads   vCPU threads read and write, the loop thread brings serial input, a migration saves and loads.  Each
          device has one lock and takes no other while it holds it; calls into KVM are made with it held, so that
          an interrupt line follows the registers in order.
"""
