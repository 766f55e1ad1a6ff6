"""A monitor over a machine that only pretends, and a client for it; both on one loop."""

import array
import asyncio
import contextlib
import json
import os
import socket

from kvm.chardev_options import CharDevices
from kvm.config import MachineConfig
from kvm.monitor.commands import MachineCommands
from kvm.monitor.dumps import Dumps
from kvm.monitor.events import EventHub
from kvm.monitor.fdsets import FdSets
from kvm.monitor.inventory import Inventory
from kvm.monitor.qmp import QmpMonitor, session_commands
from kvm.monitor.registry import Registry
from qemumig.qapi import RunState

PATIENCE_S = 10


class PretendMachine:
    """Run states and events of a machine, memory with a pattern, and a record of what was asked."""

    def __init__(self, hub):
        self.runstate = RunState.RUNNING
        self.reboots = True
        self.calls = []
        self._hub = hub

    def stop(self, state):
        self.calls.append(("stop", state))
        self.runstate = state
        self._hub.emit("STOP")

    def start(self):
        self.calls.append("start")
        self.runstate = RunState.RUNNING
        self._hub.emit("RESUME")

    def reset(self):
        self.calls.append("reset")

    def request_shutdown(self, guest, reason):
        self.calls.append(("shutdown", guest, reason))

    def press_power_button(self):
        self.calls.append("power button")
        return False

    def read(self, address, size):
        return bytes((address + offset) & 0xFF for offset in range(size))

    def read_virtual(self, cpu, address, size):
        return self.read(address + 1, size) if address < 1 << 20 else None

    def vcpu_thread_ids(self):
        return [11, 12]


class House:
    """A hub, a registry with the general commands, and as many monitors as wanted."""

    def __init__(self, directory, monitors=1, **options):
        self.directory = directory
        self.hub = EventHub()
        self.registry = Registry()
        self.machine = PretendMachine(self.hub)
        self.autostart = []
        self.quits = 0
        self.devices = CharDevices(print)
        self.ends = []
        self.general = MachineCommands(
            self.machine,
            self.hub.emit,
            set_autostart=self.autostart.append,
            quit=self._quit,
            end_with_guest=self.ends.append,
            **options,
        )
        self.dumps = Dumps(self.machine, cpus=2)
        self.fdsets = FdSets()
        self.registry.add(session_commands(self.registry))
        config = MachineConfig(cpus=2)
        self.inventory = Inventory(self.machine, config, devices=self.devices, disks=[], memories=list)
        for part in (self.general, self.dumps, self.fdsets, self.inventory):
            self.registry.add(part.commands())
        self.monitors = []
        for index in range(monitors):
            backend = self.devices.add_device("-qmp", f"unix:{self.path(index)},server=on,wait=off", f"m{index}", "")
            self.monitors.append(QmpMonitor(backend, self.registry, self.hub))

    def path(self, index=0):
        return f"{self.directory}/qmp{index}"

    def _quit(self):
        self.quits += 1
        for monitor in self.monitors:
            monitor.stop()

    async def __aenter__(self):
        self.hub.start()
        await self.devices.start()
        return self

    async def __aexit__(self, *exception):
        await self.general.close()
        await self.dumps.close()
        for monitor in self.monitors:
            await monitor.close()
        self.hub.stop()
        self.fdsets.close()
        self.devices.close()

    async def client(self, index=0, *, negotiate=True, enable=()):
        client = Client(self.path(index))
        await client.open()
        if negotiate:
            await client.ask("qmp_capabilities", enable=list(enable))
        return client


class Client:
    """A QMP client that shows everything it was sent."""

    def __init__(self, path):
        self._path = path
        self.greeting = None
        self.events = []

    async def open(self):
        self.socket = socket.socket(socket.AF_UNIX)
        # Blocking, in a thread: without that a full backlog is an error instead of a wait.
        await asyncio.to_thread(self.socket.connect, self._path)
        self.socket.setblocking(False)
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self.socket, limit=1 << 26)
        self.greeting = await self.message()

    def close(self):
        self._writer.close()

    async def line(self):
        async with asyncio.timeout(PATIENCE_S):
            return await self._reader.readline()

    async def message(self):
        line = await self.line()
        assert line.endswith(b"\r\n"), line
        return json.loads(line)

    async def response(self):
        """The next message that is no event; events on the way are kept."""
        while True:
            message = await self.message()
            if "event" not in message:
                return message
            self.events.append(message)

    async def event(self, name):
        """The next event of that name, new or kept; others before it are dropped."""
        while True:
            message = self.events.pop(0) if self.events else await self.message()
            if message.get("event") == name:
                return message

    def send(self, data):
        self._writer.write(data)

    async def raw(self, data):
        self.send(data)
        return await self.response()

    async def ask(self, command, **arguments):
        """The whole response to *command*."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self.raw(json.dumps({"execute": command, "arguments": named}).encode())

    async def result(self, command, **arguments):
        response = await self.ask(command, **arguments)
        assert "return" in response, response
        return response["return"]

    async def refusal(self, command, **arguments):
        response = await self.ask(command, **arguments)
        assert "error" in response, response
        return response["error"]["desc"]

    def send_with_descriptor(self, data, descriptor):
        """Pass a descriptor beside *data*; nothing else may wait to be written."""
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))
        with socket.socket(fileno=os.dup(self.socket.fileno())) as plain:
            assert plain.sendmsg([data], [rights]) == len(data)


def serve(scenario, directory, **options):
    """Run `scenario(house)` on a loop with a House."""

    async def run():
        async with House(directory, **options) as house:
            return await scenario(house)

    return asyncio.run(run())


@contextlib.contextmanager
def pipe():
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def error(desc, error_class="GenericError", **identity):
    return {**identity, "error": {"class": error_class, "desc": desc}}
