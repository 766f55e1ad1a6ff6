"""The monitor: how a client steers the machine while it runs.

    client ─▶ chardev ─▶ json_stream ─▶ qmp ─▶ registry ─▶ Command handler     commands.py …, qemumig.commands
    client ◀─ chardev ◀─ json_stream ◀─ qmp ◀─ response
                                        qmp ◀─ events ◀─ emit(name, data), from any thread

    json_stream.py  bytes → JSON values as soon as they are complete, and back, in QEMU's own dialect
    qmp.py          one monitor: its clients one after the other, descriptors by name
    session.py      one client: greeting, negotiation, queue, out-of-band, responses
    events.py       the hub: events reach every monitor in the order of the calls to `emit`
    registry.py     the table of commands and events by name; a feature adds its own
    commands.py     the life of a machine: status, stop, cont, reset, quit
    inventory.py    what it is made of: vCPUs, memory, character devices, disks (disks.py), and what it has none of
    objects.py      the tree of objects: qom-*, object-add, object-del
    dumps.py        guest memory into files
    fdsets.py       descriptors that clients pass in, by number
    yank.py         breaking connections that hang
    types.py        what these commands return and what events carry
    hmp/            the human monitor, over the same registry; qtest.py: the harness of QEMU's device tests

Everything runs on one asyncio loop; what takes long waits in a thread.  A client that floods, stalls or talks
nonsense costs nothing but its own connection: input is read only as fast as commands finish, output is kept up to
a limit, then the client is dropped.
"""
