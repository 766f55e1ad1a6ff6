"""A command as the other side: the source writes to its standard input, the destination reads its output (channels.md §5).

The command's exit status is not looked at, as in QEMU: a command that dies early shows itself as a broken pipe.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess

from ..errors import ChannelError
from .address import ExecAddress
from .channel import Channel

TERMINATE_GRACE_S = 0.2


class ExecChannel(Channel):
    """Two pipes to a child process, which belongs to the channel."""

    def __init__(self, address: ExecAddress, quit_fd: int) -> None:
        # a host program may have blocked signals to read them elsewhere; the command gets them as anybody does
        mask = signal.pthread_sigmask(signal.SIG_SETMASK, ())
        try:
            self._child = subprocess.Popen(
                address.args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
            )
        except OSError as error:
            text = f"Failed to execute child process “{address.args[0]}” ({os.strerror(error.errno or 0)})"
            raise ChannelError(text, channel=str(address), errno=error.errno) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        assert self._child.stdin and self._child.stdout
        read_fd, write_fd = self._child.stdout.fileno(), self._child.stdin.fileno()
        super().__init__("command", str(address), read_fd, write_fd, quit_fd, can_return=False)

    def is_two_way(self) -> bool:
        return True

    def close(self) -> None:
        """Close both pipes and wait for the child; one that goes on after the quit event is set is ended."""
        assert self._child.stdin and self._child.stdout
        self._child.stdin.close()
        self._child.stdout.close()
        self.read_fd = self.write_fd = -1
        self._wait()

    def _wait(self) -> None:
        pidfd = os.pidfd_open(self._child.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.register(self.quit_fd, select.POLLIN)
            if pidfd not in dict(poll.poll()):
                self._end()
        finally:
            os.close(pidfd)
        self._child.wait()

    def _end(self) -> None:
        """End the child's whole process group: a shell passes no signal on to what it started."""
        os.killpg(self._child.pid, signal.SIGTERM)
        try:
            self._child.wait(TERMINATE_GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._child.pid, signal.SIGKILL)
