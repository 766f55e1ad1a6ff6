"""kvm.monitor.commands: what any machine can be asked (qmp.md §3, §14)."""

import pytest

from qemumig.qapi import RunState

from .harness import serve


def ask(directory, *commands, state=RunState.RUNNING, **options):
    """Run commands one after the other: their responses, and the house."""

    async def scenario(house):
        house.machine.runstate = state
        client = await house.client()
        return [await client.ask(command) for command in commands], house

    return serve(scenario, directory, **options)


def test_query_status_names_the_run_state(directory):
    ((answer,), _) = ask(directory, "query-status", state=RunState.INMIGRATE)
    assert answer == {"return": {"status": "inmigrate", "running": False}}


def test_stop_and_cont_are_idempotent(directory):
    answers, house = ask(directory, "stop", "stop", "cont", "cont")
    assert answers == [{"return": {}}] * 4
    assert house.machine.calls == [("stop", RunState.PAUSED), "start"]


@pytest.mark.parametrize("state", [RunState.PRELAUNCH, RunState.POSTMIGRATE, RunState.FINISH_MIGRATE])
def test_stop_leaves_a_stopped_machine_as_it_is(directory, state):
    _, house = ask(directory, "stop", state=state)
    assert house.machine.runstate is state


def test_stop_and_cont_of_an_incoming_machine_decide_how_it_will_start(directory):
    answers, house = ask(directory, "stop", "cont", state=RunState.INMIGRATE)
    assert answers == [{"return": {}}] * 2
    assert house.autostart == [False, True]
    assert house.machine.calls == []


@pytest.mark.parametrize(
    ("state", "desc"),
    [
        (RunState.FINISH_MIGRATE, "Migration is not finalized yet"),
        (RunState.INTERNAL_ERROR, "Resetting the Virtual Machine is required"),
        (RunState.SHUTDOWN, "Resetting the Virtual Machine is required"),
    ],
)
def test_cont_is_refused_where_the_guest_must_not_run(directory, state, desc):
    ((answer,), house) = ask(directory, "cont", state=state)
    assert answer["error"] == {"class": "GenericError", "desc": desc}
    assert house.machine.calls == []


def test_cont_starts_a_machine_that_has_migrated_away(directory):
    _, house = ask(directory, "cont", state=RunState.POSTMIGRATE)
    assert house.machine.calls == ["start"]


def test_quit_is_answered_and_nothing_after_it_runs(directory):
    async def scenario(house):
        client = await house.client()
        client.send(b'{"execute": "quit", "id": 1}{"execute": "stop"}')
        event, answer = await client.message(), await client.message()
        for monitor in house.monitors:
            await monitor.close()
        return event, answer, house.quits, house.machine.calls

    event, answer, quits, calls = serve(scenario, directory)
    assert (event["event"], event["data"]) == ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
    assert answer == {"return": {}, "id": 1}
    assert (quits, calls) == (1, [])


def test_system_reset_resets_and_says_so(directory):
    async def scenario(house):
        client = await house.client()
        client.send(b'{"execute": "system_reset"}')
        return await client.message(), await client.message(), house.machine.calls

    event, answer, calls = serve(scenario, directory)
    assert (event["event"], event["data"]) == ("RESET", {"guest": False, "reason": "host-qmp-system-reset"})
    assert (answer, calls) == ({"return": {}}, ["reset"])


def test_where_a_reset_does_not_reset_it_ends_the_guest(directory):
    async def scenario(house):
        client = await house.client()
        await client.result("set-action", reboot="shutdown")
        await client.result("system_reset")
        await client.result("set-action", reboot="reset")
        await client.result("system_reset")
        return house.machine.calls

    assert serve(scenario, directory) == [("shutdown", False, "host-qmp-system-reset"), "reset"]


def test_set_action_says_whether_the_program_ends_with_the_guest(directory):
    async def scenario(house):
        client = await house.client()
        for shutdown in ("pause", "poweroff"):
            await client.result("set-action", shutdown=shutdown, panic="none", watchdog="none")
        await client.result("set-action")
        return house.ends, await client.refusal("set-action", reboot="foo")

    assert serve(scenario, directory) == ([False, True], "Parameter 'reboot' does not accept value 'foo'")


def test_the_power_button_is_pressed_and_told(directory):
    async def scenario(house):
        client = await house.client()
        client.send(b'{"execute": "system_powerdown"}')
        return (await client.message())["event"], await client.message(), house.machine.calls

    assert serve(scenario, directory) == ("POWERDOWN", {"return": {}}, ["power button"])


def test_a_guest_that_cannot_suspend_cannot_be_woken(directory):
    ((answer,), _) = ask(directory, "system_wakeup")
    assert answer["error"]["desc"] == "wake-up from suspend is not supported by this guest"


def test_names_and_numbers_of_the_machine(directory):
    answers, _ = ask(
        directory,
        "query-name",
        "query-uuid",
        "query-kvm",
        "query-target",
        "query-version",
        name="vm",
        uuid=bytes(range(16)),
    )
    assert [answer["return"] for answer in answers] == [
        {"name": "vm"},
        {"UUID": "00010203-0405-0607-0809-0a0b0c0d0e0f"},
        {"enabled": True, "present": True},
        {"arch": "x86_64"},
        {"qemu": {"major": 10, "minor": 0, "micro": 0}, "package": "qemumig 0.1.0"},
    ]


def test_a_machine_without_name_and_uuid_says_that(directory):
    answers, _ = ask(directory, "query-name", "query-uuid")
    assert [answer["return"] for answer in answers] == [{}, {"UUID": "00000000-0000-0000-0000-000000000000"}]


def test_query_commands_lists_what_there_is(directory):
    ((answer,), house) = ask(directory, "query-commands")
    names = [entry["name"] for entry in answer["return"]]
    assert names == house.registry.names()
    assert {"qmp_capabilities", "getfd", "closefd", "stop", "cont", "quit", "pmemsave"} <= set(names)
