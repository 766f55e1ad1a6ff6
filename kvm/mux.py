"""One character device, several users that take turns: Ctrl-A c hands the keys to the next one (cli.md §5, "mon:").

    back end ─ bytes ─▶ Mux ─ between escapes ─▶ the front that has the focus      Ctrl-A c  next front    Ctrl-A x  end
    back end ◀───────── whatever any front writes                                  Ctrl-A h  help          twice: Ctrl-A

A front is a character device to whoever uses it.  One that has had no focus yet is told of its connection only then, so
a monitor behind a serial port greets when it is called for the first time.

Threads   the loop's; `write` any.
Holds     (1) a front that does not want input gets none; what was typed waits, and the back end waits with it
          (2) escapes are acted on all the same: a device that takes nothing keeps nobody from the monitor
"""

from __future__ import annotations

from collections.abc import Callable

from .chardev import CharBackend, FrontEnd, close_descriptors

ESCAPE = 1  # Ctrl-A
HELP = (
    b"\r\nC-a h    print this help\r\nC-a x    exit emulator\r\n"
    b"C-a c    switch between console and monitor\r\nC-a C-a  sends C-a\r\n"
)


class MuxFront(CharBackend):
    """One user's side of *mux*."""

    def __init__(self, label: str, mux: Mux) -> None:
        super().__init__(label)
        self.output = mux.backend.output
        self.greeted = False
        self._mux = mux

    @property
    def description(self) -> str:
        return "mux"

    @property
    def paused(self) -> bool:
        """Whether its user takes no input."""
        return self._paused

    async def start(self) -> None:
        """The back end is started by itself."""

    def write(self, data: bytes) -> int:
        return self._mux.backend.write(data)

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._mux.pump()

    def drop_client(self) -> None:
        self._mux.backend.drop_client()

    def close(self) -> None:
        """The back end is closed by itself."""


class Mux:
    """Shares *backend* out; *end* is called for Ctrl-A x."""

    def __init__(self, backend: CharBackend, end: Callable[[], None]) -> None:
        self.backend = backend
        self._end = end
        self._fronts: list[MuxFront] = []
        self._focus = 0
        self._connected = False
        self._escaped = False
        self._pending = b""
        self._pumping = False
        backend.attach(FrontEnd(self._received, self._on_connected, self._on_disconnected))

    def front(self, label: str) -> MuxFront:
        """One more user; the first one has the focus."""
        made = MuxFront(label, self)
        self._fronts.append(made)
        return made

    # ---- the back end ----

    def _on_connected(self) -> None:
        self._connected = True
        self._greet()

    def _on_disconnected(self) -> None:
        self._connected = self._escaped = False
        self._pending = b""
        for front in self._fronts:
            if front.greeted:
                front.greeted = False
                front.front_end.disconnected()

    def _greet(self) -> None:
        front = self._fronts[self._focus]
        if self._connected and not front.greeted:
            front.greeted = True
            front.front_end.connected()

    def _received(self, data: bytes, descriptors: list[int]) -> None:
        close_descriptors(descriptors)
        self._pending += data
        self.pump()

    # ---- who gets it ----

    def pump(self) -> None:
        """Give out what waits, as far as it is wanted."""
        if self._pumping:
            return  # a front asked for more while it was given some
        self._pumping = True
        try:
            while self._pending and self._take_some():
                pass
        finally:
            self._pumping = False
        if self._pending:
            self.backend.pause()
        else:
            self.backend.resume()

    def _take_some(self) -> bool:
        """Take the next keys; False when they are for a front that takes none now.  Escapes are for nobody but us."""
        front = self._fronts[self._focus]
        key = self._pending[0]
        if front.paused and (key != ESCAPE if not self._escaped else key == ESCAPE):
            return False
        if self._escaped:
            self._pending = self._pending[1:]
            self._escaped = False
            self._command(key)
            return True
        run, escape, self._pending = self._pending.partition(bytes([ESCAPE]))
        self._escaped = bool(escape)
        if run:
            front.front_end.received(run, [])
        return True

    def _command(self, key: int) -> None:
        if key == ESCAPE:
            self._fronts[self._focus].front_end.received(bytes([ESCAPE]), [])
        elif key == ord("c"):
            self._focus = (self._focus + 1) % len(self._fronts)
            self._greet()
        elif key == ord("x"):
            self._end()
        elif key == ord("h"):
            self.backend.write(HELP)
