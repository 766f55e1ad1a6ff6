"""Multifd: pages on several connections at once; the main channel keeps sections, commands and sync points (multifd.md).

    SOURCE        ram/save_multifd ──batches──▶ send: a thread and a queue a channel ═══╗
                       └─ sync ──▶ SYNC on every channel, then the mark on the main one  ║ packets
    DESTINATION   guest RAM ◀── recv: a thread a channel ◀═════════════════════════════╝
                       a channel that has loaded a SYNC waits until all have, and the main loader has met its mark

packet     the packets' bytes, taken apart and put together
send       batches of pages into packets, each channel in its own thread
zerocopy   pages that the network takes from where they lie
splice     pages that the kernel hands on by reference
recv       packets straight into guest RAM, each channel in its own thread; the meeting of channels and main loader
senders    the source's channels: opened, watched, closed
receivers  the destination's channels: told apart, watched, closed

Truths that hold across the room:

 1. The k-th SYNC of every channel belongs to the k-th mark of the main channel.  Whatever was sent before it is in memory
    before anything behind it is loaded.
 2. Between two sync points no page is sent twice: a walk meets a page again only after it has passed the last block.
 3. A channel that fails ends the whole migration at once, on both sides, whoever waits for what.
"""
