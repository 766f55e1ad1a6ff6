"""The monitor for programs, held against that of a real QEMU: scripts, schema, events."""
