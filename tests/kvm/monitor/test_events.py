"""kvm.monitor.events and kvm.monitor.registry."""

import asyncio
import threading
import time

import pytest

from kvm.monitor import events
from kvm.monitor.events import EventHub
from kvm.monitor.registry import Registry
from qemumig.commands.command import Command, CommandError


def collected(scenario):
    """The events that reach a subscriber while `scenario(hub)` runs."""
    got = []

    async def run():
        hub = EventHub()
        hub.subscribe(got.append)
        await scenario(hub)
        hub.stop()

    asyncio.run(run())
    return got


def test_an_event_carries_the_time_of_its_emission():
    async def scenario(hub):
        hub.start()
        hub.emit("STOP")

    before = time.time()
    (event,) = collected(scenario)
    stamp = event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
    assert before - 1e-3 <= stamp <= time.time()
    assert event["event"] == "STOP"
    assert "data" not in event


def test_on_the_loops_thread_delivery_is_immediate():
    got = []

    async def run():
        hub = EventHub()
        hub.start()
        hub.subscribe(got.append)
        hub.emit("A", {"x": 1})
        return len(got)

    assert asyncio.run(run()) == 1


def test_the_order_of_emission_holds_across_threads():
    async def scenario(hub):
        hub.start()
        thread = threading.Thread(target=lambda: hub.emit("first"))
        thread.start()
        thread.join()  # queued for the loop, not delivered yet
        hub.emit("second")

    assert [event["event"] for event in collected(scenario)] == ["first", "second"]


def test_events_of_one_thread_keep_their_order_among_many():
    async def scenario(hub):
        hub.start()

        def emit(name):
            for number in range(200):
                hub.emit(name, {"number": number})

        await asyncio.gather(*(asyncio.to_thread(emit, name) for name in "abc"))

    events = collected(scenario)
    for name in "abc":
        assert [e["data"]["number"] for e in events if e["event"] == name] == list(range(200))


def test_events_from_before_the_start_are_kept():
    async def scenario(hub):
        hub.emit("early")
        hub.start()

    assert [event["event"] for event in collected(scenario)] == ["early"]


def test_after_stop_nothing_is_delivered_and_nothing_breaks():
    got = []

    async def run():
        hub = EventHub()
        hub.start()
        hub.subscribe(got.append)
        hub.stop()
        hub.emit("late")
        return hub

    asyncio.run(run()).emit("later")
    assert got == []


def test_unsubscribing_twice_is_no_error():
    hub = EventHub()
    hub.subscribe(print)
    hub.unsubscribe(print)
    hub.unsubscribe(print)


def test_a_command_name_is_registered_once():
    registry = Registry()
    registry.add([Command("a", print)])
    with pytest.raises(ValueError, match="'a' is registered twice"):
        registry.add([Command("a", print)])


def test_an_unknown_command_is_a_command_not_found():
    with pytest.raises(CommandError, match="The command x has not been found") as caught:
        Registry().find("x")
    assert caught.value.error_class == "CommandNotFound"


# ---- events that are limited ----


IO_ERROR = {"device": "d0", "operation": "write", "action": "report", "reason": "No space left on device"}


def test_only_the_last_of_many_io_errors_follows_the_first(monkeypatch):
    monkeypatch.setattr(events, "LIMIT_S", 0.02)
    times = []

    async def scenario(hub):
        hub.start()
        arrived = asyncio.Event()
        hub.subscribe(lambda message: (times.append(time.monotonic()), len(times) == 2 and arrived.set()))
        for number in range(50):
            hub.emit("BLOCK_IO_ERROR", {**IO_ERROR, "reason": str(number)})
        async with asyncio.timeout(10):
            await arrived.wait()

    assert [event["data"]["reason"] for event in collected(scenario)] == ["0", "49"]
    assert times[1] - times[0] >= 0.02


def test_each_device_has_its_own_limit_and_a_stop_has_none():
    async def scenario(hub):
        hub.start()
        hub.emit("BLOCK_IO_ERROR", IO_ERROR)
        hub.emit("BLOCK_IO_ERROR", {**IO_ERROR, "device": "d1"})
        for _ in range(2):
            hub.emit("BLOCK_IO_ERROR", {**IO_ERROR, "action": "stop"})
            hub.emit("STOP")

    names = [event["event"] for event in collected(scenario)]
    assert names == ["BLOCK_IO_ERROR"] * 3 + ["STOP"] + ["BLOCK_IO_ERROR"] + ["STOP"]


def test_what_is_held_back_when_the_hub_stops_is_delivered():
    async def scenario(hub):
        hub.start()
        for number in range(3):
            hub.emit("RTC_CHANGE", {"offset": number})

    assert [event["data"]["offset"] for event in collected(scenario)] == [0, 2]


def emit_elsewhere(hub, *names):
    thread = threading.Thread(target=lambda: [hub.emit(name) for name in names])
    thread.start()
    thread.join()


def test_events_of_others_wait_while_they_are_held_and_come_in_order():
    async def scenario(hub):
        hub.start()
        seen = []
        hub.subscribe(lambda message: seen.append(message["event"]))
        with hub.held():
            emit_elsewhere(hub, "STOP", "MIGRATION")
            await asyncio.sleep(0)
            assert seen == []
        emit_elsewhere(hub, "RESUME")
        await asyncio.sleep(0.01)
        assert seen == ["STOP", "MIGRATION", "RESUME"]

    assert len(collected(scenario)) == 3


def test_no_event_is_held_for_long():
    async def scenario(hub):
        hub.start()
        told = asyncio.Event()
        hub.subscribe(lambda message: told.set())
        with hub.held():
            emit_elsewhere(hub, "STOP")
            await asyncio.wait_for(told.wait(), 20)
            told.clear()
            emit_elsewhere(hub, "RESUME")  # whoever holds events has had his time
            await asyncio.wait_for(told.wait(), 20)

    assert len(collected(scenario)) == 2


def test_a_command_that_causes_an_event_does_not_wait_for_a_hold():
    async def scenario(hub):
        hub.start()
        seen = []
        hub.subscribe(lambda message: seen.append(message["event"]))
        with hub.held():
            emit_elsewhere(hub, "STOP")
            hub.emit("RESET")
            assert seen == ["STOP", "RESET"]

    assert len(collected(scenario)) == 2
