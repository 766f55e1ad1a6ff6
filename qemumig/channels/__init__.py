"""Where bytes leave and arrive: addresses, connections, and the descriptors behind them.

    address    the forms of an address: QEMU's URIs and QMP's MigrationAddress
    channel    Channel: descriptors, how to wake whoever waits on them, how to end it; QuitEvent
    connect    an address into a channel: outgoing at once or in the migration's thread; incoming by a listener
    exec       a command on the other side of two pipes
    file       a file

A channel is one connection.  Its descriptors are non-blocking; streams poll them together with the migration's quit
event, so that a cancel wakes every thread that waits for a peer (channels.md §1, §5, §6).
"""
