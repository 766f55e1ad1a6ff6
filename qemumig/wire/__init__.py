"""Bytes and nothing but bytes: the numbers of the wire, and buffered streams over one channel.

    format    every number of the stream, written once: magics, section types, flags, commands, messages
    stream    InputStream and OutputStream: buffered, bounded, big-endian, with a byte account

Nothing here knows what a page or a device is.
"""
