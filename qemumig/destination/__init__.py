"""The side that gets the guest.

    incoming    IncomingMigration: what the monitor drives: listen, query; and the thread that loads the stream
    loader      StreamLoader: the elements of a stream, one after the other, into RAM and staged records

Nothing of a peer takes effect before the stream is whole, except for guest memory, which is discarded again when the
load fails.  A vCPU runs for the first time after the source has been told so.
"""
