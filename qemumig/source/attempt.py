"""One attempt to migrate, in its own thread `mig/src/main`: from the connection to the last word, or all the way back.

    connect ─▶ setup ─▶ rounds ─▶ stop the guest ─▶ [pause] ─▶ last pages, devices ─▶ ▌the last write▐ ─▶ confirmation
                                                                                     ▲
                                        a cancel or an error before this point: the guest runs here again

The last write (the end mark and the description behind it) is what lets the destination start.  Where there is a return
path, it is made only after the destination has answered a ping sent behind everything else: so it has loaded all of the
guest, and nothing is left in the link's buffers whose fate would be unknown if the link broke.  From then on the guest
belongs to whoever the return path says:

    SHUT 0            completed
    SHUT 1, clean end failed, and the guest runs on here; an end that this side has brought about is none
    anything else     failed; the guest stays stopped on this side until a person decides (state-machine.md §5)

Threads   `mig/src/main` runs `_run`; `cancel` may come from any thread.  The owner joins with `join`.
Fields    set before start: machine, options, address · under the lock: _cancelled, _committed, _broken, _severed
          the rest: thread only
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .. import trace
from ..channels.channel import Channel, QuitEvent, wait_any
from ..errors import ChannelError, MachineError, MigrationCancelled, MigrationError, OptionError, StreamError
from ..machine import HoldEvents, Machine
from ..multifd.senders import Senders
from ..options import MigrationOptions
from ..qapi import MigrationStatus, RunState
from ..ram import live_multifd
from ..ram.live import RamSource
from ..ram.live_multifd import MultifdRamSource
from ..ram.mapped import MappedRamSource
from ..savevm import commands
from ..states import StatusMachine
from ..threads import start_thread
from ..wire.format import SectionType
from ..wire.stream import OutputStream
from .convergence import AutoConverge, DirtyRate, Pacer, SwitchoverRule
from .return_path import ITS_WORDS, ReturnPath, Verdict
from .writer import StreamWriter

PING_OPENED = 1  # the first one, as QEMU numbers it
PING_ALL_LOADED = 0x10  # behind the last section: its answer says that all of them were loaded
HUNG_UP = (errno.EPIPE, errno.ECONNRESET)  # how a destination that refuses looks to who still writes
LONGEST_ROUND_S = 5.0
LAST_WORD_S = 2.0  # for what the destination said before it closed the connection, which a busy host delivers late
APPROVAL_S = 0.05  # for the destination's approval of the switchover, before the guest's writes are looked at again
ANSWER_AFTER_CANCEL_S = 10.0  # how long a cancel that came too late waits for the destination's word

UNKNOWN_OUTCOME = (
    "the connection was lost after the last byte, before the destination said whether it has taken the guest: "
    "the guest stays stopped here; make sure that it does not run at the destination, then use 'cont'"
)


class Attempt:
    """One attempt.  *open_channel* gives the connected channel, and may wait; *quit* is the alarm it listens to."""

    thread_name = "mig/src/main"
    _logs_writes = True  # the hypervisor's log tells what the guest writes meanwhile

    def __init__(
        self,
        machine: Machine,
        options: MigrationOptions,
        states: StatusMachine,
        open_channel: Callable[[], Channel],
        quit_event: QuitEvent,
        on_pass: Callable[[int], None],
        hold_events: HoldEvents,
    ) -> None:
        self.machine = machine
        self.options = options
        self.error: MigrationError | None = None
        self.start_s = time.monotonic()
        self.setup_s: float | None = None  # how long setup took
        self.downtime_s: float | None = None
        self.total_s: float | None = None
        self.ram: RamSource | None = None
        self.pacer = Pacer(options, quit_event.fd)
        self.dirty_rate = DirtyRate()
        self.converge = AutoConverge(options, machine.throttle_vcpus)
        self._synced_s = 0.0
        self.precopy_bytes = 0
        self.writer: StreamWriter | None = None
        self._states = states
        self._open_channel = open_channel
        self._quit = quit_event
        self._proceed = QuitEvent()  # set by `migrate-continue`
        self._on_pass = on_pass
        self._hold_events = hold_events
        self._lock = threading.Lock()
        self._cancelled = False
        self._committed = False  # the last write has begun
        self._broken = False  # before there was a connection
        self._severed = False  # by us, or by a failure that was seen here first: how the return path ends means nothing
        self._channel: Channel | None = None
        self._return_path: ReturnPath | None = None
        self._senders: Senders | None = None  # of multifd
        self._noted_runstate: RunState | None = None  # before the guest was stopped for the switchover
        self._logging = False
        self._stop_s = 0.0
        self._thread: threading.Thread | None = None

    # ---- for others ----

    def start(self) -> None:
        self._thread = start_thread(self.thread_name, self._run)

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def abandon(self) -> None:
        """End all waiting, whatever comes of it: the process is about to exit."""
        self._quit.set()

    def cancel(self) -> None:
        """Wake the thread wherever it waits.  After the last write the answer of the destination still decides."""
        with self._lock:
            self._cancelled = True
            if not self._committed:
                self._quit.set()
                if self._channel is not None:
                    self._channel.shutdown()
            elif self._channel is not None:
                self._channel.finish()

    def break_connection(self) -> None:
        """As if the network had broken; a connection that is not there yet never will be."""
        with self._lock:
            if self._channel is not None:
                self._severed = True
                self._shut_channels(self._channel)
            else:
                self._broken = True
                self._quit.set()

    def _shut_channels(self, main: Channel) -> None:
        """Let nobody wait any more for bytes, or for room for them."""
        main.shutdown()
        if self._senders is not None:
            self._senders.break_connections()

    def proceed(self) -> None:
        """Go on from the pause before the switchover."""
        self._proceed.set()

    @property
    def switching(self) -> bool:
        """True from the moment at which the guest is stopped for the switchover."""
        return self._noted_runstate is not None

    @property
    def transferred(self) -> int:
        """Bytes of the whole stream, on all channels."""
        return self.ram.sent_bytes if self.ram is not None else 0

    @property
    def pages(self) -> tuple[int, int]:
        """Pages sent as zero, and in full."""
        return (self.ram.zero_pages, self.ram.normal_pages) if self.ram is not None else (0, 0)

    @property
    def postcopy_bytes(self) -> int:
        """Of `transferred`, those after the guest was handed over."""
        return 0

    @property
    def postcopy_requests(self) -> int:
        """Pages that the destination has asked for."""
        return 0

    # ---- the thread ----

    def _run(self) -> None:
        try:
            self._migrate()
        except MigrationCancelled:
            self._give_up(self._reason_to_quit())
        except MigrationError as error:
            self._give_up(error)
        except Exception as error:  # a defect of ours must not leave the guest stopped
            self._give_up(MigrationError(f"internal error while migrating: {error!r}"))
            raise
        finally:
            trace.migration_thread_after_loop()
            self._clean_up()
            trace.migration_cleanup()

    def _reason_to_quit(self) -> MigrationError | None:
        """Why everybody was told to quit, when it was no cancel."""
        if self._broken:
            return ChannelError("the connection was broken off before it was made")
        return self._senders.error if self._senders is not None else None

    def _migrate(self) -> None:
        setup_start_s = time.monotonic()
        self._connect()
        self._set_up()
        self.setup_s = time.monotonic() - setup_start_s
        self._move(MigrationStatus.SETUP, MigrationStatus.ACTIVE)
        trace.migration_thread_setup_complete()
        self._send_rounds()
        self._switch_over()

    def _switch_over(self) -> None:
        """Stop the guest, and move all that is left of it."""
        with self._standing_still():
            self._stop_guest()
            self._enter_device()
            self._send_rest()
            assert self.writer is not None and self._noted_runstate is not None
            self._commit(self.writer.write_devices(self.machine, self._noted_runstate))
        self._confirm()

    def _standing_still(self) -> AbstractContextManager[None]:
        """Around the time without a guest: nobody is told of it just then, unless it is a pause that somebody wants."""
        return nullcontext() if self.options.capability("pause-before-switchover") else self._hold_events()

    def _move(self, expected: MigrationStatus, new: MigrationStatus) -> None:
        if not self._states.advance(expected, new):
            raise MigrationCancelled("the migration was cancelled")

    def _connect(self) -> None:
        channel = self._open_channel()
        trace.migration_set_outgoing_channel(channel.kind, channel.name)
        with self._lock:
            self._channel = channel
            if self._cancelled:
                raise MigrationCancelled("the migration was cancelled")
        if self.machine.runstate is RunState.RUNNING:
            channel.share_core()
        self.writer = StreamWriter(OutputStream(channel), self.options)
        if self._wants_return_path(channel):
            self._return_path = ReturnPath(channel, self._return_path_has_ended)
            self._return_path.start()
        if self.options.capability("multifd") and not self.options.capability("mapped-ram"):
            self._open_senders()

    def _open_senders(self) -> None:
        """Open the channels of multifd, behind the main one."""
        in_channels = live_multifd.zero_page_detection(self.options) == "multifd"
        self._senders = Senders(self.options, detects_zero=in_channels, on_failure=self._quit.set)
        is_busy = self.machine.runstate is RunState.RUNNING
        # with a return path nothing can start the guest there before it is loaded, and a failure here means it never will
        waits = self._return_path is not None
        self._senders.open(self._open_channel, self.machine.uuid, is_busy=is_busy, all_will_be_loaded=waits)

    def _return_path_has_ended(self) -> None:
        """Who does not answer any more will never have the guest: let nobody wait for room on the way there."""
        with self._lock:
            if self._channel is not None and not self._committed:
                self._shut_channels(self._channel)

    def _wants_return_path(self, channel: Channel) -> bool:
        """Whether there is to be one: a default gives way to a transport that has none, a choice does not."""
        chosen = [name for name in ("switchover-ack", "postcopy-ram", "return-path") if self.options.is_chosen(name)]
        chosen = [name for name in chosen if self.options.capability(name)]
        if not chosen:
            return self.options.capability("return-path") and channel.can_return
        if not channel.is_two_way():
            raise OptionError(
                f"capability '{chosen[0]}' needs a transport that flows both ways, {channel.kind} '{channel.name}' "
                f"does not: switch the capability off or use a socket",
                name=chosen[0],
                value=True,
            )
        return True

    # ---- setup and rounds: the guest runs ----

    def _set_up(self) -> None:
        assert self.writer is not None
        machine = self.machine
        if self._logs_writes:
            self._logging = True
            machine.dirty_log.start()
        self.ram = self._new_ram()
        if self._logs_writes:
            self._sync()
        self.writer.write_head(machine)
        if self._return_path is not None:
            self.writer.command(commands.OpenReturnPath())
            self.writer.command(commands.Ping(PING_OPENED))
        self._advise()
        trace.savevm_state_setup()
        self.writer.begin_section(SectionType.QEMU_VM_SECTION_START)
        self.ram.write_block_list()
        self.writer.end_section()
        self.pacer.restart(self.ram.sent_bytes, 0)

    def _new_ram(self) -> RamSource:
        """All of RAM, on the way that the capabilities ask for."""
        assert self.writer is not None
        what = self.machine.ram_blocks, self.machine.dirty_log, self.writer.out, self.options
        if self._senders is not None:
            return MultifdRamSource(*what, self._senders)
        return MappedRamSource(*what) if self.options.capability("mapped-ram") else RamSource(*what)

    def _advise(self) -> None:
        """Tell the destination what may come besides precopy: nothing."""

    def _wants_postcopy(self) -> bool:
        """Whether the guest is to move before its memory has."""
        return False

    def _has_free_core(self) -> bool:
        """Whether neither this thread nor a vCPU has a use for one of the cores."""
        busy = 1 + (len(self.machine.vcpu_thread_ids()) if self.machine.runstate is RunState.RUNNING else 0)
        return len(os.sched_getaffinity(0)) > busy

    def _send_rounds(self) -> None:
        """Send PARTs until what is left can be sent while the guest stands still."""
        assert self.ram is not None
        if self._has_free_core():
            self.ram.start_scout()
        try:
            self._send_parts()
        finally:
            self.ram.end_scout()

    def _send_parts(self) -> None:
        """Send PARTs until it is time to stop the guest, or to move it before its memory."""
        assert self.writer is not None and self.ram is not None
        rule = SwitchoverRule()
        while not self._wants_postcopy():
            sent = self.ram.sent_bytes
            allowance = self.pacer.allowance(sent)
            if allowance:
                bandwidth = self.pacer.current_bandwidth(sent, self.ram.data_pages)
                threshold = self.pacer.threshold(bandwidth)
                if rule.may_sync(self.ram.remaining, threshold, bandwidth):
                    self._sync()
                    trace.migrate_pending_exact(self.ram.remaining, int(threshold), int(bandwidth))
                    if rule.is_time(self.ram.remaining, threshold, bandwidth) and self._may_switch():
                        trace.migration_thread_low_pending(self.ram.remaining)
                        return
                elif self._is_sync_due():
                    self._sync()
                trace.savevm_state_iterate()
                self.writer.begin_section(SectionType.QEMU_VM_SECTION_PART)
                self.ram.write_part(allowance)
                self.writer.end_section()
                self.precopy_bytes = self.ram.sent_bytes - self.ram.multifd_bytes
            if self._quit.is_set():
                raise MigrationCancelled("the migration was cancelled")
            if not self.pacer.allowance(self.ram.sent_bytes):
                self.pacer.wait()
            if self.pacer.update(self.ram.sent_bytes, self.ram.sent_pages, self.ram.data_pages):
                trace.migrate_transferred(self.ram.sent_bytes, int(self.pacer.bandwidth))

    def _is_sync_due(self) -> bool:
        """Whether a round takes so long that auto-converge would wait too long for its end (convergence.md §2)."""
        assert self.ram is not None
        is_long = time.monotonic() - self._synced_s > LONGEST_ROUND_S and self.ram.dirty.sync_count > 1
        return is_long and self.options.capability("auto-converge")

    def _may_switch(self) -> bool:
        """Whether the destination agrees; waits a little for that.  A guest that stands still need not be asked for."""
        asks = self.options.capability("switchover-ack") and self.options.migration_property("switchover-ack-legacy")
        if not asks or self.machine.runstate is not RunState.RUNNING:
            return True
        path = self._return_path
        assert path is not None
        if path.wait_approval(APPROVAL_S):
            return True
        if path.verdict is not None:
            text = "the return path ended before the destination had agreed to the switchover"
            raise path.error or ChannelError(text, channel=self._channel.name if self._channel else "")
        return False

    def _sync(self) -> None:
        assert self.ram is not None
        trace.migration_bitmap_sync_start()
        self.ram.dirty.sync()
        trace.migration_bitmap_sync_end(self.ram.dirty.synced_pages)
        self._synced_s = time.monotonic()
        period = self.dirty_rate.update(self.ram.dirty.new_pages, self.ram.sent_bytes)
        if period is not None:
            self.ram.end_period()
            self.converge.judge(period)
        self._on_pass(self.ram.dirty.sync_count)

    # ---- switchover: the guest is stopped ----

    def _stop_guest(self) -> None:
        self._stop_s = time.monotonic()
        trace.vmstate_downtime_checkpoint("src-downtime-start")
        self._noted_runstate = self.machine.stop(RunState.FINISH_MIGRATE)
        trace.vmstate_downtime_checkpoint("src-vm-stopped")

    def _enter_device(self) -> None:
        """Begin the switchover, with `pause-before-switchover` not before somebody says so."""
        if not self.options.capability("pause-before-switchover"):
            self._move(MigrationStatus.ACTIVE, MigrationStatus.DEVICE)
            return
        self._move(MigrationStatus.ACTIVE, MigrationStatus.PRE_SWITCHOVER)
        self._wait_to_proceed()
        self._move(MigrationStatus.PRE_SWITCHOVER, MigrationStatus.DEVICE)

    def _wait_to_proceed(self) -> None:
        """Until `migrate-continue`, a cancel, or the end of the connection: the guest must not stand still for nothing."""
        channel = self._channel
        assert channel is not None
        wanted = {self._proceed.fd: select.POLLIN, channel.write_fd: select.POLLRDHUP}
        if self._proceed.fd not in wait_any(wanted, self._quit.fd):
            text = f"{channel.kind} '{channel.name}' broke during the pause before the switchover"
            raise ChannelError(text, channel=channel.name, errno=errno.EPIPE)

    def _send_rest(self) -> None:
        assert self.writer is not None and self.ram is not None
        if self.options.migration_property("send-switchover-start"):
            self.writer.command(commands.SwitchoverStart())
        self._sync()
        self.writer.begin_section(SectionType.QEMU_VM_SECTION_END)
        self.ram.write_rest()
        self.writer.end_section()
        trace.vmstate_downtime_checkpoint("src-iterable-saved")

    def _commit(self, described: list[Any]) -> None:
        """The last write: nothing of it may leave before everything else has, nor after a cancel.

        It is put together while the destination loads what came before; *described*: the devices in that.
        """
        assert self.writer is not None and self._channel is not None
        if self._return_path is not None:
            self.writer.out.write(commands.encode_command(commands.Ping(PING_ALL_LOADED)))
        self.writer.out.flush()
        last = self.writer.last_words(described)
        if self._return_path is not None and not self._return_path.wait_pong(PING_ALL_LOADED):
            text = "the return path ended before the destination had loaded the guest"
            raise self._return_path.error or ChannelError(text, channel=self._channel.name)
        with self._lock:
            if self._cancelled:
                raise MigrationCancelled("the migration was cancelled")
            self._committed = True
        trace.migration_commit(len(last), self._noted_runstate.value if self._noted_runstate else "")
        accepted = self.writer.out.accepted_bytes()
        try:
            self.writer.out.write(last)
            self.writer.out.flush()
        except ChannelError:
            with self._lock:
                self._severed = True  # the error was told to the writer: the reader may see an ordinary end
                if self._channel.stored or self.writer.out.accepted_bytes() == accepted:
                    self._committed = False  # nobody can have begun to act on it
            raise

    def _confirm(self) -> None:
        """Wait for the destination's word, where there is a way to hear it."""
        if self._return_path is not None:
            self._await_verdict()
            if self._return_path.verdict is not Verdict.TAKEN:
                raise self._return_path.error or ChannelError(UNKNOWN_OUTCOME)
        self._complete()

    def _complete(self) -> None:
        """The guest is at the destination, all of it."""
        if self.downtime_s is None:
            self.downtime_s = time.monotonic() - self._stop_s
        trace.vmstate_downtime_checkpoint("src-downtime-end")
        self.total_s = time.monotonic() - self.start_s
        self.machine.set_runstate(RunState.POSTMIGRATE)
        self._states.advance_from_any(MigrationStatus.COMPLETED)

    def _await_verdict(self) -> None:
        assert self._return_path is not None
        while not self._return_path.wait(0.5):
            with self._lock:
                cancelled = self._cancelled
            if cancelled:
                self._return_path.wait(ANSWER_AFTER_CANCEL_S)
                return

    # ---- the way back ----

    def _give_up(self, error: MigrationError | None = None) -> None:
        """After an error, or a cancel when there is none: the guest runs here again, if it can be only here."""
        self.total_s = time.monotonic() - self.start_s
        if self._committed and not self._is_given_back():
            reason = f" ({error})" if error is not None and str(error) != UNKNOWN_OUTCOME else ""
            self.error = ChannelError(UNKNOWN_OUTCOME + reason)
            trace.migrate_error(self.error)
            self.machine.set_runstate(RunState.POSTMIGRATE)
            self._states.advance_from_any(MigrationStatus.FAILED)
            return
        try:
            self._resume_guest()
        except MachineError as refusal:
            error = MachineError(f"the guest does not go on here ({refusal}): mend that, then use 'cont'")
            self.machine.set_runstate(RunState.PAUSED)
        if self._states.status is MigrationStatus.CANCELLING:
            self.error = error
            return  # cancelled once everything is cleaned up
        self.error = self._with_hint(self._with_reason(error))
        trace.migrate_error(self.error)
        self._states.advance_from_any(MigrationStatus.FAILED)

    def _is_given_back(self) -> bool:
        """Whether the destination, which has had the last write or part of it, has certainly not started the guest."""
        path = self._return_path
        if path is None:
            return False
        if self._severed:
            path.wait(LAST_WORD_S)  # what it said before may still be on the way to the reader; nothing else counts
        return path.verdict is Verdict.REFUSED or (path.verdict is Verdict.LEFT and not self._severed)

    def _with_reason(self, error: MigrationError | None) -> MigrationError | None:
        """A connection that broke, most often because the destination refused the stream: say that, too."""
        path = self._return_path
        if not isinstance(error, ChannelError) or error.errno not in HUNG_UP:
            return error
        reason = f"the other end closed the connection: {ITS_WORDS}"
        if path is not None and path.wait(LAST_WORD_S) and path.error is not None:
            if path.error is error:
                return error
            reason = str(path.error) if isinstance(path.error, StreamError) else reason
        return ChannelError(f"{error}; {reason}", channel=error.channel, errno=error.errno)

    def _with_hint(self, error: MigrationError | None) -> MigrationError | None:
        """With multifd, a destination that leaves may have other parameters: it had no way to say so."""
        path = self._return_path
        has_left = path is not None and (path.verdict in (Verdict.REFUSED, Verdict.LEFT) or not path.has_heard)
        if self._senders is None or not has_left or not isinstance(error, ChannelError | StreamError):
            return error
        hint = "parameters 'multifd-channels' and 'multifd-compression' must be equal on both sides"
        if isinstance(error, ChannelError):
            return ChannelError(f"{error}; {hint}", channel=error.channel, errno=error.errno)
        return StreamError(str(error), offset=error.offset, section=error.section, remedy=hint)

    def _resume_guest(self) -> None:
        if self._noted_runstate is None or self.machine.runstate is not RunState.FINISH_MIGRATE:
            return
        trace.migration_resume_guest(self._noted_runstate.value)
        if self._noted_runstate is RunState.RUNNING:
            self.machine.start()
        else:
            self.machine.set_runstate(self._noted_runstate)

    def _end_logging(self) -> None:
        if not self._logging:
            return
        self._logging = False
        try:
            self.machine.dirty_log.stop()
        except MachineError as error:  # the guest runs on all the same, only slower
            self.error = self.error or error

    def _clean_up(self) -> None:
        """Give everything back; nobody of ours is left on the channel when it is closed."""
        self.converge.end()
        self._end_logging()
        if self._states.status is not MigrationStatus.COMPLETED:
            self._quit.set()
        if self._senders is not None:
            self._senders.close()
        if self._channel is not None:
            if self._return_path is not None:
                self._channel.shutdown()
                self._return_path.join()
            with self._lock:
                channel, self._channel = self._channel, None
            channel.close()
        if self.ram is not None:
            self.ram.close()
        self._quit.close()
        self._proceed.close()
        self._states.advance(MigrationStatus.CANCELLING, MigrationStatus.CANCELLED)
