"""The destination's postcopy: from the advice to the last page, over any number of connections (postcopy.md §3, §6, §8).

    none ─▶ advise ─▶ discard ─▶ listening ─▶ running ─▶ end
              └───────────────────▲

    advise      it may come: the host was asked whether it can
    discard     what is stale was given back; the guest will not run here before the rest is known
    listening   missing pages are asked for; device state is put into effect.  Until it is, a failure is a refusal: the
                source is told, or sees the connection end without an answer to its last ping, and goes on
    running     the guest is here and nowhere else.  A connection that breaks costs nothing: both sides pause
    end         every page is here

                     RUN                    the link breaks            migrate-recover, a connection
    postcopy-device ─────▶ postcopy-active ─────────────────▶ paused ──────────────────────────────▶ recover ─┐
                                  ▲                              ▲ the link breaks again                │    │
                                  └──────────────────────────────┴──────────────────────────────────────┘◀──┘ RESUME

Threads   `mig/dst/main` advises, discards, listens, runs, and joins the others in `finish` or `close`
          `mig/dst/fault` asks for what is touched; `mig/dst/listen` reads the main channel from LISTEN on, pauses and
          recovers; `mig/dst/preempt` places urgent pages
          `pause` and `recover` may come from any thread
"""

from __future__ import annotations

import contextlib
import enum
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from .. import trace
from ..channels.channel import Channel, QuitEvent, has_hung_up
from ..channels.connect import Listener
from ..errors import ChannelError, MachineError, MigrationCancelled, MigrationError, StateError, StreamError
from ..machine import Machine
from ..options import MigrationOptions
from ..postcopy import discard
from ..postcopy.answers import Answers
from ..postcopy.blocktime import FaultTimes
from ..postcopy.faults import FaultServer
from ..postcopy.place import MissingMemory, PageReceiver
from ..postcopy.uffd import THREAD_ID, Userfaultfd
from ..qapi import MigrationStatus
from ..ram.block import RAMBlock
from ..savevm import commands, remedies
from ..states import StatusMachine
from ..threads import start_thread
from ..wire.format import TARGET_PAGE_SIZE
from ..wire.stream import InputStream
from .support import check_block, check_registration, check_support, page_size_summary

if TYPE_CHECKING:
    from .loader import StreamLoader

CHECK_S = 0.2  # how often to look whether the source is still there, where nothing tells
SETTLE_S = 0.02  # how long the start of the guest is waited for before pages that nobody waits for are read …
HEAD_START_S = 0.004  # … and then how long it has the processors for what it touches first
MOMENT_S = 0.01  # between two looks at what is still on its way by the other channel
BY_USER = "Postcopy migration is paused by the user"
LOST = (
    "the guest runs here, and {count} pages of its memory are still at the source: 'migrate-recover' here and 'migrate' "
    "with resume=true there go on; if the source is gone for good, the guest stops for ever at the first that it touches"
)


class Phase(enum.Enum):
    """How far the incoming postcopy has come."""

    NONE = "none"
    ADVISE = "advise"
    DISCARD = "discard"
    LISTENING = "listening"
    RUNNING = "running"
    END = "end"


AFTER_LISTEN = (Phase.LISTENING, Phase.RUNNING, Phase.END)


class PostcopyDestination:
    """Postcopy of one incoming migration.

    *listener* is where the source connects, for as long as more channels may come; *answers* the return path.  Before
    anything may be missing, *end_packets* makes sure that all that came by channels of multifd is here; *hold_events* is
    called when only the device state is left to come.
    """

    def __init__(
        self,
        machine: Machine,
        options: MigrationOptions,
        states: StatusMachine,
        *,
        channel: Channel,
        listener: Listener,
        quit_event: QuitEvent,
        end_packets: Callable[[], None],
        hold_events: Callable[[], None],
    ) -> None:
        # set before any thread starts
        self._machine = machine
        self._options = options
        self._states = states
        self._quit = quit_event
        self._end_packets = end_packets
        self._hold_events = hold_events
        self._fresh = {block.idstr for block in machine.ram_blocks if block.fresh}
        self.answers = Answers()
        # under the lock
        self._changed = threading.Condition()
        self._listening = threading.Event()  # memory is registered, or nothing is waited for any more
        self._phase = Phase.NONE
        self._failure: MigrationError | None = None  # why the guest will never run here
        self._channel = channel
        self._preempt_channel: Channel | None = None
        self._listener: Listener | None = listener
        self._lent = (channel, listener)  # whoever gave them closes them
        self._link_quit: QuitEvent | None = None  # of the connection that a recovery made
        self._started = False  # the guest was told to run
        self._settled = False  # device state is in effect, and the source is about to hear of it
        self._paused_by_user = False
        self._complete = False  # every page is here
        self.error: MigrationError | None = None  # why it is paused
        # the threads' own
        self._memory: MissingMemory | None = None
        self._faults: FaultServer | None = None
        self._fault_quit = QuitEvent()
        self._rest: StreamLoader | None = None
        self._receiver: PageReceiver | None = None
        self._fault_thread: threading.Thread | None = None
        self._listen_thread: threading.Thread | None = None
        self._preempt_thread: threading.Thread | None = None

    # ---- for others ----

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def times(self) -> FaultTimes | None:
        """Who waited for pages; None before anything was discarded."""
        return self._memory.times if self._memory is not None else None

    def pause(self) -> None:
        """Break the connection, as `migrate-pause` asks; both sides can recover."""
        with self._changed:
            if self._states.status not in (MigrationStatus.POSTCOPY_ACTIVE, MigrationStatus.POSTCOPY_RECOVER):
                raise StateError(
                    "migrate-pause is currently only supported during postcopy-active or postcopy-recover state",
                    state=self._states.status,
                )
            self._paused_by_user = True
            self._shut_link()

    def shut_link(self) -> None:
        """Break the connection, whatever comes of it."""
        with self._changed:
            self._shut_link()

    def recover(self, listen: Callable[[int], Listener]) -> None:
        """Wait for the source anew, at what *listen* binds when it is given a quit descriptor."""
        with self._changed:
            if self._states.status is not MigrationStatus.POSTCOPY_PAUSED:
                raise StateError("Migrate recover can only be run when postcopy is paused.", state=self._states.status)
            quit_event = QuitEvent()
            try:
                listener = listen(quit_event.fd)
            except MigrationError:
                quit_event.close()
                raise
            if self._link_quit is not None:
                self._link_quit.set()  # whoever waits at an earlier one
            self._listener, self._link_quit = listener, quit_event
            self._changed.notify_all()

    @property
    def listener(self) -> Listener | None:
        """Where the source is waited for, in a recovery."""
        return self._listener

    def stop_waiting(self) -> None:
        """End all waiting: the process is about to exit."""
        with self._changed:
            if self._link_quit is not None:
                self._link_quit.set()
            self._changed.notify_all()
        self._listening.set()

    def _shut_link(self) -> None:
        for channel in (self._channel, self._preempt_channel):
            if channel is not None:
                channel.shutdown()

    # ---- `mig/dst/main`: the commands of the source ----

    def take(self, command: commands.Command, offset: int, loader: StreamLoader) -> bool:
        """Obey a command of postcopy; False when it is none."""
        if isinstance(command, commands.PostcopyAdvise) and command.page_size_summary is not None:
            self._advise(command, offset, loader)
        elif isinstance(command, commands.PostcopyRamDiscard):
            self._discard(command, offset, loader)
        elif isinstance(command, commands.PostcopyListen):
            self._listen(offset, loader)
        elif isinstance(command, commands.PostcopyRun):
            self._run(offset)
        elif isinstance(command, commands.RecvBitmap):
            self._answer_bitmap(command, offset)
        elif isinstance(command, commands.PostcopyResume):
            self._resume()
        else:
            return False
        return True

    def _require(self, what: str, offset: int, *phases: Phase) -> None:
        if self._phase not in phases:
            expected = " or ".join(f"'{phase.value}'" for phase in phases)
            raise StreamError(
                f"{what} at offset {offset:#x} in postcopy phase '{self._phase.value}', expected {expected}", offset=offset
            )

    def _advise(self, command: commands.PostcopyAdvise, offset: int, loader: StreamLoader) -> None:
        self._require("POSTCOPY_ADVISE", offset, Phase.NONE)
        what = f"{command.type.name} at offset {offset:#x}"
        if not self._options.capability("postcopy-ram"):
            remedy = remedies.for_capability("postcopy-ram", on_here=False)
            text = f"{what}: the source has capability 'postcopy-ram' on, RAM postcopy is disabled here"
            raise StreamError(text, offset=offset, remedy=remedy)
        here = page_size_summary(self._machine.ram_blocks), TARGET_PAGE_SIZE
        there = command.page_size_summary, command.target_page_size
        if here != there:
            raise StreamError(
                f"{what}: host and target pages of {there[0]:#x} and {there[1]:#x} bytes at the source, "
                f"{here[0]:#x} and {here[1]:#x} here, expected the same (the first is the OR of those of all RAM blocks)",
                offset=offset,
            )
        check_support(self._machine)
        for block in self._machine.ram_blocks:
            check_block(block, block.idstr in self._fresh)
            if block.idstr not in self._fresh:
                discard.forget_range(block, 0, block.used_length)
        check_registration(self._machine.ram_blocks)
        loader.landing.postcopy_advised = True
        self._phase = Phase.ADVISE
        trace.loadvm_postcopy_handle_advise()
        if self._options.capability("postcopy-preempt"):
            self._preempt_thread = start_thread("mig/dst/preempt", self._receive_urgent)
        # only now: this thread looks whether there is one for urgent pages
        self._listen_thread = start_thread("mig/dst/listen", self._listen_to_source)

    def _discard(self, command: commands.PostcopyRamDiscard, offset: int, loader: StreamLoader) -> None:
        self._require("POSTCOPY_RAM_DISCARD", offset, Phase.ADVISE, Phase.DISCARD)
        what = f"POSTCOPY_RAM_DISCARD at offset {offset:#x}"
        index, block = self._find(command.block, what, offset)
        if self._phase is Phase.ADVISE:
            self._begin_discard(loader)
        for start, length in command.ranges:
            if start % block.page_size or length % block.page_size or not length or start + length > block.used_length:
                raise StreamError(
                    f"{what}: {length:#x} bytes at {start:#x} of block '{block.idstr}', "
                    f"expected whole host pages of {block.page_size:#x} bytes below {block.used_length:#x}",
                    offset=offset,
                )
            discard.forget_received(block, loader.landing.received[index], start, length)

    def _begin_discard(self, loader: StreamLoader) -> None:
        """Make ready for what is going to be missing, while the guest may still run at the source."""
        for block in self._machine.ram_blocks:
            discard.allow_huge_pages(block, False)
        times = FaultTimes(self._machine.vcpu_thread_ids())
        self._memory = MissingMemory(loader.landing, Userfaultfd(THREAD_ID), times)
        self._faults = FaultServer(self._memory, self.answers, self._fault_quit.fd)
        self._fault_thread = start_thread("mig/dst/fault", self._faults.serve)
        self._phase = Phase.DISCARD
        self._hold_events()

    def _find(self, name: str, what: str, offset: int) -> tuple[int, RAMBlock]:
        for index, block in enumerate(self._machine.ram_blocks):
            if block.idstr == name:
                return index, block
        known = ", ".join(f"'{block.idstr}'" for block in self._machine.ram_blocks)
        raise StreamError(f"{what}: block '{name}' does not exist here, this machine has {known}", offset=offset)

    def _listen(self, offset: int, loader: StreamLoader) -> None:
        self._require("POSTCOPY_LISTEN", offset, Phase.ADVISE, Phase.DISCARD)
        if not self.answers.is_open:
            raise StreamError(f"POSTCOPY_LISTEN at offset {offset:#x}: there is no return path to ask for pages by")
        if self._phase is Phase.ADVISE:
            self._begin_discard(loader)
        assert self._memory is not None
        if self._preempt_thread is not None:
            self._await_preempt()
        self._end_packets()
        self._memory.register()
        self._use(loader.stream, loader)
        trace.loadvm_postcopy_handle_listen()
        self._states.advance(MigrationStatus.ACTIVE, MigrationStatus.POSTCOPY_DEVICE)
        self._phase = Phase.LISTENING
        self._listening.set()

    def serve(self) -> None:
        """Have the main channel read, if missing pages come by it alone: to put device state into effect may touch some."""
        if self._preempt_thread is None:
            with self._changed:
                self._changed.notify_all()

    def _await_preempt(self) -> None:
        """Until the channel of urgent pages is here: the source connects it before it stops the guest."""
        with self._changed:
            while self._preempt_channel is None and not self._quit.is_set():
                self._changed.wait(CHECK_S)
                if has_hung_up(self._channel.read_fd):
                    raise ChannelError("the source has gone without having opened the channel of urgent pages")

    def _use(self, stream: InputStream, loader: StreamLoader) -> None:
        """Read *stream* from now on, as one that *loader* has begun."""
        assert self._memory is not None
        stream.channel.keep_short()
        self._receiver = PageReceiver(stream, self._memory, forgets=self._has_old_preempt())
        self._rest = loader.for_postcopy(stream, self._receiver)

    def _has_old_preempt(self) -> bool:
        return self._options.capability("postcopy-preempt") and self._options.migration_property("x-preempt-pre-7-2")

    def settled(self) -> None:
        """Device state is in effect: once the source has been told, the guest is here."""
        with self._changed:
            self._raise_failure()
            self._settled = True

    def _run(self, offset: int) -> None:
        self._require("POSTCOPY_RUN", offset, Phase.LISTENING)
        trace.loadvm_postcopy_handle_run()
        with self._changed:
            self._raise_failure()
            self._settled = True
            self._phase = Phase.RUNNING
            self._states.advance(MigrationStatus.POSTCOPY_DEVICE, MigrationStatus.POSTCOPY_ACTIVE)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def finish(self) -> None:
        """The guest was started: wait until all of it is here.  Raises MigrationCancelled when the process ends before."""
        with self._changed:
            self._started = True
            self._changed.notify_all()
        assert self._listen_thread is not None
        self._listen_thread.join()
        if self._phase is not Phase.END:
            raise MigrationCancelled("the process ends")

    def release_waiters(self) -> None:
        """The guest will not run here: whoever waits for a page goes on, and finds it zero."""
        if self._memory is not None:
            with contextlib.suppress(MachineError):
                self._memory.unregister()

    def close(self) -> None:
        """Give everything back; the quit event is set."""
        self.stop_waiting()
        self._stop_threads()
        if self._memory is not None:
            self._memory.uffd.close()
        for block in self._machine.ram_blocks if self._phase is not Phase.NONE else ():
            discard.allow_huge_pages(block, True)
        self._close_link()
        self._fault_quit.close()

    def _stop_threads(self) -> None:
        self.shut_link()
        self._fault_quit.set()
        current = threading.current_thread()
        preempt, self._preempt_thread = self._preempt_thread, None
        for thread in (self._fault_thread, self._listen_thread, preempt):
            if thread is not None and thread is not current:
                thread.join()

    # ---- `mig/dst/listen`: the main channel after LISTEN ----

    def _listen_to_source(self) -> None:
        if not self._await_turn():
            return
        trace.postcopy_ram_listen_thread_start()
        try:
            while not self._load_rest():
                self._await_recovery()
            self._end()
        except MigrationCancelled:
            pass  # the process ends; `finish` says so
        except MigrationError as error:
            self._refuse(error)
        finally:
            trace.postcopy_ram_listen_thread_exit()

    def _await_turn(self) -> bool:
        """Until LISTEN has come; False when it does not.

        Where a page that the guest waits for comes by another channel, the processors are left to its start as well.
        Nobody wakes this thread for that: it looks now and then, and being woken costs what it is to save.
        """
        with self._changed:
            if self._preempt_thread is None:
                self._changed.wait_for(lambda: self._phase in AFTER_LISTEN or self._quit.is_set())
                return self._phase in AFTER_LISTEN
            before = Phase.NONE
            while before not in AFTER_LISTEN and not self._started and not self._quit.is_set():
                before = self._phase
                self._changed.wait(SETTLE_S)
            if self._started:
                self._changed.wait(HEAD_START_S)
            return self._phase in AFTER_LISTEN

    def _load_rest(self) -> bool:
        """Read until the end: True; False when the connection was lost and can be recovered."""
        assert self._rest is not None
        try:
            self._rest.load_rest()
            self._check_complete()
            return True
        except MigrationCancelled:
            if self._quit.is_set():
                raise
            return self._pause(ChannelError("the connection was given up"))
        except (ChannelError, StreamError, MachineError) as error:
            return self._pause(error)

    def _check_complete(self) -> None:
        """The source says that it has sent everything: believe what has arrived, urgent pages by their own channel."""
        assert self._memory is not None and self._rest is not None
        urgent = self._preempt_thread
        while (missing := self._memory.missing_pages()) and urgent is not None and urgent.is_alive():
            with self._changed:
                self._changed.wait(MOMENT_S)
        if missing:
            offset = self._rest.stream.offset
            raise StreamError(f"the source ends at offset {offset:#x} and has not sent {missing} pages", offset=offset)

    def _pause(self, error: MigrationError) -> bool:
        with self._changed:
            if not self._settled:
                self._failure = error
                raise error
            # RUN is in the package, which is here already
            self._changed.wait_for(lambda: self._phase is not Phase.LISTENING or self._quit.is_set())
            self.error = ChannelError(BY_USER if self._paused_by_user else f"{error}; {self._what_is_missing()}")
            self._paused_by_user = False
            self._shut_link()
        self.answers.detach()
        if self._preempt_thread is not None:
            if self._link_quit is not None:
                self._link_quit.set()  # it may wait for a channel that did not come
            self._preempt_thread.join()
        self._close_link()
        for status in (MigrationStatus.POSTCOPY_ACTIVE, MigrationStatus.POSTCOPY_RECOVER):
            self._states.advance(status, MigrationStatus.POSTCOPY_PAUSED)
        trace.postcopy_pause_incoming(self.error)
        print(f"migration: postcopy is paused: {self.error}", file=sys.stderr)
        return False

    def _what_is_missing(self) -> str:
        assert self._memory is not None
        return LOST.format(count=self._memory.missing_pages())

    def _close_link(self) -> None:
        with self._changed:
            for closing in (self._channel, self._preempt_channel, self._listener):
                if closing is not None and closing not in self._lent:
                    closing.close()
            self._preempt_channel = self._listener = None
            if self._link_quit is not None:
                self._link_quit.close()
                self._link_quit = None

    def _await_recovery(self) -> None:
        """Until the source is here again."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._listener is not None or self._quit.is_set())
                if self._quit.is_set():
                    raise MigrationCancelled("the process ends")
                listener, alarm = self._listener, self._link_quit
            assert listener is not None and alarm is not None
            try:
                channel = listener.accept(speaks=True)
            except MigrationCancelled:
                listener.close()  # another one has taken its place, or the process ends
                alarm.close()
                continue
            self._begin_recovery(channel)
            trace.postcopy_pause_incoming_continued()
            return

    def _begin_recovery(self, channel: Channel) -> None:
        assert self._rest is not None
        with self._changed:
            self._channel = channel
        self.answers.attach(channel)
        self._use(InputStream(channel), self._rest)
        self._states.advance(MigrationStatus.POSTCOPY_PAUSED, MigrationStatus.POSTCOPY_RECOVER)
        if self._options.capability("postcopy-preempt"):
            self._preempt_thread = start_thread("mig/dst/preempt", self._receive_urgent)

    def _answer_bitmap(self, command: commands.RecvBitmap, offset: int) -> None:
        index, block = self._find(command.block, f"RECV_BITMAP at offset {offset:#x}", offset)
        if self._states.status is not MigrationStatus.POSTCOPY_RECOVER:
            print(f"migration: RECV_BITMAP outside of a recovery is ignored, at offset {offset:#x}", file=sys.stderr)
            return
        assert self._memory is not None
        words = memoryview(self._memory.received[index]).cast("B")
        bitmap = bytes(words[: -(-(block.used_length // TARGET_PAGE_SIZE) // 64) * 8])
        self.answers.send(commands.encode_return_message(commands.ReceivedBitmap(block.idstr, bitmap)))

    def _resume(self) -> None:
        if not self._states.advance(MigrationStatus.POSTCOPY_RECOVER, MigrationStatus.POSTCOPY_ACTIVE):
            print("migration: POSTCOPY_RESUME outside of a recovery is ignored", file=sys.stderr)
            return
        assert self._faults is not None
        trace.loadvm_postcopy_handle_resume()
        self.error = None
        self.answers.send(commands.encode_return_message(commands.ResumeAck()))
        self._faults.ask_again()

    def _refuse(self, error: MigrationError) -> None:
        """The guest will not run here: let whoever waits for a page go on, and find that out."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()
        self.release_waiters()

    def _end(self) -> None:
        """Every page is here."""
        assert self._memory is not None
        with self._changed:
            self._changed.wait_for(lambda: self._phase is not Phase.LISTENING or self._failure is not None)
            self._raise_failure()
            self._complete = True
            if self._preempt_channel is not None:
                self._preempt_channel.shutdown()
        if self._preempt_thread is not None:
            self._preempt_thread.join()
        self._fault_quit.set()
        assert self._fault_thread is not None
        self._fault_thread.join()
        self._memory.unregister()
        self._phase = Phase.END

    # ---- `mig/dst/preempt`: urgent pages ----

    def _receive_urgent(self) -> None:
        try:
            with self._changed:
                listener = self._listener
            if listener is None:
                return
            channel = listener.accept(speaks=False)
            with self._changed:
                self._preempt_channel = channel
                self._changed.notify_all()
            stream = InputStream(channel, eager=False)  # the next page comes when the guest has touched it
            stream.peek(1)  # nobody has to wake this thread before there is something to do
            self._listening.wait()
            if self._memory is not None and not self._quit.is_set():
                PageReceiver(stream, self._memory).load_channel()
        except MigrationCancelled:
            pass
        except (ChannelError, StreamError, MachineError) as error:
            if self._complete:
                return  # it was ended here, which not every kind of channel takes for an ordinary end
            print(f"migration: the channel of urgent pages has failed: {error}", file=sys.stderr)
            self.shut_link()  # the main channel's reader pauses
