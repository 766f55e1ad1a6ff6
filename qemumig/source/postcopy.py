"""The source's postcopy: hand the guest over early, then serve what it asks for (postcopy.md §2, §7, §8).

    rounds ─▶ what is dirty is discarded there ─▶ stop the guest ─▶ ▌package: devices, RUN▐ ─▶ pages, as they are wanted
                                                   what is new, too ▲                     │
                          a cancel or an error before: the guest runs here again          │ the connection breaks
                                                                                          ▼
                  ◀── RESUME ◀── what has arrived there ◀── connect anew ◀── `migrate resume` ◀── paused

Who has the guest.  The last ping of the package is answered when the destination has put device state into effect; then
comes RUN.  So before that answer a refusal, or a clean end of the connection, means that nothing runs there, and the guest
goes on here.  After it, the guest is there; a connection that breaks is mended by a recovery.  When the connection breaks
without a word in between, nobody here can know: the guest stays stopped, and `error-desc` says what decides.

Threads   `mig/src/main` hands over, serves, pauses and recovers; `mig/src/return` takes page requests, and answers them
          where there is a channel of urgent pages.  `start_postcopy`, `pause` and `resume` may come from any thread.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import reduce
from operator import or_
from typing import Any

from .. import trace
from ..channels.channel import Channel
from ..errors import ChannelError, MigrationCancelled, MigrationError, StateError, StreamError
from ..postcopy.requests import RequestReader
from ..postcopy.serve import PageServer
from ..qapi import MigrationStatus, RunState
from ..ram.live_multifd import MultifdRamSource
from ..savevm import commands
from ..savevm.rehearsal import rehearse
from ..states import IN_POSTCOPY
from ..wire.format import TARGET_PAGE_SIZE, RamSaveFlag, SectionType
from ..wire.stream import InputStream, OutputStream
from .attempt import LAST_WORD_S, PING_OPENED, Attempt
from .return_path import ReturnPath, Verdict
from .writer import StreamWriter

PING_DISCARDED, PING_SWITCHED = 2, 4  # as QEMU numbers them; its 3, in the package, asks for what PING_TAKEN does
PING_TAKEN = 0x42
PART_S = 0.05
SETTLE_S, LOOK_S = 0.05, 0.001  # how long the destination is left alone with device state; how often it is asked
HEAD_START_S = 0.004  # then how long the guest has the processors before pages that nobody waits for are sent
STEP_BYTES, STEP_PAGES = 4 << 20, 4096  # at a time, before the clock and the return path are looked at

BY_USER = "Postcopy migration is paused by the user"
LOST = (
    "the guest runs at the destination, and what it has not got of its memory is here: 'migrate-recover' there and "
    "'migrate' with resume=true here go on; if the destination is gone for good, so is the guest"
)
IN_BETWEEN = (
    "the connection was lost while the destination was taking the guest, before it had said so: if the destination says "
    "postcopy-paused, 'migrate-recover' there and 'migrate' with resume=true here go on; if it has ended, "
    "'migrate_cancel' and then 'cont' let the guest run here again"
)


class PostcopyAttempt(Attempt):
    """An attempt with capability `postcopy-ram`; *open_another* gives a further channel to the same address."""

    def __init__(self, *arguments: Any, open_another: Callable[[], Channel]) -> None:
        super().__init__(*arguments)
        self._open_another = open_another
        self._wants = False  # set by `start_postcopy`, once
        self.server: PageServer | None = None
        self._requests: RequestReader | None = None  # the return path's own
        self._urgent: OutputStream | None = None
        self._urgent_channel: Channel | None = None
        self._earlier_bytes = 0  # on connections that are lost, without the first
        self._standstill = ExitStack()  # closed when the guest runs there
        self._is_recovered = False  # the main channel is not the first one any more
        self._switch_bytes = 0  # sent when the guest was handed over
        # under the condition
        self._changed = threading.Condition()
        self._taken = False  # the destination has answered the last ping of the package
        self._paused_by_user = False
        self._opener: Callable[[], Channel] | None = None  # of a recovery
        self._awaited: set[str] = set()  # blocks whose bitmap has not come
        self._resumed = False
        self._quitting = False

    # ---- for others ----

    def start_postcopy(self) -> None:
        """Hand the guest over at the next opportunity."""
        self._wants = True

    def pause(self) -> None:
        """Break the connection, as `migrate-pause` asks; both sides can recover."""
        with self._changed:
            if self._states.status not in (MigrationStatus.POSTCOPY_ACTIVE, MigrationStatus.POSTCOPY_RECOVER):
                raise StateError(
                    "migrate-pause is currently only supported during postcopy-active or postcopy-recover state",
                    state=self._states.status,
                )
            self._paused_by_user = True
        self._sever()

    def resume(self, opener: Callable[[], Channel], open_another: Callable[[], Channel]) -> None:
        """Go on with the channel that *opener* gives, and the further ones of *open_another*."""
        with self._changed:
            if not self._states.advance(MigrationStatus.POSTCOPY_PAUSED, MigrationStatus.POSTCOPY_RECOVER_SETUP):
                raise StateError("Cannot resume if there is no paused migration", state=self._states.status)
            self._opener, self._open_another = opener, open_another
            self._changed.notify_all()

    def cancel_postcopy(self) -> bool:
        """End a postcopy that is paused; False when none has begun.  StateError when the guest is known to be elsewhere."""
        with self._changed:
            status = self._states.status
            if status not in IN_POSTCOPY:
                return False
            if status is not MigrationStatus.POSTCOPY_PAUSED or self._taken:
                raise StateError("Postcopy migration in progress, cannot cancel.", state=status)
            self._quitting = True
            self._changed.notify_all()
            return True

    def abandon(self) -> None:
        super().abandon()
        with self._changed:
            self._quitting = True
            self._changed.notify_all()

    def break_connection(self) -> None:
        """As if the network had broken: once the guest was handed over, both sides pause."""
        if self._states.status in IN_POSTCOPY:
            self._sever()
        else:
            super().break_connection()

    def _sever(self) -> None:
        """Break the connection on purpose: that it ends is no word of the destination's."""
        with self._lock:
            self._severed = True
        self.shut_link()

    def shut_link(self) -> None:
        """End every connection there is; whoever uses one notices."""
        with self._lock:
            for channel in (self._channel, self._urgent_channel):
                if channel is not None:
                    channel.shutdown()

    @property
    def transferred(self) -> int:
        return super().transferred + self._earlier_bytes + self._further_bytes()

    def _further_bytes(self) -> int:
        """On the channels that there are now, without the first one, whose bytes `ram` counts."""
        writer = self.writer if self._is_recovered else None  # once: a lost connection takes it away
        outs = (writer.out if writer is not None else None, self._urgent)
        return sum(out.offset for out in outs if out is not None)

    @property
    def postcopy_bytes(self) -> int:
        return self.transferred - self._switch_bytes if self._switch_bytes else 0

    @property
    def postcopy_requests(self) -> int:
        return self.server.requests if self.server is not None else 0

    @property
    def pages(self) -> tuple[int, int]:
        zero, normal = super().pages
        return (zero + self.server.zero_pages, normal + self.server.normal_pages) if self.server else (zero, normal)

    # ---- before the switch ----

    def _advise(self) -> None:
        assert self.writer is not None and self.ram is not None
        summary = reduce(or_, (block.page_size for block in self.ram.blocks))
        trace.qemu_savevm_send_postcopy_advise()
        self.writer.command(commands.PostcopyAdvise(summary, TARGET_PAGE_SIZE))
        if self.options.migration_property("x-preempt-pre-7-2"):
            self._connect_urgent()

    def _wants_postcopy(self) -> bool:
        return self._wants

    def _connect_urgent(self) -> None:
        """The channel of urgent pages, if there is to be one and is not yet."""
        if not self.options.capability("postcopy-preempt") or self._urgent is not None:
            return
        channel = self._open_another()
        trace.postcopy_preempt_new_channel()
        with self._lock:
            self._urgent_channel = channel
        self._urgent = OutputStream(channel)

    def _switch_over(self) -> None:
        if not self._wants:
            super()._switch_over()
            return
        self._await_pong(PING_OPENED)  # the destination is there: what connects next is not taken for the main one
        self._connect_urgent()
        self._sync_channels()
        with self._standstill as standstill:
            standstill.enter_context(self._standing_still())
            self._discard_early()
            self._drain()
            self._stop_guest()
            self._enter_device()
            self._hand_over()
            self._serve_until_done()

    def _await_pong(self, value: int) -> None:
        assert self._return_path is not None
        if not self._return_path.wait_pong(value):
            raise self._return_path.error or ChannelError("the return path ended before the switch to postcopy")

    def _discard_early(self) -> None:
        """Tell the destination what it is to forget while the guest still runs: after the stop comes only what is new."""
        assert self.writer is not None and self.ram is not None
        self._sync()
        self.server = PageServer(self.ram.dirty)
        self.server.connect(self.writer.out, self._urgent)
        self._discard()

    def _discard(self) -> None:
        """Tell the destination to forget all that is dirty, and was not when it was told before."""
        assert self.server is not None
        self.server.make_uniform()
        self.server.put_discards()

    def _drain(self) -> None:
        """Until the destination has loaded all that is under way: the guest runs meanwhile, and would else wait for it."""
        assert self.writer is not None
        self.writer.command(commands.Ping(commands.PING_DRAINED))
        rehearse(self.machine.sections(), times=1)
        self._await_pong(commands.PING_DRAINED)

    def _sync_channels(self) -> None:
        """Whatever went by channels of multifd is in memory there before anything of it is discarded (postcopy.md §10)."""
        assert self.writer is not None
        if isinstance(self.ram, MultifdRamSource):
            self.writer.begin_section(SectionType.QEMU_VM_SECTION_PART)
            self.ram.write_sync()
            self.writer.end_section()

    # ---- the switch ----

    def _hand_over(self) -> None:
        assert self.writer is not None and self.server is not None and self._return_path is not None
        trace.postcopy_start()
        if self.options.migration_property("send-switchover-start"):
            self.writer.out.write(commands.encode_command(commands.SwitchoverStart()))
        self._sync()
        trace.ram_postcopy_send_discard_bitmap()
        self._discard()
        if self.options.capability("release-ram"):
            self.server.note_clean()
        self.writer.out.write(commands.encode_command(commands.Ping(PING_DISCARDED)))
        package = self._package()
        self._return_path.talk = self
        self._move(MigrationStatus.DEVICE, MigrationStatus.POSTCOPY_DEVICE)
        self._switch_bytes = self.transferred
        with self._lock:
            self._committed = True
        self._send_package(package)
        self.downtime_s = time.monotonic() - self._stop_s

    def _send_first(self) -> None:
        """What the guest touches as soon as it runs, so that it does not begin with a row of page faults.

        It is there in time: the destination has to put device state into effect before.
        """
        assert self.server is not None and self.ram is not None
        index_of = {block.idstr: index for index, block in enumerate(self.ram.blocks)}
        touched = self.machine.first_touched()
        self.server.send_first([(index_of[block.idstr], offset) for block, offset in touched if block.idstr in index_of])

    def _package(self) -> bytes:
        """LISTEN, device state, and RUN, as one."""
        ping = commands.encode_command(commands.Ping(PING_TAKEN))
        assert self.writer is not None and self._noted_runstate is not None
        devices = b"".join(data for _, data, _ in self.writer.encode_devices(self.machine, self._noted_runstate))
        listen, run = commands.PostcopyListen(), commands.PostcopyRun()
        return commands.encode_command(listen) + devices + ping + commands.encode_command(run)

    def _send_package(self, package: bytes) -> None:
        """From the last byte on the guest may be there; before it, nobody acts on any of it."""
        assert self.writer is not None
        trace.savevm_send_postcopy_listen()
        trace.savevm_send_postcopy_run()
        try:
            self.writer.out.write(commands.encode_command(commands.Packaged(len(package))) + package)
            self.writer.out.flush()
        except MigrationError:
            if self.writer.out.pending_bytes():
                with self._lock:
                    self._committed = False
                raise
            # else the destination has all of it: what is wrong will be seen where the connection is used next

    # ---- pages ----

    def _serve_until_done(self) -> None:
        while True:
            try:
                self._serve()
                self._finish_stream()
                return
            except (ChannelError, StreamError) as error:
                self._pause(error)
            while not self._recover():
                pass

    def _serve(self) -> None:
        """PARTs, until everything was sent."""
        assert self.writer is not None and self.server is not None
        if (channel := self._channel) is not None:
            channel.keep_short()
        if not self._is_recovered:
            self.writer.command(commands.Ping(PING_SWITCHED))
        self._let_settle()
        self.pacer.restart(self.writer.out.offset, self.server.normal_pages)
        done = False
        while not done:
            done = self._send_part(self.pacer.allowance(self.writer.out.offset, "max-postcopy-bandwidth"))
            if not done and not self.pacer.allowance(self.writer.out.offset, "max-postcopy-bandwidth"):
                self._wait_for_window()
            self.pacer.update(self.writer.out.offset, self.server.normal_pages + self.server.zero_pages)

    def _let_settle(self) -> None:
        """Send only what is asked for until the guest runs there, and for a moment more.

        All processors that there are shall work for that, and then for what it touches first.
        """
        try:
            if not self._is_recovered:
                self._send_first()
            self._send_requested(SETTLE_S, lambda: self._taken)
            self._send_requested(HEAD_START_S, lambda: False)
        finally:
            self._standstill.close()

    def _send_requested(self, seconds: float, is_enough: Callable[[], bool]) -> None:
        """Send only what is asked for, for some *seconds* at most."""
        assert self.server is not None
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self.server.wake_fd, select.POLLIN)
        while not is_enough() and time.monotonic() < deadline:
            if poll.poll(LOOK_S * 1000):
                self._send_part(0)
            self._require_path()

    def _send_part(self, allowance: int) -> bool:
        """A PART with what is asked for and about *allowance* bytes besides; True when everything was sent."""
        assert self.writer is not None and self.server is not None
        self.writer.begin_section(SectionType.QEMU_VM_SECTION_PART)
        done = self._serve_part(allowance)
        if self._taken and self.options.capability("release-ram"):
            self.server.begin_release()
        self.writer.out.write_be64(RamSaveFlag.RAM_SAVE_FLAG_EOS)
        self.writer.end_section()
        self._require_path()
        return done

    def _serve_part(self, allowance: int) -> bool:
        assert self.writer is not None and self.server is not None
        deadline = time.monotonic() + PART_S
        end = self.writer.out.offset + allowance
        while True:
            if self.server.serve(min(STEP_BYTES, max(end - self.writer.out.offset, 0)), STEP_PAGES):
                return True
            if self.writer.out.offset >= end or time.monotonic() > deadline:
                return False

    def _wait_for_window(self) -> None:
        """Sleep until the rate limit allows more, or somebody asks for a page."""
        assert self.server is not None
        rest_ms = self.pacer.rest_ms()
        poll = select.poll()
        poll.register(self.server.wake_fd, select.POLLIN)
        poll.register(self._quit.fd, select.POLLIN)
        poll.poll(rest_ms)
        if self._quit.is_set():
            raise MigrationCancelled("the process ends")

    def _require_path(self) -> None:
        path = self._return_path
        assert path is not None
        if path.verdict is not None:
            raise path.error or ChannelError("the return path ended in the middle of postcopy")

    def _finish_stream(self) -> None:
        """Everything was sent: say so, and wait for the destination's last word."""
        assert self.writer is not None and self._return_path is not None
        path = self._return_path
        with self._changed:
            self._changed.wait_for(lambda: self._taken or path.verdict is not None)
        self._require_path()
        trace.migration_completion_postcopy_end()
        self.writer.begin_section(SectionType.QEMU_VM_SECTION_END)
        self.writer.out.write_be64(RamSaveFlag.RAM_SAVE_FLAG_EOS)
        self.writer.end_section()
        if self._urgent is not None and self.options.migration_property("x-preempt-pre-7-2"):
            self._urgent.write_be64(RamSaveFlag.RAM_SAVE_FLAG_EOS)
            self._urgent.flush()
        self.writer.out.write(bytes([SectionType.QEMU_VM_EOF]))
        self.writer.out.flush()
        trace.migration_completion_postcopy_end_after_complete()
        self._return_path.wait()
        if self._return_path.verdict is not Verdict.TAKEN:
            raise self._return_path.error or ChannelError("the return path ended before the destination had everything")
        self._complete()

    # ---- a lost connection ----

    def _pause(self, error: MigrationError) -> None:
        """The connection is lost: wait for a recovery, unless the destination has refused the guest."""
        assert self._return_path is not None
        if not self._taken:
            self._return_path.wait(LAST_WORD_S)  # it may have said why
            if self._is_given_back():
                raise Refused(str(self._return_path.error or error))
        self.shut_link()
        self._return_path.join()
        with self._changed:
            words = BY_USER if self._paused_by_user else f"{error}; {LOST if self._taken else IN_BETWEEN}"
            self._paused_by_user = False
            self.error = ChannelError(words)
        trace.postcopy_pause(words)
        self._close_link()
        for status in IN_POSTCOPY - {MigrationStatus.POSTCOPY_PAUSED}:
            self._states.advance(status, MigrationStatus.POSTCOPY_PAUSED)

    def _close_link(self) -> None:
        """Give the connection back; what it carried counts on."""
        self._earlier_bytes += self._further_bytes()
        self.writer = self._urgent = None
        with self._lock:
            channels = self._channel, self._urgent_channel
            self._channel = self._urgent_channel = None
        for channel in channels:
            if channel is not None:
                channel.close()

    def _recover(self) -> bool:
        """Wait until somebody wants to go on, and try; False when that failed, and the migration is paused again."""
        with self._changed:
            self._changed.wait_for(lambda: self._opener is not None or self._quitting)
            if self._quitting:
                raise MigrationCancelled("nobody has recovered the migration")
            opener, self._opener = self._opener, None
        assert opener is not None
        try:
            channel = opener()
        except MigrationCancelled:
            raise
        except MigrationError as error:
            self.error = ChannelError(f"{error}; {LOST if self._taken else IN_BETWEEN}")
            self._states.advance(MigrationStatus.POSTCOPY_RECOVER_SETUP, MigrationStatus.POSTCOPY_PAUSED)
            return False
        try:
            self._reconnect(channel)
        except (ChannelError, StreamError) as error:
            self._pause(error)
            return False
        return True

    def _reconnect(self, channel: Channel) -> None:
        assert self.server is not None and self.ram is not None
        with self._lock:
            self._channel, self._severed = channel, False
        self.writer = StreamWriter(OutputStream(channel), self.options)
        self._is_recovered = True
        self.server.forget_requests()
        self.server.connect(self.writer.out)
        with self._changed:
            self._resumed = False
            self._awaited = {block.idstr for block in self.ram.blocks}
        self._return_path = ReturnPath(channel)
        self._return_path.talk = self
        self._return_path.start()
        self._states.advance(MigrationStatus.POSTCOPY_RECOVER_SETUP, MigrationStatus.POSTCOPY_RECOVER)
        if self.options.migration_property("x-preempt-pre-7-2"):
            self._connect_urgent()
        for block in self.ram.blocks:
            self.writer.command(commands.RecvBitmap(block.idstr))
        self._wait_in_recovery(lambda: not self._awaited)
        self.server.make_uniform()
        self._connect_urgent()
        self.server.connect(self.writer.out, self._urgent)
        trace.savevm_send_postcopy_resume()
        self.writer.command(commands.PostcopyResume())
        self._wait_in_recovery(lambda: self._resumed)
        trace.postcopy_pause_continued()
        self.error = None

    def _wait_in_recovery(self, holds: Callable[[], bool]) -> None:
        path = self._return_path
        assert path is not None
        with self._changed:
            self._changed.wait_for(lambda: holds() or path.verdict is not None or self._quitting)
            arrived = holds()
        if not arrived:
            self._require_path()
            raise MigrationCancelled("the process ends")

    # ---- `mig/src/return`: what the destination says (return_path.Talk) ----

    def read_requests(self, stream: InputStream) -> None:
        if self._requests is None or self._requests.stream is not stream:  # another connection
            assert self.server is not None
            self._requests = RequestReader(self.server, stream)
        self._requests.read()

    def take_pong(self, value: int) -> None:
        if value != PING_TAKEN:
            return
        trace.source_return_path_thread_postcopy_package_loaded()
        with self._changed:
            self._taken = True
            self._changed.notify_all()
        self._states.advance(MigrationStatus.POSTCOPY_DEVICE, MigrationStatus.POSTCOPY_ACTIVE)

    def bitmap_size(self, block: str) -> int:
        assert self.server is not None
        if block not in self._awaited:
            raise KeyError(block)
        return self.server.bitmap_size(block)

    def take_bitmap(self, message: commands.ReceivedBitmap) -> None:
        assert self.server is not None
        self.server.take_received(message.block, message.bitmap)
        with self._changed:
            self._awaited.discard(message.block)
            self._changed.notify_all()

    def take_resume_ack(self) -> None:
        if not self._states.advance(MigrationStatus.POSTCOPY_RECOVER, MigrationStatus.POSTCOPY_ACTIVE):
            raise StreamError("return path: RESUME_ACK outside of a postcopy recovery")
        with self._changed:
            self._resumed = self._taken = True
            self._changed.notify_all()

    def take_end(self) -> None:
        """The return path has ended: whoever waits for its words, or is in the middle of a write, need not go on."""
        with self._changed:
            self._changed.notify_all()
        if self._return_path is not None and self._return_path.verdict is not Verdict.TAKEN:
            self.shut_link()

    # ---- the end ----

    def _give_up(self, error: MigrationError | None = None) -> None:
        if isinstance(error, Refused):
            with self._lock:
                self._committed = False
        status = self._states.status
        if not self._committed or status not in IN_POSTCOPY:
            super()._give_up(error)
            return
        self.total_s = time.monotonic() - self.start_s
        self.error = self.error or error or ChannelError(LOST if self._taken else IN_BETWEEN)
        if self._quit.is_set():
            return  # the process ends; the guest is not here
        self.machine.set_runstate(RunState.POSTMIGRATE)
        self._states.advance_from_any(MigrationStatus.FAILED)

    def _clean_up(self) -> None:
        self.shut_link()
        if self._return_path is not None:
            self._return_path.join()
        if self._urgent_channel is not None:
            with self._lock:
                channel, self._urgent_channel = self._urgent_channel, None
            channel.close()
        if self.server is not None:
            self.server.close()
        super()._clean_up()


class Refused(ChannelError):
    """The destination has not taken the guest, and says so."""
