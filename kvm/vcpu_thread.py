"""The thread that sits in a vCPU's KVM_RUN, and how it is made to come out.

                      ┌──── resume ────┐                 immediate_exit is 1 in the shared page
     start ─▶ parked ─┤                ├─▶ running       exactly while a pause is wanted
                      └─ EINTR ◀─ kick ┘

Stopping a vCPU that is in the guest takes two things: `immediate_exit`, which KVM_RUN looks at on its way in, and
a signal, which makes it come out.  The flag is set first, so a kick cannot be lost: the signal finds the thread
in KVM_RUN, or KVM_RUN finds the flag.  A thread parks only after KVM_RUN has said EINTR.  By then it has applied
what the handler answered to the last exit, so the registers are those between two instructions.

The signal needs a handler, for a signal that is ignored wakes nobody.  It is a function of the C library that
does nothing with its number (abs), installed with sigaction: a handler from Python's `signal` module would run
in the main thread, at each kick, whenever that gets to it, and write to asyncio's wake-up descriptor too.

Holds     `paused` true means: EINTR was seen, nothing runs until `resume`
"""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable
from ctypes import byref, c_uint64

from .errors import KvmError
from .vcpu import INTERRUPTED, RETRY, Exit, Vcpu

# -- the kick -------------------------------------------------------------------------------------------------

KICK_SIGNAL = signal.SIGRTMIN  # no program's choice for anything else; glibc keeps the two below for itself
_SA_RESTART = 0x10000000  # other system calls do not notice; KVM_RUN comes back all the same
_PR_SET_NAME = 15
_NAME_BYTES = 15  # what the kernel keeps of a thread's name

_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGABRT}

_libc = ctypes.CDLL(None, use_errno=True)


class _sigaction(ctypes.Structure):
    """The C library's layout on x86-64."""

    _fields_ = [
        ("sa_handler", ctypes.c_void_p),
        ("sa_mask", c_uint64 * 16),
        ("sa_flags", ctypes.c_int),
        ("sa_restorer", ctypes.c_void_p),
    ]


def _install_kick_handler() -> None:
    do_nothing = ctypes.cast(_libc.abs, ctypes.c_void_p).value
    action = _sigaction(sa_handler=do_nothing, sa_flags=_SA_RESTART)
    if _libc.sigaction(int(KICK_SIGNAL), byref(action), None) != 0:
        raise KvmError(ctypes.get_errno(), f"sigaction (signal {int(KICK_SIGNAL)})")


def _take_name(name: str) -> None:
    """Give the calling thread its name for top -H and debuggers, too."""
    _libc.prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()[:_NAME_BYTES]), 0, 0, 0)


def _take_kicks_only() -> None:
    """Leave signals for the process to other threads: they would only throw the vCPU out of the guest."""
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals() - _FAULTS - {KICK_SIGNAL})


# -- the thread -----------------------------------------------------------------------------------------------


class VcpuThread:
    """The thread that runs one vCPU and hands its exits to *handle_exit*.

    Its owner starts it and ends it with `stop`; anybody may call `resume` and `request_pause` in between, the
    vCPU thread itself (in a handler) too.  An exception from the handler or from KVM_RUN parks the vCPU and
    goes to *on_error*, called in the vCPU thread; the exit it was about is then not complete.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        handle_exit: Callable[[Exit], object],
        name: str = "CPU 0/KVM",
        on_error: Callable[[BaseException], object] | None = None,
    ) -> None:
        # Set before start.
        self.vcpu = vcpu
        self.name = name
        self._handle_exit = handle_exit
        self._on_error = on_error
        # A daemon, so that a program that dies of an exception is not held back by its guest.
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        # Under lock.  Invariant: vcpu.run.immediate_exit == _pause_wanted or _doze_s > 0, from start to the thread's end.
        self._changed = threading.Condition()
        self._pause_wanted = True
        self._doze_s = 0.0  # how long to stay out of the guest, once
        self._paused = False
        self._ending = False
        self._alive = False  # there is a thread that may be signalled

    # -- for any thread

    @property
    def paused(self) -> bool:
        """The vCPU runs nothing, and its last access is complete."""
        return self._paused

    @property
    def thread_id(self) -> int | None:
        """The kernel's number of the thread, None before start."""
        return self._thread.native_id

    def start(self) -> None:
        """Create the thread, parked; returns when it is."""
        _install_kick_handler()
        self.vcpu.run.immediate_exit = 1
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._paused or self._ending)

    def resume(self) -> None:
        """Let the vCPU run; nothing happens when it does already."""
        with self._changed:
            if self._ending:
                return
            self._pause_wanted = False
            self._doze_s = 0.0
            self._paused = False
            self.vcpu.run.immediate_exit = 0
            self._changed.notify_all()

    def request_pause(self) -> None:
        """Have the vCPU parked soon; does not wait."""
        with self._changed:
            self._want_pause()

    def doze(self, seconds: float) -> None:
        """Keep the vCPU out of the guest for so long, once and soon; does not wait.  A pause ends it early.

        Nothing happens to one that is not running, or has not done its last doze.
        """
        with self._changed:
            if self._pause_wanted or self._ending or self._doze_s or not self._alive:
                return
            self._doze_s = seconds
            self.vcpu.run.immediate_exit = 1
            signal.pthread_kill(self._thread.ident or 0, KICK_SIGNAL)

    def wait_paused(self, timeout: float | None = None) -> bool:
        """Wait until it is parked; False when *timeout* seconds passed first."""
        if threading.current_thread() is self._thread:
            raise RuntimeError(f"thread {self.name!r} waits for itself to be parked")
        with self._changed:
            return self._changed.wait_for(lambda: self._paused, timeout)

    def stop(self) -> None:
        """End the thread and wait for it; in the thread itself: end it when its handler returns."""
        with self._changed:
            self._ending = True
            if self._alive:
                self._want_pause()
            self._changed.notify_all()
        self.join()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end; False when *timeout* seconds passed, or this is the thread."""
        if self._thread.ident is None:
            return True
        if threading.current_thread() is self._thread:
            return False
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _want_pause(self) -> None:
        """Under lock.  The flag goes first, see the top of this file; one kick serves all who want a pause."""
        if self._pause_wanted:
            return
        self._pause_wanted = True
        self.vcpu.run.immediate_exit = 1
        self._changed.notify_all()  # it may doze
        if self._alive and threading.current_thread() is not self._thread:
            signal.pthread_kill(self._thread.ident or 0, KICK_SIGNAL)

    # -- the thread

    def _main(self) -> None:
        _take_name(self.name)
        _take_kicks_only()
        with self._changed:
            self._alive = True
        try:
            self._run_until_paused()  # straight out again; what KVM does for the first run of all is done then
            while self._park():
                self._run_until_paused()
        finally:
            with self._changed:
                self._alive = False  # from here on the thread's id may be anybody's
                self._ending = True
                self._paused = True
                self._changed.notify_all()

    def _park(self) -> bool:
        """Sleep until resumed: True; False when the thread is to end."""
        with self._changed:
            while self._pause_wanted and not self._ending:
                if not self._paused:
                    self._paused = True
                    self._changed.notify_all()
                self._changed.wait()
            return not self._ending

    def _doze(self) -> None:
        """Stay out of the guest if somebody asked for that."""
        with self._changed:
            if not self._doze_s:
                return
            if not self._changed.wait_for(self._is_awake, self._doze_s):
                self.vcpu.run.immediate_exit = 0
            self._doze_s = 0.0

    def _is_awake(self) -> bool:
        """Under lock.  Something ends a doze early; a pause and a resume after it leave none."""
        return self._pause_wanted or self._ending or not self._doze_s

    def _run_until_paused(self) -> None:
        run_once, handle_exit = self.vcpu.run_once, self._handle_exit
        try:
            while True:
                exit = run_once()
                if exit is INTERRUPTED:
                    if self._pause_wanted:
                        return
                    self._doze()
                elif exit is not RETRY:
                    handle_exit(exit)
        except BaseException as error:  # SystemExit as well: a vCPU that is silently gone helps nobody
            self.request_pause()
            if self._on_error is None:
                raise
            self._on_error(error)
