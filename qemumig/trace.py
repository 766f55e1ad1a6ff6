"""Named trace events: a line of text each, silent and nearly free until somebody asks for them (cli.md §7).

    trace.savevm_section_start("ram", 1)                one call and one test of an attribute while the event is off
      ─▶ savevm_section_start ram, section_id 1         on standard error or in a file

Where an event means what one of QEMU's means it has that one's name and words, less the addresses of C structures.
Nothing is traced per page: the busiest event is one per section of a stream.

Threads   any.  A line is one write, so lines of several threads and processes do not mix
Holds     (1) whatever becomes of a line (a full disk, a reader that has gone or stands still), only the line is lost;
              the trace itself says how many were, once it can
          (2) a line is one line: what a peer sent cannot break out of it
"""

from __future__ import annotations

import fnmatch
import os
import re
import select
import sys
import threading
from datetime import UTC, datetime
from typing import Any

LONGEST_LINE = 4096  # bytes; as many as a pipe takes in one piece
PATIENCE_S = 0.1  # how long a reader that does not keep up may hold a thread, once
CUT_MARK = b" [cut]"


class Event:
    """One kind of event; calling it says that it has happened, *values* filling its template."""

    __slots__ = ("_trace", "enabled", "name", "template")

    def __init__(self, trace: Trace, name: str, template: str) -> None:
        self._trace = trace
        self.name = name
        self.template = template
        self.enabled = False

    def __call__(self, *values: Any) -> None:
        if self.enabled:
            self._trace.write(f"{self.name} {self.template.format(*values)}")


class Trace:
    """A set of events, and where their lines go: standard error, until `open_file`."""

    def __init__(self) -> None:
        self.timestamps = False  # -msg timestamp=on
        self._events: dict[str, Event] = {}
        self._lock = threading.Lock()  # guards what follows
        self._file: int | None = None
        self._lost = 0  # lines since the last one that was written
        self._torn = False  # the last line went out in part

    def event(self, name: str, template: str = "") -> Event:
        """A new event; ValueError for a name that is taken."""
        if name in self._events:
            raise ValueError(f"trace event {name!r} is declared twice")
        event = self._events[name] = Event(self, name, template)
        return event

    def events(self, pattern: str = "*") -> list[Event]:
        """Those whose name fits *pattern*, as they were declared; `*` stands for anything, `?` for one letter."""
        fits = re.compile(fnmatch.translate(pattern.replace("[", "[[]"))).match
        return [event for event in self._events.values() if fits(event.name)]

    def enable(self, pattern: str, on: bool = True) -> bool:
        """Switch on, or off, what fits *pattern*; False when that names one event and there is none."""
        found = self.events(pattern)
        for event in found:
            event.enabled = on
        return bool(found) or is_pattern(pattern)

    def open_file(self, path: str) -> None:
        """From now on lines go to the end of the file *path*; OSError when it cannot be opened."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY
        descriptor = os.open(path, flags, 0o666)
        with self._lock:
            previous, self._file = self._file, descriptor
        if previous is not None:
            os.close(previous)

    def close(self) -> None:
        """Switch everything off and close the file."""
        self.enable("*", False)
        with self._lock:
            descriptor, self._file = self._file, None
        if descriptor is not None:
            os.close(descriptor)

    def write(self, text: str) -> None:
        """One line; it never raises, and waits only once, shortly, for a reader that stands still."""
        if self.timestamps:
            text = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ} {text}"
        line = encode(text)
        with self._lock:
            descriptor = self._descriptor()
            if descriptor is None:
                return
            if self._lost:
                self._put(descriptor, b"\n" * self._torn + b"trace: %d lines were lost\n" % self._lost, 0)
            if self._lost or not self._put(descriptor, line, PATIENCE_S):
                self._lost += 1

    def _descriptor(self) -> int | None:
        if self._file is not None:
            return self._file
        return 2 if sys.__stderr__ is not None else None  # with stderr closed from the start, 2 may be anything

    def _put(self, descriptor: int, data: bytes, patience_s: float) -> bool:
        """Write *data*; False when not all of it could be."""
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        try:
            if not poll.poll(patience_s * 1000):
                return False
            written = os.write(descriptor, data)
        except OSError:
            return False
        self._torn = written < len(data)
        if not self._torn:
            self._lost = 0
        return not self._torn


def is_pattern(text: str) -> bool:
    """Whether *text* may stand for several events; QEMU asks for the asterisk alone where it insists on a name."""
    return "*" in text


def encode(text: str) -> bytes:
    """*text* as one line that is not too long."""
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    line = text.encode("utf-8", "backslashreplace")
    if len(line) >= LONGEST_LINE:
        line = line[: LONGEST_LINE - 1 - len(CUT_MARK)] + CUT_MARK
    return line + b"\n"


TRACE = Trace()
"""The events of this process.  They are declared here, and by the embedding in a file of its own."""

# ---- both sides ----

migrate_set_state = TRACE.event("migrate_set_state", "new state {}")
migrate_error = TRACE.event("migrate_error", "error={}")
migration_set_incoming_channel = TRACE.event("migration_set_incoming_channel", "ioctype={} name={}")
migration_set_outgoing_channel = TRACE.event("migration_set_outgoing_channel", "ioctype={} name={}")
vmstate_downtime_checkpoint = TRACE.event("vmstate_downtime_checkpoint", "{}")

# ---- source: life of an attempt ----

migration_cancel = TRACE.event("migration_cancel")
migration_thread_setup_complete = TRACE.event("migration_thread_setup_complete")
migration_bitmap_sync_start = TRACE.event("migration_bitmap_sync_start")
migration_bitmap_sync_end = TRACE.event("migration_bitmap_sync_end", "dirty_pages {}")
migrate_pending_exact = TRACE.event("migrate_pending_exact", "exact pending size {} (threshold = {} bandwidth = {})")
migrate_transferred = TRACE.event("migrate_transferred", "transferred {} bandwidth {}")
migration_thread_low_pending = TRACE.event("migration_thread_low_pending", "{}")
migration_commit = TRACE.event("migration_commit", "{} bytes to go, guest in {}")
migration_resume_guest = TRACE.event("migration_resume_guest", "runstate {}")
migration_thread_after_loop = TRACE.event("migration_thread_after_loop")
migration_cleanup = TRACE.event("migration_cleanup")

# ---- source: auto-converge ----

migration_throttle = TRACE.event("migration_throttle")
cpu_throttle_set = TRACE.event("cpu_throttle_set", "set guest CPU throttled by {}%")

# ---- source: the stream ----

savevm_state_header = TRACE.event("savevm_state_header")
savevm_state_setup = TRACE.event("savevm_state_setup")
savevm_state_iterate = TRACE.event("savevm_state_iterate")
savevm_command_send = TRACE.event("savevm_command_send", "com={:#x} len={}")
savevm_section_start = TRACE.event("savevm_section_start", "{}, section_id {}")
savevm_section_end = TRACE.event("savevm_section_end", "section_id {}, stream at {}")
vmstate_save = TRACE.event("vmstate_save", "{}, instance_id {}, {} bytes")

# ---- source: the return path ----

source_return_path_thread_entry = TRACE.event("source_return_path_thread_entry")
source_return_path_thread_pong = TRACE.event("source_return_path_thread_pong", "{:#x}")
source_return_path_thread_shut = TRACE.event("source_return_path_thread_shut", "{:#x}")
source_return_path_thread_end = TRACE.event("source_return_path_thread_end")
source_return_path_thread_bad_end = TRACE.event("source_return_path_thread_bad_end", "{}")

# ---- source: multifd ----

multifd_new_send_channel_async = TRACE.event("multifd_new_send_channel_async", "channel {}")
multifd_send_copies = TRACE.event("multifd_send_copies", "{}: {}")
multifd_send_thread_start = TRACE.event("multifd_send_thread_start", "{}")
multifd_send_section_end = TRACE.event("multifd_send_section_end", "pages {}")
multifd_send_terminate_threads = TRACE.event("multifd_send_terminate_threads")
multifd_send_thread_end = TRACE.event("multifd_send_thread_end", "channel {} normal pages {} zero pages {}")

# ---- source: postcopy ----

qemu_savevm_send_postcopy_advise = TRACE.event("qemu_savevm_send_postcopy_advise")
postcopy_start = TRACE.event("postcopy_start")
ram_postcopy_send_discard_bitmap = TRACE.event("ram_postcopy_send_discard_bitmap")
savevm_send_postcopy_listen = TRACE.event("savevm_send_postcopy_listen")
savevm_send_postcopy_run = TRACE.event("savevm_send_postcopy_run")
postcopy_preempt_new_channel = TRACE.event("postcopy_preempt_new_channel")
source_return_path_thread_postcopy_package_loaded = TRACE.event("source_return_path_thread_postcopy_package_loaded")
postcopy_pause = TRACE.event("postcopy_pause", "{}")
postcopy_pause_continued = TRACE.event("postcopy_pause_continued")
savevm_send_postcopy_resume = TRACE.event("savevm_send_postcopy_resume")
migration_completion_postcopy_end = TRACE.event("migration_completion_postcopy_end")
migration_completion_postcopy_end_after_complete = TRACE.event("migration_completion_postcopy_end_after_complete")

# ---- mapped-ram, both sides ----

mapped_ram_save_block = TRACE.event("mapped_ram_save_block", "{}: bitmap at {:#x} pages at {:#x}")
mapped_ram_save_bitmaps = TRACE.event("mapped_ram_save_bitmaps", "normal pages {} zero pages {}")
mapped_ram_load_block = TRACE.event("mapped_ram_load_block", "{}: bitmap at {:#x} pages at {:#x}")
mapped_ram_load_block_end = TRACE.event("mapped_ram_load_block_end", "{}: pages {}")

# ---- destination ----

loadvm_state_setup = TRACE.event("loadvm_state_setup")
loadvm_state_cleanup = TRACE.event("loadvm_state_cleanup")
qemu_loadvm_state_section = TRACE.event("qemu_loadvm_state_section", "{}")
qemu_loadvm_state_section_startfull = TRACE.event("qemu_loadvm_state_section_startfull", "{}({}) {} {}")
qemu_loadvm_state_section_partend = TRACE.event("qemu_loadvm_state_section_partend", "{}")
loadvm_process_command = TRACE.event("loadvm_process_command", "com={} len={}")
loadvm_process_command_ping = TRACE.event("loadvm_process_command_ping", "{:#x}")
migrate_send_rp_message = TRACE.event("migrate_send_rp_message", "{}: len {}")
vmstate_load = TRACE.event("vmstate_load", "{}, instance_id {}, version_id {}")

# ---- destination: multifd ----

multifd_recv_new_channel = TRACE.event("multifd_recv_new_channel", "channel {}")
multifd_recv_thread_start = TRACE.event("multifd_recv_thread_start", "{}")
multifd_recv_sync_main = TRACE.event("multifd_recv_sync_main", "pages {}")
multifd_recv_terminate_threads = TRACE.event("multifd_recv_terminate_threads", "error {}")
multifd_recv_thread_end = TRACE.event("multifd_recv_thread_end", "channel {} normal pages {}")

# ---- destination: postcopy ----

loadvm_postcopy_handle_advise = TRACE.event("loadvm_postcopy_handle_advise")
loadvm_postcopy_handle_listen = TRACE.event("loadvm_postcopy_handle_listen")
loadvm_postcopy_handle_run = TRACE.event("loadvm_postcopy_handle_run")
loadvm_postcopy_handle_resume = TRACE.event("loadvm_postcopy_handle_resume")
postcopy_ram_listen_thread_start = TRACE.event("postcopy_ram_listen_thread_start")
postcopy_ram_listen_thread_exit = TRACE.event("postcopy_ram_listen_thread_exit")
postcopy_pause_incoming = TRACE.event("postcopy_pause_incoming", "{}")
postcopy_pause_incoming_continued = TRACE.event("postcopy_pause_incoming_continued")

# ---- channels ----

qio_channel_socket_connect_sync = TRACE.event("qio_channel_socket_connect_sync", "Socket connect sync addr={}")
qio_channel_socket_connect_complete = TRACE.event(
    "qio_channel_socket_connect_complete", "Socket connect complete addr={} fd={}"
)
qio_channel_socket_connect_fail = TRACE.event("qio_channel_socket_connect_fail", "Socket connect fail addr={} error={}")
qio_channel_socket_listen_complete = TRACE.event(
    "qio_channel_socket_listen_complete", "Socket listen complete addr={} fd={}"
)
qio_channel_socket_accept_complete = TRACE.event(
    "qio_channel_socket_accept_complete", "Socket accept complete addr={} fd={}"
)
qio_channel_tls_handshake_start = TRACE.event("qio_channel_tls_handshake_start", "TLS handshake start name={}")
qio_channel_tls_handshake_complete = TRACE.event("qio_channel_tls_handshake_complete", "TLS handshake complete name={}")
qio_channel_tls_handshake_fail = TRACE.event("qio_channel_tls_handshake_fail", "TLS handshake fail name={} error={}")
