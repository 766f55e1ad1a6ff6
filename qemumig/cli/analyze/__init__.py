"""`qemumig analyze`: what is in this file?

Takes any QEMU migration stream apart, of any machine type: header, configuration, RAM blocks and how many pages of
each kind came, sections with every field by name and value, commands, and where the file stops making sense if it
does.  A recorded channel of multifd, of preempt, or the second connection of a recovery is recognised, too.

    qemumig analyze guest.mig                          the whole of it as a table; --json for programs, -s without fields
    qemumig analyze --ram pc.ram -o memory.bin F       the memory of one block, as a sparse file
    qemumig analyze --diff OTHER F                     field by field and page by page
    qemumig analyze --for microvm F                    would qemumig's machine take it, and if not, why not

Exit status: 0; 1 when the file stops making sense, differs, does not fit or cannot be read; 128 + signal when interrupted.
"""

# recording   the file as a map             reading       the walk over it      values     fields for people
# model       what was found                ram, live     bodies of sections    table      the report as text
# description finding and measuring         multifd       a multifd channel     as_json    … as JSON
# known       layouts without one           memory        pages of a block      diff       two recordings
# progress    a bar                         machines      what --for compares with

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterable
from itertools import chain
from typing import Any

from . import as_json, memory, table
from .diff import compare
from .machines import MACHINES, fit
from .model import Stream
from .progress import ProgressBar
from .reading import read_stream
from .recording import Recording, open_recording
from .values import printable


def offset(text: str) -> int:
    """An offset on the command line: decimal, or hexadecimal with 0x."""
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no offset: a number not below 0 is expected, 0x… for hexadecimal")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `qemumig analyze`."""
    add = parser.add_argument
    add("file", metavar="FILE", help="the recording; - for standard input")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("-s", "--summary", action="store_true", help="leave the fields of the sections out")
    add("--digest", action="store_true", help="add the SHA-256 of every RAM block's memory")
    add("--offset", type=offset, default=0, metavar="N", help="where in FILE the stream begins (0)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--ram", metavar="BLOCK", help="extract the memory of that RAM block into the file of -o")
    what.add_argument("--diff", metavar="OTHER", help="compare with the recording OTHER")
    what.add_argument("--for", dest="machine", choices=sorted(MACHINES), help="tell whether that machine takes it")
    add("-o", "--output", metavar="FILE", help="where --ram writes to")
    parser.set_defaults(parser=parser)


def run(args: argparse.Namespace) -> int:
    """Analyze: returns the exit status."""
    if (args.ram is None) != (args.output is None):
        args.parser.error("--ram BLOCK and -o FILE belong together")
    if args.diff is not None and args.diff == args.file == "-":
        args.parser.error("standard input can be only one of the two recordings")
    try:
        with contextlib.ExitStack() as owned:
            status = _analyze(args, owned)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("qemumig analyze: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (OSError, memory.ExtractError) as error:
        print(f"qemumig analyze: {error}", file=sys.stderr)
        return 1


def _analyze(args: argparse.Namespace, owned: contextlib.ExitStack) -> int:
    keep_pages = bool(args.ram is not None or args.diff is not None or args.digest)
    recording, stream = _read(args.file, owned, args.offset, keep_pages)
    if args.ram is not None:
        return _extract(args, stream, recording)
    if args.diff is not None:
        return _diff(args, (recording, stream), _read(args.diff, owned, 0, keep_pages))
    if args.machine is not None:
        return _fit(args, stream)
    document = as_json.document(stream, fields=not args.summary)
    lines: list[str] = []
    if args.digest:
        with ProgressBar("digesting") as progress:
            digests = {one.name: memory.digest(stream, recording, one, progress) for one in stream.blocks}
        for entry in document["blocks"]:
            entry["sha256"] = digests[entry["name"]]
        lines = [f"sha256 {digest}  {printable(name)}" for name, digest in digests.items() if digest]
    _print(args, document, chain(table.lines(stream, fields=not args.summary), lines))
    return 1 if stream.problems else 0


def _read(name: str, owned: contextlib.ExitStack, start: int, keep_pages: bool) -> tuple[Recording, Stream]:
    with ProgressBar(f"reading {name}") as progress:
        recording = owned.enter_context(open_recording(name, progress))
        stream = read_stream(recording, progress, start=start, keep_pages=keep_pages)
        if stream.scratch is not None:
            owned.enter_context(stream.scratch)
        return recording, stream


def _print(args: argparse.Namespace, document: dict[str, Any], lines: Iterable[str]) -> None:
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        for line in lines:
            print(line)


def _extract(args: argparse.Namespace, stream: Stream, recording: Recording) -> int:
    with ProgressBar(f"writing {args.output}") as progress:
        length, pages = memory.extract(stream, recording, args.ram, args.output, progress)
    document = {"block": args.ram, "file": args.output, "length": length, "pages_written": pages}
    text = f"{args.output}: {length} bytes, {pages} pages of them not zero"
    _print(args, {**document, "problems": _problems(stream)}, [text, *table.problem_lines(stream)])
    return 1 if stream.problems else 0


def _problems(*streams: Stream) -> list[dict[str, Any]]:
    return [
        {"file": stream.name, "offset": one.offset, "message": one.message} for stream in streams for one in stream.problems
    ]


def _diff(args: argparse.Namespace, *sides: tuple[Recording, Stream]) -> int:
    (_, left), (_, right) = sides
    with ProgressBar("comparing") as progress:

        def look_round(done: int, total: int | None) -> None:
            for recording, _ in sides:
                recording.let_go()
            progress(done, total)

        comparison = compare(left, right, look_round)
    heads = [table.title(f"{mark} {one.name}", one) for mark, one in (("left ", left), ("right", right))]
    problems = [line for one in (left, right) for line in table.problem_lines(one)]
    _print(args, {**comparison.as_json(), "problems": _problems(left, right)}, [*heads, *comparison.lines(), *problems])
    return 0 if comparison.same and not problems else 1


def _fit(args: argparse.Namespace, stream: Stream) -> int:
    found = fit(stream, MACHINES[args.machine])
    _print(args, {**found.as_json(), "problems": _problems(stream)}, [*found.lines(), *table.problem_lines(stream)])
    return 0 if found.fits and not stream.problems else 1
