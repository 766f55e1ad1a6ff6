"""kvm.guest_view: a running guest's memory by virtual address, on KVM."""

import json

import pytest

from qemumig.cli.guest import STATUS_ADDRESS
from tests.kvm.program import system

pytestmark = pytest.mark.needs("kvm")


def test_memsave_shows_a_vcpu_what_pmemsave_shows(directory):
    """The tiny guest maps its low memory one to one, and is in long mode once it prints."""
    with system(directory) as vm:
        vm.until_printed(4)
        vm.result("stop")
        for command, name in (("memsave", "virtual"), ("pmemsave", "physical")):
            vm.result(command, val=STATUS_ADDRESS, size=8192, filename=str(directory / name))
        assert (directory / "virtual").read_bytes() == (directory / "physical").read_bytes()
        assert any((directory / "virtual").read_bytes())
        refusal = vm.ask("memsave", val=1 << 40, size=16, filename=str(directory / "none"))["error"]["desc"]
        assert refusal == "Invalid addr 0x0000010000000000/size 16 specified"


def test_a_running_guest_runs_on_after_memsave(directory):
    with system(directory) as vm:
        vm.until_printed(4)
        vm.result("memsave", val=0, size=4096, filename=str(directory / "dump"))
        assert vm.result("query-status")["running"]
        vm.until_printed(len(vm.printed()) + 2)
        assert not [event for event in vm.events if event["event"] in ("STOP", "RESUME")], json.dumps(vm.events)
