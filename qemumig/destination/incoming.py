"""IncomingMigration: the destination as a monitor drives it, and the thread that takes the guest in.

    listen ─▶ accept ─▶ load ─▶ put device state into effect ─▶ SHUT 0 ─▶ start the guest ─▶ completed
                         │
                         └─▶ failed: SHUT 1, memory discarded; nothing ever ran here

The word to the source comes before the first instruction of the guest, and the channel stays open until then: a source
that sees the connection end without that word knows that nothing runs here (state-machine.md §5).  When the word cannot be
sent, the guest is kept, stopped, and a person decides.

Threads   the control loop's thread calls `listen`, `query`, `close`; `mig/dst/main` does the rest.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import trace
from ..channels.address import Address
from ..channels.channel import Channel, QuitEvent, has_hung_up
from ..channels.connect import Listener, incoming, no_object, tls_of_destination
from ..channels.file import OpenPath, no_path
from ..errors import ChannelError, MachineError, MigrationCancelled, MigrationError, StateError, StreamError
from ..machine import HoldEvents, Machine
from ..multifd.arrivals import Arrivals
from ..multifd.receivers import Receivers
from ..options import MigrationOptions
from ..qapi import MigrationStatus, RunState
from ..ram.landing import Landing
from ..savevm import commands, remedies
from ..savevm.rehearsal import rehearse_arrival
from ..states import DESTINATION, StatusMachine
from ..threads import start_thread
from .loader import StreamLoader
from .postcopy import HEAD_START_S, Phase, PostcopyDestination

if TYPE_CHECKING:  # most migrations have no TLS: its library is loaded by those that do
    from ..channels.objects import FindObject

Emit = Callable[[str, dict[str, Any] | None], None]


class IncomingMigration:
    """Incoming migration of *machine*, which waits in runstate `inmigrate`.

    *autostart*: whether the guest may start when the source's was running.  *on_failure* is called in the loading thread,
    with a sentence, when a load failed that was to end the process.  *take_fd*, *find_object*, *open_path*: as for
    Migration.
    """

    def __init__(
        self,
        machine: Machine,
        options: MigrationOptions,
        *,
        emit: Emit,
        take_fd: Callable[[str], int],
        find_object: FindObject = no_object,
        open_path: OpenPath = no_path,
        autostart: bool = True,
        on_failure: Callable[[str], None] = lambda message: None,
        hold_events: HoldEvents = nullcontext,
    ) -> None:
        self._machine = machine
        self._options = options
        self._emit = emit
        self._take_fd = take_fd
        self._tls = partial(tls_of_destination, options, find_object)
        self._open_path = open_path
        self._on_failure = on_failure
        self._hold_events = hold_events
        self._standstill = ExitStack()  # from the last that the source sends of a guest to its start
        self._states = StatusMachine(DESTINATION, self._announce)
        self._lock = threading.Lock()  # guards autostart against the moment of the start
        self._start_lock = threading.Lock()  # held from the start of the guest to `completed`, which are seen as one
        self._autostart = autostart
        self._exit_on_error = True
        self._quit: QuitEvent | None = None
        self._listener: Listener | None = None
        self._channel: Channel | None = None
        self._arrivals: Arrivals | None = None
        self._loader: StreamLoader | None = None
        self._postcopy: PostcopyDestination | None = None
        self._blocktime: dict[str, Any] = {}  # of a postcopy that is over
        self._thread: threading.Thread | None = None
        self.error: MigrationError | None = None

    # ---- for the monitor ----

    @property
    def status(self) -> MigrationStatus:
        return self._states.status

    def listen(self, address: Address, *, exit_on_error: bool = True) -> None:
        """Bind *address* and wait for the source there, in a thread.

        Raises StateError when an incoming migration was started before and did not fail, or when the machine does not
        wait for one; ChannelError when the address cannot be bound.
        """
        if self._machine.runstate is not RunState.INMIGRATE:
            raise StateError("'-incoming' was not specified on the command line", state=self._machine.runstate)
        if self._states.status not in (MigrationStatus.NONE, MigrationStatus.FAILED):
            raise StateError("The incoming migration has already been started", state=self._states.status)
        self._join()
        quit_event = QuitEvent()
        try:
            self._listener = incoming(address, quit_event.fd, self._take_fd, tls=self._tls, open_path=self._open_path)
        except MigrationError:
            quit_event.close()
            raise
        self._quit = quit_event
        self._exit_on_error = exit_on_error
        self.error = None
        self._states.advance_from_any(MigrationStatus.SETUP)
        self._thread = start_thread("mig/dst/main", self._run)

    def set_autostart(self, autostart: bool) -> None:
        """Whether the guest starts when it has arrived; `stop` and `cont` set this while it is on its way."""
        with self._lock:
            self._autostart = autostart

    def query(self) -> dict[str, Any]:
        """What query-migrate shows of this side; empty when nothing was ever listened for."""
        with self._start_lock:  # whoever has seen the guest run is not told that it is still on its way
            status = self._states.status
        if status is MigrationStatus.NONE:
            return {}
        info: dict[str, Any] = {"status": status.value}
        postcopy = self._postcopy
        listener = postcopy.listener if postcopy is not None else self._listener
        addresses = listener.socket_addresses() if listener is not None else []
        if addresses:
            info["socket-address"] = addresses
        error = self.error or (postcopy.error if postcopy is not None else None)
        if error is not None:
            info["error-desc"] = str(error)
        if status is MigrationStatus.COMPLETED:
            info |= self._blocktime
        return info

    def break_connection(self) -> None:
        """Break the connection that there is, as if the network had (state-machine.md §6)."""
        if (channel := self._channel) is not None:
            channel.shutdown()

    def abandon(self) -> None:
        """End all waiting, whatever comes of it: the process is about to exit."""
        if self._quit is not None:
            self._quit.set()
        if self._postcopy is not None:
            self._postcopy.stop_waiting()

    def close(self) -> None:
        """End whatever runs and join its thread."""
        self.abandon()
        self._join()

    # ---- the thread ----

    def _run(self) -> None:
        try:
            self._take_guest()
        except MigrationCancelled as error:
            self._fail(self._error_beside() or error)
        except (StreamError, ChannelError) as error:
            self._fail(self._explained(error))
        except MigrationError as error:
            self._fail(error)
        except Exception as error:  # a defect of ours: the source must hear that nothing runs here
            self._fail(MigrationError(f"internal error while loading: {error!r}"))
            raise
        finally:
            self._clean_up()
            trace.loadvm_state_cleanup()
        if self._states.status is not MigrationStatus.FAILED or isinstance(self.error, MigrationCancelled):
            return  # there is nothing to say, or the process ends and knows why
        message = f"load of migration failed: {self.error}"
        if self._exit_on_error:
            self._on_failure(message)
        else:
            print(message, file=sys.stderr)

    def _take_guest(self) -> None:
        assert self._listener is not None and self._quit is not None
        rehearse_arrival(self._machine)
        arrivals = self._arrivals = Arrivals(self._listener, self._options, self._machine.uuid)
        try:
            arrivals.gather()
        finally:
            self._channel = arrivals.main
        assert self._channel is not None and arrivals.stream is not None
        trace.migration_set_incoming_channel(self._channel.kind, self._channel.name)
        self._postcopy = PostcopyDestination(
            self._machine,
            self._options,
            self._states,
            channel=self._channel,
            listener=self._listener,
            quit_event=self._quit,
            end_packets=self._end_packets,
            hold_events=self._hold,
        )
        if not self._options.capability("postcopy-preempt") and not arrivals.channels:
            self._turn_away_others()
        self._states.advance(MigrationStatus.SETUP, MigrationStatus.ACTIVE)
        loader = self._loader = StreamLoader(
            self._machine,
            self._options,
            arrivals.stream,
            open_return_path=self._open_return_path,
            pong=self._pong,
            look_round=self._look_round,
            postcopy=self._postcopy,
            settle=self._settle,
            receive=self._receive if arrivals.channels else None,
        )
        loader.load()
        if loader.handed_over:
            self._run_postcopy()
            return
        self._end_packets()
        trace.vmstate_downtime_checkpoint("dst-precopy-loadvm-completed")
        self._hold()
        self._load_devices()
        if loader.description_missing:
            print("migration: the stream ends without a description of its device state", file=sys.stderr)
        trace.vmstate_downtime_checkpoint("dst-precopy-bh-enter")
        told = self._tell_source()
        with self._start_lock:
            self._start(loader.runstate, told)
            self._states.advance(MigrationStatus.ACTIVE, MigrationStatus.COMPLETED)
        self._standstill.close()

    def _turn_away_others(self) -> None:
        """The main channel is all that there is to be."""
        assert self._arrivals is not None and self._listener is not None and self._quit is not None
        if not self._listener.takes_more or self._options.capability("postcopy-ram"):  # then no 7.2 has multifd
            self._listener.close()
            return
        self._arrivals.turn_away(self._quit.set)

    def _hold(self) -> None:
        """All processors are for the guest that stands still, until it has started: nobody is told anything meanwhile."""
        self._standstill.enter_context(self._hold_events())

    def _start(self, source_runstate: RunState | None, told: bool) -> None:
        """Start the guest; the source has let go of it: whatever happens now, it is kept."""
        try:
            self._start_guest(source_runstate, told)
        except MachineError as error:
            self.error = MachineError(f"the guest is here but does not start ({error}): mend that, then use 'cont'")
            print(f"migration: {self.error}", file=sys.stderr)
            self._machine.set_runstate(RunState.PAUSED)
        trace.vmstate_downtime_checkpoint("dst-precopy-bh-vm-started")

    def _load_devices(self) -> None:
        assert self._loader is not None
        try:
            self._machine.load_device_state(self._loader.staged)
        except MachineError as error:
            raise self._loader.placed(error) from error

    # ---- postcopy: the guest runs before its memory is here ----

    def _settle(self) -> None:
        """Put the device state of a package into effect, before the source hears that it was loaded."""
        assert self._loader is not None and self._postcopy is not None
        self._postcopy.serve()
        if self._loader.staged:
            self._load_devices()
            self._loader.staged.clear()
        self._postcopy.settled()

    def _run_postcopy(self) -> None:
        """RUN has come: the guest is here, whatever happens to the connection."""
        assert self._postcopy is not None
        self._start(RunState.RUNNING, True)
        time.sleep(HEAD_START_S)  # the guest has the processors first
        self._standstill.close()
        self._postcopy.finish()
        self._states.advance(MigrationStatus.POSTCOPY_ACTIVE, MigrationStatus.COMPLETED)
        try:
            self._answer(commands.Shut(0))
        except ChannelError as error:
            print(f"migration: the guest is complete, but the source could not be told ({error})", file=sys.stderr)

    def pause(self) -> None:
        """What `migrate-pause` does on this side."""
        if self._postcopy is None:
            raise StateError(
                "migrate-pause is currently only supported during postcopy-active or postcopy-recover state",
                state=self._states.status,
            )
        self._postcopy.pause()

    def recover(self, address: Address) -> None:
        """Wait for the source of a postcopy that is paused, at *address*."""
        if self._postcopy is None:
            raise StateError("Migrate recover can only be run when postcopy is paused.", state=self._states.status)
        self._postcopy.recover(
            lambda quit_fd: incoming(address, quit_fd, self._take_fd, tls=self._tls, open_path=self._open_path)
        )

    def _receive(self, landing: Landing) -> Receivers:
        """Begin to load from the channels of multifd."""
        assert self._arrivals is not None and self._quit is not None
        receivers = Receivers(self._arrivals.channels, landing, self._options, self._quit.fd, self._quit.set)
        if not self._options.capability("postcopy-preempt"):  # then one more is to come
            self._arrivals.watch(receivers.fail)
        return receivers

    def _end_packets(self) -> None:
        """All that comes by channels of multifd is here: raises what one failed of, or has left unsynced."""
        if self._arrivals is None or self._loader is None:
            return
        if self._arrivals.is_watched or self._loader.receivers is not None:
            self._arrivals.check_surplus()
        if self._loader.receivers is not None:
            self._loader.receivers.complete()
        if not self._options.capability("postcopy-preempt"):  # whose channel may still come
            self._stop_listening()

    def _stop_listening(self) -> None:
        """Before it is told that this has ended: the address is free for another then."""
        if self._listener is not None:
            self._listener.close()

    def _error_beside(self) -> MigrationError | None:
        """Why the load was told to end, if it was by one of the threads that belong to it."""
        if self._arrivals is not None and (mismatch := self._arrivals.mismatch()) is not None:
            return mismatch
        receivers = self._loader.receivers if self._loader is not None else None
        return receivers.error if receivers is not None else None

    def _stop_receivers(self) -> None:
        """Nobody else writes to guest memory or uses a channel any more."""
        assert self._quit is not None
        self._quit.set()
        if self._arrivals is not None:
            self._arrivals.end_watch()
        if self._loader is not None and self._loader.receivers is not None:
            self._loader.receivers.stop()
        if self._arrivals is not None:
            self._arrivals.close()
            self._arrivals = None

    def _look_round(self) -> None:
        assert self._quit is not None
        if self._quit.is_set():
            raise MigrationCancelled("the process ends")

    def _open_return_path(self) -> None:
        assert self._channel is not None and self._postcopy is not None
        if self._postcopy.answers.is_open:
            return  # the source asked twice: it is open
        if not self._channel.is_two_way():
            raise ChannelError(
                f"the source asks for a return path, {self._channel.kind} '{self._channel.name}' has none: "
                f"use a socket, or switch off capability 'return-path' on the source",
                channel=self._channel.name,
            )
        self._postcopy.answers.attach(self._channel)
        if self._options.capability("switchover-ack") and self._options.migration_property("switchover-ack-legacy"):
            self._answer(commands.SwitchoverAck())  # no device here has to be asked first

    def _pong(self, value: int) -> None:
        if self._postcopy is None or not self._postcopy.answers.is_open:
            raise ChannelError(f"the source sent PING {value:#x} before it had opened the return path")
        self._answer(commands.Pong(value))

    def _answer(self, message: commands.ReturnMessage) -> None:
        assert self._postcopy is not None
        self._postcopy.answers.send(commands.encode_return_message(message))

    def _tell_source(self) -> bool:
        """Say that the guest is taken; False when that could not be said."""
        if self._postcopy is None or not self._postcopy.answers.is_open:
            return True  # the source does not wait for a word
        try:
            self._answer(commands.Shut(0))
        except ChannelError as error:
            self.error = ChannelError(
                f"the connection was lost before the source could be told that the guest is here ({error}): "
                f"the guest is complete and stays stopped; make sure that it does not run at the source, then use 'cont'"
            )
            print(f"migration: {self.error}", file=sys.stderr)
            return False
        return True

    def _start_guest(self, source_runstate: RunState | None, told: bool) -> None:
        """Enter the run state that the source's was in (state-machine.md §5)."""
        state = source_runstate or RunState.RUNNING
        with self._lock:
            if state not in (RunState.RUNNING, RunState.SUSPENDED):
                self._machine.set_runstate(state)
            elif not (self._autostart and told):
                self._machine.set_runstate(RunState.PAUSED)
            elif state is RunState.SUSPENDED:  # it sleeps on, but it is no longer stopped
                self._machine.set_runstate(state)
                self._emit("RESUME", None)
            else:
                self._machine.start()

    def _explained(self, error: StreamError | ChannelError) -> MigrationError:
        """*error*, and what it may mean when the source was gone before it had sent any contents."""
        if (mismatch := self._mismatch()) is not None:
            return mismatch
        if getattr(error, "remedy", "") or self._channel is None or self._loader is None or self._loader.has_contents:
            return error
        if self._channel.kind != "socket" or not has_hung_up(self._channel.read_fd):
            return error
        return StreamError(str(error), offset=getattr(error, "offset", None), remedy=remedies.for_early_end())

    def _mismatch(self) -> MigrationError | None:
        """Why a source may have gone that has opened channels which it should not have; nobody looks out after that."""
        if self._arrivals is None or not self._arrivals.is_watched:
            return None
        try:
            self._arrivals.check_surplus()
        except StreamError as mismatch:
            return mismatch
        except (ChannelError, MigrationCancelled):
            pass  # nothing that would explain it
        return None

    def _fail(self, error: MigrationError) -> None:
        self.error = error
        trace.migrate_error(error)
        if self._postcopy is not None and self._postcopy.phase in (Phase.RUNNING, Phase.END):
            return  # the guest is here and nowhere else, all of it that there is
        if self._postcopy is not None:
            self._postcopy.release_waiters()
            with suppress(ChannelError, MigrationCancelled):  # the end of the connection says the same
                self._answer(commands.Shut(1))
        self._stop_receivers()
        self._stop_listening()
        self._machine.discard_ram()
        self._states.advance_from_any(MigrationStatus.FAILED)

    def _clean_up(self) -> None:
        assert self._quit is not None
        self._standstill.close()
        self._stop_receivers()
        if self._postcopy is not None:
            self._blocktime = describe_blocktime(self._postcopy, self._options)
            self._postcopy.close()
            self._postcopy = None
        self._loader = None
        self._stop_listening()
        self._listener = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._quit.close()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _announce(self, status: MigrationStatus) -> None:
        if self._options.capability("events"):
            self._emit("MIGRATION", {"status": status.value})


def describe_blocktime(postcopy: PostcopyDestination, options: MigrationOptions) -> dict[str, Any]:
    """Who waited for pages, in the words of query-migrate, when that was asked for (qmp.md §5)."""
    times = postcopy.times
    if times is None or not options.capability("postcopy-blocktime"):
        return {}
    return {
        "postcopy-blocktime": times.all_blocked_ns() // 1_000_000,
        "postcopy-vcpu-blocktime": [ns // 1_000_000 for ns in times.vcpu_blocked_ns()],
        "postcopy-latency": times.mean_latency_ns(),
        "postcopy-latency-dist": times.distribution(),
        "postcopy-vcpu-latency": times.vcpu_latency_ns(),
        "postcopy-non-vcpu-latency": times.other_latency_ns(),
    }
