"""Dirty rate and dirty limit (hmp.md §8)."""

from __future__ import annotations

from typing import Any

from .arguments import Argument, Flag, Number
from .command import Handler, HumanCommand
from .shell import HumanSession

HINT_RATE = "[Please use 'info dirty_rate' to check results]\n"
HINT_LIMIT = "[Please use 'info vcpu_dirty_limit' to query dirty limit for virtual CPU]\n"


def dirty_rate_commands() -> list[HumanCommand]:
    """Start a measurement, set and lift limits."""
    measure = (Flag("r"), Flag("b"), Number("seconds", wide=True), Number("sample_pages", optional=True, wide=True))
    index = Number("cpu_index", optional=True, wide=True)
    limit = (Number("dirty_rate", wide=True), index)
    return [
        _command("calc_dirty_rate", calc_dirty_rate, "measure how fast the guest dirties memory", measure),
        _command("set_vcpu_dirty_limit", set_limit, "limit how fast vCPUs dirty memory", limit),
        _command("cancel_vcpu_dirty_limit", cancel_limit, "lift that limit", (index,)),
    ]


def dirty_rate_information() -> list[HumanCommand]:
    """What `info` knows of them."""
    rate, limit = "how fast the guest dirties memory", "how fast vCPUs may dirty memory"
    return [
        HumanCommand("dirty_rate", info_dirty_rate, help=rate, needs=("query-dirty-rate",)),
        HumanCommand("vcpu_dirty_limit", info_limit, help=limit, needs=("query-vcpu-dirty-limit",)),
    ]


def _command(name: str, handler: Handler, text: str, arguments: tuple[Argument, ...]) -> HumanCommand:
    """A command that stands on the one of QMP with nearly the same name."""
    return HumanCommand(name, handler, arguments, help=text, needs=(name.replace("_", "-"),))


async def calc_dirty_rate(session: HumanSession, r: bool, b: bool, seconds: int, sample_pages: int = 0) -> str:
    if not seconds:
        return "Incorrect period length specified!\n"
    if r and b:
        return "Either dirty ring or dirty bitmap can be specified!\n"
    mode = "dirty-ring" if r else "dirty-bitmap" if b else "page-sampling"
    sampling = {"sample_pages": sample_pages} if sample_pages else {}
    await session.qmp("calc-dirty-rate", calc_time=seconds, mode=mode, **sampling)
    return f"Starting dirty rate measurement with period {seconds} seconds\n{HINT_RATE}"


async def info_dirty_rate(session: HumanSession) -> str:
    rate = await session.qmp("query-dirty-rate")
    lines = [f"Status: {rate['status']}", f"Start Time: {rate['start-time']} (ms)"]
    if rate["mode"] == "page-sampling":
        lines.append(f"Sample Pages: {rate['sample-pages']} (per GB)")
    lines += [f"Period: {rate['calc-time']} (sec)", f"Mode: {rate['mode']}"]
    lines.append(f"Dirty rate: {rate['dirty-rate']} (MB/s)" if "dirty-rate" in rate else "Dirty rate: (not ready)")
    lines += [f"vcpu[{cpu['id']}], Dirty rate: {cpu['dirty-rate']} (MB/s)" for cpu in rate.get("vcpu-dirty-rate", [])]
    return "".join(f"{line}\n" for line in lines)


async def set_limit(session: HumanSession, dirty_rate: int, **which: Any) -> str:
    if dirty_rate < 0:
        return f"Error: invalid dirty page limit {dirty_rate}\n"
    await session.qmp("set-vcpu-dirty-limit", dirty_rate=dirty_rate, **which)
    return ""


async def cancel_limit(session: HumanSession, **which: Any) -> str:
    await session.qmp("cancel-vcpu-dirty-limit", **which)
    return HINT_LIMIT


async def info_limit(session: HumanSession) -> str:
    limits = await session.qmp("query-vcpu-dirty-limit")
    if not limits:
        return "Dirty page limit not enabled!\n"
    return "".join(
        f"vcpu[{limit['cpu-index']}], limit rate {limit['limit-rate']} (MB/s), "
        f"current rate {limit['current-rate']} (MB/s)\n"
        for limit in limits
    )
