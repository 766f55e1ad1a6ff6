"""Commands about the machine as a whole: run state, end, help, and what `info` tells (hmp.md §2)."""

from __future__ import annotations

from .arguments import Number, Rest
from .command import Handler, HumanCommand
from .shell import HumanSession


def general_commands() -> list[HumanCommand]:
    """help, info, cpu, and those that only pass a QMP command on."""
    topic = (Rest("topic"),)
    return [
        HumanCommand("help", show_help, topic, ("?",), "show the help"),
        HumanCommand("info", list_topics, topic, help="show various information about the system state"),
        HumanCommand("cpu", choose_cpu, (Number("index"),), help="set the default CPU", needs=("query-cpus-fast",)),
        _passed_on("cont", "resume emulation", "c"),
        _passed_on("quit", "quit the emulator", "q"),
        _passed_on("stop", "stop emulation", "s"),
        _passed_on("system_powerdown", "send system power down event"),
        _passed_on("system_reset", "reset the system"),
        _passed_on("system_wakeup", "wakeup guest from suspend"),
    ]


def general_information() -> list[HumanCommand]:
    """What `info` knows of the machine."""
    return [
        _about("cpus", info_cpus, "show infos for each CPU", "query-cpus-fast"),
        HumanCommand("history", info_history, help="show the command line history"),
        _about("kvm", info_kvm, "show KVM information", "query-kvm"),
        _about("name", info_name, "show the current VM name", "query-name"),
        _about("status", info_status, "show the current VM status (running|paused)", "query-status"),
        _about("uuid", info_uuid, "show the current VM UUID", "query-uuid"),
        _about("version", info_version, "show the version of QEMU", "query-version"),
    ]


def _about(name: str, handler: Handler, text: str, query: str) -> HumanCommand:
    return HumanCommand(name, handler, help=text, needs=(query,))


def _passed_on(name: str, text: str, *aliases: str) -> HumanCommand:
    async def handler(session: HumanSession) -> None:
        await session.qmp(name)

    return HumanCommand(name, handler, aliases=aliases, help=text, needs=(name,))


def show_help(session: HumanSession, topic: str = "") -> str:
    return session.shell.help_about(topic)


def list_topics(session: HumanSession, topic: str = "") -> str:
    """`info` alone: with a topic the shell has found another command."""
    return session.shell.topics()


async def choose_cpu(session: HumanSession, index: int) -> str:
    if index not in await session.cpu_indices():
        return "invalid CPU index\n"
    session.cpu = index
    return ""


async def info_status(session: HumanSession) -> str:
    status = await session.qmp("query-status")
    if status["running"]:
        return "VM status: running\n"
    detail = "" if status["status"] == "paused" else f" ({status['status']})"
    return f"VM status: paused{detail}\n"


async def info_name(session: HumanSession) -> str:
    answer = await session.qmp("query-name")
    return f"{answer['name']}\n" if "name" in answer else ""


async def info_uuid(session: HumanSession) -> str:
    return f"{(await session.qmp('query-uuid'))['UUID']}\n"


async def info_version(session: HumanSession) -> str:
    version = await session.qmp("query-version")
    return "{major}.{minor}.{micro}".format(**version["qemu"]) + f"{version['package']}\n"


async def info_kvm(session: HumanSession) -> str:
    kvm = await session.qmp("query-kvm")
    state = "not compiled" if not kvm["present"] else "enabled" if kvm["enabled"] else "disabled"
    return f"kvm support: {state}\n"


async def info_cpus(session: HumanSession) -> str:
    lines = []
    for cpu in await session.qmp("query-cpus-fast"):
        mark = "*" if cpu["cpu-index"] == session.cpu else " "
        lines.append(f"{mark} CPU #{cpu['cpu-index']}: thread_id={cpu['thread-id']}\n")
    return "".join(lines)


def info_history(session: HumanSession) -> str:
    return "".join(f"{number}: '{line}'\n" for number, line in enumerate(session.history()))
