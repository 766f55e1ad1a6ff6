"""Whoever types, and a registry of QMP commands that only note what they were asked."""

import asyncio

from kvm.monitor.hmp import HumanShell, execute_line, make_shell
from kvm.monitor.hmp.shell import HumanSession
from kvm.monitor.registry import Registry
from qemumig.commands.command import ANY, Argument, Command, CommandError
from qemumig.options import PARAMETERS, PROPERTIES

PAGE = 4096


class PretendMemory:
    """Physical memory with a pattern up to *size*; virtual page N of CPU C is physical page N + C, but for page 9."""

    size = 0x10000

    def __init__(self):
        self.lookups = 0

    def covers(self, address, size):
        return address + size <= self.size

    def read(self, address, size):
        return bytes((address + offset) * 7 & 0xFF for offset in range(size))

    def translate(self, cpu, address):
        self.lookups += 1
        return None if address // PAGE == 9 else address + cpu * PAGE


class Person:
    """Types lines; *answers* are the QMP commands there are, by name: a value, or a CommandError to be raised."""

    def __init__(self, answers=None, **options):
        self.asked = []
        self.reported = []
        self.memory = PretendMemory()
        self.registry = Registry()
        self.answers = dict(answers or {})
        self.registry.add(self._command(name) for name in self.answers)
        self.shell: HumanShell = make_shell(self.registry, self.memory, self, self.reported.append)
        self.session = HumanSession(self.shell, **options)

    def migration_property(self, name):
        return PROPERTIES[name]

    def _command(self, name):
        def handler(**arguments):
            self.asked.append((name, arguments))
            answer = self.answers[name]
            if isinstance(answer, list) and answer and callable(answer[0]):
                answer = answer.pop(0)()
            if isinstance(answer, CommandError):
                raise answer
            return answer

        return Command(name, handler, tuple(Argument(member, ANY, optional=True) for member in MEMBERS))

    def type(self, line):
        """What *line* prints."""
        return asyncio.run(execute_line(self.session, line))

    def type_to_qmp(self, line, **arguments):
        return asyncio.run(self.shell.human_monitor_command(line, **arguments))


MEMBERS = (
    *("uri", "resume", "exit-on-error", "state", "capabilities", "initial", "max", "rounds", "step", "interfaces", "id"),
    *("protocol", "hostname", "port", "tls-port", "cert-subject", "calc-time", "mode", "sample-pages", "cpu-index"),
    *("dirty-rate", *(parameter.name for parameter in PARAMETERS if parameter.name != "mode")),
)
