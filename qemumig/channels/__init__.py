"""Where bytes leave and arrive: addresses, connections, and the descriptors behind them.

    address      the forms of an address: QEMU's URIs and QMP's MigrationAddress
    connect      an address into a channel: outgoing in the migration's thread, incoming by a listener
    sockets      tcp, unix and vsock: resolve, connect, bind
    exec, file   a command on the other side of two pipes; a file, also out of a set of descriptors
    channel      Channel: descriptors, how to wake whoever waits on them, how to end it; QuitEvent
    coroutine    CoroutineChannel: a channel for coroutines on any event loop, and which loop it follows

    tls          a channel enciphered: handshakes, who is let in, many at once
    session      the bytes of an enciphered channel, as a carrier of the streams, without the GIL
    openssl      the functions of libssl, by ctypes
    credentials, authz, objects      what users make for that: certificates, keys, lists of names

A channel is one connection.  Its descriptors are non-blocking; streams poll them together with the migration's quit
event, so that a cancel wakes every thread that waits for a peer, in a connect, a handshake or in the middle of the
stream (channels.md §1, §3, §5, §6, §10).  TLS is loaded by those that use it.

Two things are stricter than in QEMU.  With an authorization object, a peer that has proved no identity is not let in (QEMU
asks nobody then), and a pre-shared key's user name is such an identity.  And a destination's TLS peer is the source only
when it has sent a byte of the stream: one that leaves before costs nothing.
"""
