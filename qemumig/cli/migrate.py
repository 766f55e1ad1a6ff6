"""`qemumig migrate`: send a running guest elsewhere, from any VMM that speaks QMP, and watch it go.

    qemumig migrate --qmp a.qmp tcp:host-b:4444
    qemumig migrate --qmp a.qmp --incoming-qmp b.qmp --max-bandwidth 0 tcp:127.0.0.1:0

The VMM may be a qemumig-system or a QEMU; it was started with `-qmp unix:SOCKET,server=on,wait=off`, and no other client
holds that monitor.  The destination waits with `-incoming URI`, or with `-incoming defer` and --incoming-qmp.

While it lasts, each round over the guest's memory is a row, and the time left is shown as far as it can be known: as a
range, as a least time in the first rounds, or as "does not converge at this rate" when the guest writes to its memory as
fast as it is sent.  Then a higher --downtime-limit helps, or --capability auto-converge, or --postcopy.

Ctrl-C cancels: the guest goes on where it was.  Once postcopy has begun there is no way back, and nothing is cancelled.
The exit status is 0 only when the guest has moved.
"""

from __future__ import annotations

import argparse
import json
import socket
import time
from contextlib import ExitStack
from typing import Any

from .interrupts import Interrupted, Interrupts
from .progress import Rounds, View, conclude, size, view_for
from .qmp import QmpClient, QmpError
from .vmm import FINAL, listen

POLL_SECONDS = 0.1
CANCEL_SECONDS = 60.0  # a cancel that comes too late waits for the destination's word
RUNNING = ("setup", "cancelling", "active", "pre-switchover", "device", "wait-unplug")
BACK_AT_SOURCE = ("running", "paused", "suspended", "prelaunch")
SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SWITCHES = {"on": True, "true": True, "off": False, "false": False}


class MigrateError(Exception):
    """The migration did not come about, or did not complete; a sentence says why, and where the guest is."""


def assignment(text: str) -> tuple[str, str]:
    """ "NAME=VALUE" in two parts."""
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is no assignment: NAME=VALUE is expected")
    return name, value


def capability(text: str) -> tuple[str, bool]:
    """ "NAME", "NAME=on" or "NAME=off"."""
    name, sign, value = text.partition("=")
    if not name or (sign and value not in SWITCHES):
        raise argparse.ArgumentTypeError(f"{text!r}: NAME, NAME=on or NAME=off is expected")
    return name, SWITCHES[value] if sign else True


def byte_count(text: str) -> int:
    """ "2G" → bytes; a bare number is bytes."""
    number, unit = (text[:-1], SUFFIXES.get(text[-1].upper())) if text[-1:].isalpha() else (text, 1)
    if unit is None or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no size: a whole number, with K, M, G or T if need be, is expected")
    return int(number) * unit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `qemumig migrate`."""
    add = parser.add_argument
    add("uri", metavar="URI", help="where to: tcp:HOST:PORT, unix:PATH, exec:COMMAND, fd:NAME, file:PATH")
    add("--qmp", required=True, metavar="SOCKET", help="the source's QMP monitor: a path, or HOST:PORT")
    add(
        "--incoming-qmp", metavar="SOCKET", help="the destination's: it gets the same settings and is told to listen at URI"
    )
    add(
        "--capability",
        type=capability,
        action="append",
        default=[],
        metavar="NAME[=on|off]",
        help="switch a capability, by QEMU's name; may be repeated",
    )
    add(
        "--set",
        type=assignment,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a migration parameter, by QEMU's name; may be repeated",
    )
    add("--max-bandwidth", type=byte_count, metavar="SIZE", help="bytes per second, 0 for no limit (QEMU's default: 128M)")
    add("--downtime-limit", type=int, metavar="MS", help="how long the guest may stand still (QEMU's default: 300 ms)")
    add("--postcopy", action="store_true", help="after the first round let the guest run at the destination already")
    add("--timeout", type=float, metavar="S", help="cancel when the guest still runs at the source after that long")
    add("--json", action="store_true", help="print one JSON object with all figures, and nothing else")


def run(args: argparse.Namespace) -> int:
    """Migrate: 0 when the guest has moved, 1 when it has not, 128 + signal when it was interrupted."""
    view = view_for(args.json)
    result: dict[str, Any] = {"ok": False}
    status = 1
    with Interrupts() as interrupts, ExitStack() as owned:
        try:
            Drive(args, view, interrupts, owned).go(result)
            result["ok"], status = True, 0
        except (MigrateError, QmpError) as error:
            result["error"] = str(error)
        except Interrupted as error:
            result.setdefault("error", f"interrupted by {error}")
            status = 128 + error.signum
        interrupts.hold()
        view.end()
    conclude("qemumig migrate", result, args.json)
    return status


def connect(name: str, where: str) -> QmpClient:
    """The monitor at *where*, a path or HOST:PORT."""
    host, _, port = where.rpartition(":")
    try:
        if port.isdecimal() and host and "/" not in where:
            connection = socket.create_connection((host.strip("[]"), int(port)), 30)
        else:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(where.removeprefix("unix:"))
    except OSError as error:
        raise MigrateError(f"{name}: no monitor at {where}: {error.strerror or error}") from error
    try:
        return QmpClient(name, connection)
    except QmpError as error:
        connection.close()
        raise MigrateError(f"{error}; a monitor serves one client at a time: is there another one?") from error


class Drive:
    """One migration, from the settings to the last word; what it takes is noted in *owned* at once.

    A signal is heeded between two commands only, so that each answer is read by whoever asked.
    """

    def __init__(self, args: argparse.Namespace, view: View, interrupts: Interrupts, owned: ExitStack) -> None:
        self._args = args
        self._view = view
        self._interrupts = interrupts
        with interrupts.held():
            self._source = connect("source", args.qmp)
            owned.callback(self._source.close)
            self._destination: QmpClient | None = None
            if args.incoming_qmp:
                self._destination = connect("destination", args.incoming_qmp)
                owned.callback(self._destination.close)
        self._in_postcopy = False

    def go(self, result: dict[str, Any]) -> None:
        """Migrate; MigrateError or Interrupted when that was not to be.  *result* is filled as far as it goes."""
        with self._interrupts.held():
            self._check_idle()
            for side in self._sides():
                self._settle(side)
            limit = self._source.command("query-migrate-parameters").get("downtime-limit", 300)
            rounds = Rounds(limit)
            uri = self._args.uri if self._destination is None else listen(self._destination, self._args.uri)
            result |= {"source": self._source.version, "uri": uri}
            self._source.command("migrate", uri=uri)
            self._view.begin(f"{self._source.version} → {uri}")
        try:
            report = self._watch(rounds)
        except Interrupted:
            report = self._interrupted()
            self._tell(result, report, rounds)
            if report.get("status") != "completed":
                result["error"] = self._ending(report)
                raise
            return
        self._tell(result, report, rounds)
        if report["status"] != "completed":
            raise MigrateError(self._ending(report))

    # ---- before it begins ----

    def _sides(self) -> list[QmpClient]:
        return [side for side in (self._source, self._destination) if side is not None]

    def _check_idle(self) -> None:
        status = self._source.command("query-migrate").get("status")
        if status in RUNNING or str(status).startswith("postcopy"):
            raise MigrateError(f"the source has a migration under way already: it is {status}")

    def _settle(self, side: QmpClient) -> None:
        """Capabilities and parameters, the same on both sides."""
        wanted = list(self._args.capability)
        if self._args.postcopy:
            wanted.append(("postcopy-ram", True))
        if wanted:
            states = [{"capability": name, "state": state} for name, state in wanted]
            side.command("migrate-set-capabilities", capabilities=states)
        present = side.command("query-migrate-parameters") if self._args.set else {}
        values = {name: parameter_value(name, text, present.get(name)) for name, text in self._args.set}
        if self._args.max_bandwidth is not None:
            values["max-bandwidth"] = self._args.max_bandwidth
        if self._args.downtime_limit is not None:
            values["downtime-limit"] = self._args.downtime_limit
        if values:
            side.command("migrate-set-parameters", **values)

    # ---- while it lasts ----

    def _watch(self, rounds: Rounds) -> dict[str, Any]:
        """Follow it to its end; the last report."""
        started = time.monotonic()
        while True:
            with self._interrupts.held():
                report = self._look(rounds)
                if report["status"] in FINAL:
                    return report
                if self._args.timeout and not self._in_postcopy and time.monotonic() - started > self._args.timeout:
                    self._view.say(f"not done after {self._args.timeout:g} s: cancelled")
                    return self._cancel()
            time.sleep(POLL_SECONDS)

    def _look(self, rounds: Rounds) -> dict[str, Any]:
        report: dict[str, Any] = self._source.command("query-migrate")
        status = report.get("status", "none")
        if status == "postcopy-paused":
            text = report.get("error-desc", "the connection broke")
            raise MigrateError(
                f"postcopy is paused ({text}): the guest waits for `migrate-recover` and `migrate` with resume"
            )
        self._in_postcopy = self._in_postcopy or status.startswith("postcopy")
        sample, ended = rounds.add(report)
        if ended is not None:
            self._view.row(ended)
        if sample is not None and status not in FINAL:
            self._view.look(sample)
        if status == "pre-switchover":
            self._source.command("migrate-continue", state=status)
        if self._args.postcopy and status == "active" and sample is not None and sample.number > 1:
            self._start_postcopy()
        return report

    def _start_postcopy(self) -> None:
        self._view.say("postcopy: the guest goes on at the destination, the rest of its memory follows")
        self._source.command("migrate-start-postcopy")
        self._in_postcopy = True

    # ---- when it shall not go on ----

    def _interrupted(self) -> dict[str, Any]:
        if not self._in_postcopy:
            return self._cancel()
        self._view.say("postcopy cannot be cancelled: the guest is at the destination, this goes on to its end")
        return self._until_final(None)

    def _cancel(self) -> dict[str, Any]:
        """Call it off and wait until it is; when the cancel came too late, until it is completed."""
        self._source.command("migrate_cancel")
        return self._until_final(CANCEL_SECONDS)

    def _until_final(self, seconds: float | None) -> dict[str, Any]:
        began = time.monotonic()
        while True:
            report: dict[str, Any] = self._source.command("query-migrate")
            if report.get("status") in FINAL or report.get("status") == "postcopy-paused":
                return report
            if seconds is not None and time.monotonic() - began > seconds:
                raise MigrateError(f"the source is still {report.get('status')} {seconds:.0f} s after the cancel")
            time.sleep(POLL_SECONDS)

    # ---- afterwards ----

    def _ending(self, report: dict[str, Any]) -> str:
        """How it ended short of completion: the words of either side, and where the guest is."""
        words = [report.get("error-desc", "")]
        if self._destination is not None and report["status"] == "failed":
            words.append(self._words_of_destination())
        reason = "; ".join(word for word in words if word)
        text = (
            f"the migration {report['status']}" if report["status"] == "failed" else f"the migration was {report['status']}"
        )
        return text + (f": {reason}" if reason else "") + f"; {self._place_of_guest()}"

    def _words_of_destination(self) -> str:
        assert self._destination is not None
        try:
            return str(self._destination.command("query-migrate").get("error-desc", ""))
        except QmpError:
            return "the destination has ended"

    def _place_of_guest(self) -> str:
        try:
            state = self._source.command("query-status")["status"]
        except QmpError as error:
            return f"where the guest is cannot be told ({error})"
        if state in BACK_AT_SOURCE:
            return f"the guest is at the source, {state}"
        return f"the source's guest is stopped ({state}): see whether it runs at the destination before you use `cont`"

    def _tell(self, result: dict[str, Any], report: dict[str, Any], rounds: Rounds) -> None:
        """Fill *result* and say the summary."""
        result["status"] = report.get("status")
        result["rounds"] = [done.as_json() for done in rounds.finished]
        ram = report.get("ram")
        if ram is None:
            return
        result |= {
            "total_ms": report.get("total-time"),
            "setup_ms": report.get("setup-time"),
            "downtime_ms": report.get("downtime"),
            "transferred_bytes": ram["transferred"],
            "bitmap_syncs": ram["dirty-sync-count"],
            "mbps": round(ram["mbps"], 1),
            "pages": {"normal": ram["normal"], "zero": ram["duplicate"]},
        }
        if report["status"] == "completed":
            self._view.end()
            self._view.say(summary(report))


def summary(report: dict[str, Any]) -> str:
    """A completed migration in a line."""
    ram = report["ram"]
    return (
        f"completed in {report['total-time'] / 1000:.2f} s, downtime {report.get('downtime', 0)} ms: "
        f"{size(ram['transferred'])} sent for {size(ram['total'])} of memory, {ram['dirty-sync-count']} bitmap syncs, "
        f"{ram['mbps']:.0f} Mbit/s"
    )


def parameter_value(name: str, text: str, present: object) -> object:
    """*text* as a value of parameter *name*, whose *present* value shows the type; JSON where that is not known."""
    if isinstance(present, bool):
        if text not in SWITCHES:
            raise MigrateError(f"--set {name}={text}: on or off is expected")
        return SWITCHES[text]
    if isinstance(present, str):
        return text
    if isinstance(present, int):
        try:
            return byte_count(text)
        except argparse.ArgumentTypeError as error:
            raise MigrateError(f"--set {name}: {error}") from error
    try:
        return json.loads(text)
    except ValueError:
        return text
