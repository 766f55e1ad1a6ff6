"""The monitor: how a client steers the machine while it runs.  Transport and dispatch, few commands of its own.

    client ─▶ chardev ─▶ json_stream ─▶ qmp ─▶ registry ─▶ Command handler     kvm.monitor.commands, qemumig.commands
    client ◀─ chardev ◀─ json_stream ◀─ qmp ◀─ response
                                        qmp ◀─ events ◀─ emit(name, data), from any thread

    json_stream.py  bytes → JSON values as soon as they are complete, and back, in QEMU's own dialect
    events.py       the hub: events reach every monitor in the order of the calls to `emit`
    registry.py     the table of commands by name; a feature adds its own
    qmp.py          one monitor: greeting, negotiation, queue, out-of-band, responses
    commands.py     what any machine offers: status, stop, cont, quit, memory dumps, descriptors

Everything runs on one asyncio loop; what takes long waits in a thread.  A client that floods, stalls or talks
nonsense costs nothing but its own connection: input is read only as fast as commands finish, output is kept up to
a limit, then the client is dropped.
"""
