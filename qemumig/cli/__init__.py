"""`qemumig`: the front door for people.

    qemumig analyze     a recorded stream taken apart, compared, checked
    qemumig demo        a running guest moves from VMM to VMM and back, watched and checked
    qemumig migrate     a guest of any VMM with QMP sent elsewhere, with the time left as far as it can be known

One module per command: `add_arguments(parser)` says what it takes, `run(args)` does it and returns the exit status.
They drive VMM processes from outside, over QMP, and so work with qemumig-system and a real QEMU alike:

    qmp        the client                    vmm       a VMM process, its serial port, one migration
    guest      the tiny guest's parameters   progress  rounds, and how they are drawn
    interrupts signals in good order         estimate  the time left
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys

from qemumig import __version__

COMMANDS = {  # module of this package: what `--help` says
    "analyze": "what is in a recorded migration stream: sections, fields, memory",
    "migrate": "send a running guest elsewhere, from a qemumig-system or a QEMU, and watch it go",
    "demo": "migrate a guest that never rests, watch it, and prove that nothing was lost",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of `qemumig` with all commands."""
    parser = argparse.ArgumentParser(
        prog="qemumig",
        description="QEMU's live migration, written anew: tools to see, measure and test it.",
        epilog="The hypervisor itself is qemumig-system; it takes QEMU's options.",
    )
    parser.add_argument("--version", action="version", version=f"qemumig {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"{__name__}.{name}")
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `qemumig` command; returns the exit status."""
    try:
        args = build_parser().parse_args(argv)
        status: int = args.run(args)
    except KeyboardInterrupt:  # before or after the command could answer for itself
        print("qemumig: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return status
