"""What ACPI says of the machine: tables, written here byte by byte, which a firmware puts where the guest looks for them.

    aml       the bytecode of the DSDT: names, devices, resources, a method
    tables    DSDT, FADT, MADT, XSDT and the RSDP that points to them
    loader    how a firmware allocates the tables, joins them and sums them up

    tables.build(machine) ─▶ etc/acpi/tables, etc/acpi/rsdp, etc/table-loader ─▶ fw_cfg ─▶ firmware ─▶ guest

The three files are RAM blocks (kvm/devices/memory.py): they travel with a migration, so that a guest that reads them
afterwards finds what it would have found at the source.

The layouts are those of the ACPI specification 5.0, the first with hardware-reduced machines.
"""
