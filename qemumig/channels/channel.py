"""Channel: the descriptors of one connection, and QuitEvent: the alarm that ends all waiting on them.

Threads   the thread that owns the channel reads, writes and closes it.  `shutdown` and `QuitEvent.set` may come from any
          thread at any time before `close`; they wake the owner and never block.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import stat
import termios
import threading
from collections.abc import Mapping

from ..errors import MigrationCancelled
from ..wire.stream import Carrier


class QuitEvent:
    """An eventfd that stays readable once it is set; every wait of a migration includes it.

    Its owner closes it when nobody waits any more; a `set` that comes later is without effect.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._set = False

    def set(self) -> None:
        """Wake everybody who waits, now and later."""
        with self._lock:
            self._set = True
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def is_set(self) -> bool:
        return self._set

    def close(self) -> None:
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1


def has_hung_up(fd: int) -> bool:
    """Whether the other end of a socket sends nothing any more; what it sent before may still lie there."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return bool(poll.poll(0))


def has_unread(fd: int) -> bool:
    """Whether something lies in a socket that nobody has read yet."""
    count = bytearray(4)
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return any(count)


TCP_CLOSE = 7  # a state of TCP_INFO; a connection that the peer has closed in order is in another


def was_reset(fd: int) -> bool:
    """Whether a connection whose end has been read was reset, rather than closed in order.

    The kernel tells of a reset once: a write that fails takes it, and a read afterwards sees an ordinary end.  What was
    under way then is lost, so the end says nothing about what the peer had still sent.
    """
    with socket.socket(fileno=os.dup(fd)) as sock:
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return False  # between two processes of one host nothing is under way
        try:
            return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE
        except OSError:
            return True


def wait_any(events: Mapping[int, int], quit_fd: int, timeout_ms: int | None = None) -> list[int]:
    """Sleep until some descriptor of *events* (descriptor: select.POLLIN, …) is ready; those that are, none after the time.

    Raises MigrationCancelled when told to quit instead.
    """
    poll = select.poll()
    poll.register(quit_fd, select.POLLIN)
    for fd, wanted in events.items():
        poll.register(fd, wanted)
    ready = [fd for fd, _ in poll.poll(timeout_ms)]
    if quit_fd in ready:
        raise MigrationCancelled("the migration was cancelled")
    return ready


def wait_ready(fd: int, events: int, quit_fd: int) -> None:
    """Sleep until *fd* has one of *events* (select.POLLIN, …); MigrationCancelled when told to quit instead."""
    wait_any({fd: events}, quit_fd)


def pause(duration_ms: int, quit_fd: int) -> None:
    """Sleep for *duration_ms*; MigrationCancelled when told to quit."""
    poll = select.poll()
    poll.register(quit_fd, select.POLLIN)
    if poll.poll(duration_ms):
        raise MigrationCancelled("the migration was cancelled")


class Channel:
    """One connection.

    *kind* is QEMU's word for messages ("socket", "command", "file"), *name* says which one.  *can_return*: bytes flow in
    both directions, so that a return path is possible.  *stored*: bytes wait in a file, nobody acts on them as they come.
    *takes_references*: the kernel can hand memory on without a copy, by splice.
    """

    stored = False
    takes_references = False
    announces_end = True  # where the transport has a last word (TLS): whether `close` says it
    carrier: Carrier | None = None  # what enciphers the bytes on their way, where something does

    def __init__(self, kind: str, name: str, read_fd: int, write_fd: int, quit_fd: int, *, can_return: bool) -> None:
        self.kind = kind
        self.name = name
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.quit_fd = quit_fd
        self.can_return = can_return
        for fd in {read_fd, write_fd} - {-1}:
            os.set_blocking(fd, False)

    def read_some(self, limit: int) -> bytes | None:
        """What is there to read, at most *limit* bytes; b"" at the end of the stream, None when nothing is there yet.

        OSError when the connection is broken.
        """
        try:
            return os.read(self.read_fd, limit)
        except BlockingIOError:
            return None

    def is_two_way(self) -> bool:
        """Whether bytes can be read here as well as written, whatever the other side does with them."""
        return self.can_return

    def shutdown(self) -> None:
        """End both directions; the peer sees the end of the stream.  Without effect where there is no such thing."""

    def finish(self) -> None:
        """Say that nothing more will be written, as far as the transport can; reading goes on."""

    def share_core(self) -> None:
        """Expect that both ends take turns on one core, because a guest keeps the others busy.

        Between two processes of one host there is no distance to fill with bytes under way: few of them then, and those
        in the cache, are faster than the many that the kernel would let pile up.  With a core for each end it is the
        other way round.
        """

    def keep_short(self) -> None:
        """Expect that somebody waits for bytes that are under way, behind all that were sent before (postcopy).

        The kernel then takes no more than what keeps the way busy; on one host that is next to nothing.
        """

    def close(self) -> None:
        """Give the descriptors back."""
        for fd in {self.read_fd, self.write_fd} - {-1}:
            os.close(fd)
        self.read_fd = self.write_fd = -1


# Fits the processor's second-level cache, so that a receiver that runs next on the same core finds the bytes there.
IN_CACHE_BUFFER = 384 * 1024


def _is_on_one_host(sock: socket.socket) -> bool:
    """True when both ends of a TCP connection have the same address."""
    try:
        return bool(sock.getsockname()[0] == sock.getpeername()[0])
    except OSError:  # it is broken already; whoever uses it will see
        return False


class SocketChannel(Channel):
    """A connected stream socket; it belongs to the channel."""

    def __init__(self, name: str, sock: socket.socket, quit_fd: int) -> None:
        super().__init__("socket", name, sock.fileno(), sock.fileno(), quit_fd, can_return=True)
        self._socket = sock
        self.takes_references = sock.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def share_core(self) -> None:
        if self._socket.family in (socket.AF_INET, socket.AF_INET6) and _is_on_one_host(self._socket):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, IN_CACHE_BUFFER)

    def keep_short(self) -> None:
        sock = self._socket
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, IN_CACHE_BUFFER)
        if _is_on_one_host(sock):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, IN_CACHE_BUFFER)

    def _shutdown(self, how: int) -> None:
        with contextlib.suppress(OSError):  # the peer was faster: there is nothing left to end
            self._socket.shutdown(how)

    def shutdown(self) -> None:
        self._shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        self._shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()
        self.read_fd = self.write_fd = -1


def channel_from_fd(name: str, fd: int, quit_fd: int) -> Channel:
    """A channel over a descriptor that somebody else opened: a socket, a pipe or a file.  It belongs to the channel."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        return SocketChannel(name, socket.socket(fileno=fd), quit_fd)
    return Channel("file", name, fd, fd, quit_fd, can_return=False)
