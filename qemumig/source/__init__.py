"""The side that has the guest.

    migration     Migration: what the monitor drives: start, cancel, query; one status over many attempts
    attempt       one attempt, in its own thread: connect, setup, rounds, switchover, confirmation, or the way back
    convergence   windows of 100 ms: bandwidth, rate limit, and when to stop the guest
    return_path   what the destination says, and how its silence is to be read
    statistics    what query-migrate shows

Until the last write of the stream is out, whatever goes wrong leads back to the guest running here as if nothing had
happened.  After it, only the destination's word counts (state-machine.md §5).
"""
