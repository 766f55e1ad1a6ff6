"""The trace events of the hypervisor; `qemumig.trace` has the migration's, and tells how they work."""

from __future__ import annotations

from qemumig.trace import TRACE

runstate_set = TRACE.event("runstate_set", "current_run_state {} new_state {}")
handle_qmp_command = TRACE.event("handle_qmp_command", "req: {}")
monitor_qmp_respond = TRACE.event("monitor_qmp_respond", "resp: {}")
handle_hmp_command = TRACE.event("handle_hmp_command", "cmdline: {}")
monitor_protocol_event_emit = TRACE.event("monitor_protocol_event_emit", "event={}")
