"""kvm.monitor.farewell: what runs when the program ends may answer, and is then cancelled."""

import asyncio

import pytest

from kvm.chardev import CharBackend
from kvm.monitor import farewell


def test_what_ends_by_itself_does_and_what_does_not_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(farewell, "CLOSING_GRACE_S", 0.05)

    async def scenario() -> tuple[int, bool]:
        soon, never = asyncio.create_task(asyncio.sleep(0.001, 7)), asyncio.create_task(asyncio.Event().wait())
        await asyncio.wait_for(farewell.let_end({soon, never}, CharBackend("null")), 10)
        return soon.result(), never.cancelled()

    assert asyncio.run(scenario()) == (7, True)
