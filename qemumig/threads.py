"""Threads with names that the system shows, and the rule for ending them.

Names are QEMU's, at most 15 bytes, so that `top -H` shows them whole.  The object that starts a thread joins it, in the
same file.  To stop one: set its flag, wake the sleeper, shut the socket, join.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

PR_SET_NAME = 15
NAME_BYTES = 15  # that the system keeps

_libc = ctypes.CDLL(None, use_errno=True)


def take_name(name: str) -> None:
    """Give the calling thread the name that the system shows."""
    if len(name.encode()) > NAME_BYTES:
        raise ValueError(f"thread name {name!r} has {len(name.encode())} bytes, at most {NAME_BYTES}")
    _libc.prctl(PR_SET_NAME, ctypes.c_char_p(name.encode()), 0, 0, 0)


def workers(count: int) -> ThreadPoolExecutor:
    """At most *count* threads for work that may wait, named as QEMU names such threads; whoever calls this ends them."""
    return ThreadPoolExecutor(count, thread_name_prefix="worker", initializer=take_name, initargs=("worker",))


def named_thread(name: str, body: Callable[[], None]) -> threading.Thread:
    """A thread that takes *name* first; whoever starts it joins it."""

    def run() -> None:
        take_name(name)
        body()

    return threading.Thread(target=run, name=name, daemon=True)


def start_thread(name: str, body: Callable[[], None]) -> threading.Thread:
    """Start a thread that takes *name* first; whoever calls this joins it."""
    thread = named_thread(name, body)
    thread.start()
    return thread
