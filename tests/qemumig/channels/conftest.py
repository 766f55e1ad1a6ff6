"""Fixtures of more than one file here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qemumig.channels.channel import QuitEvent


@pytest.fixture
def quit_event(no_leaks: None) -> Iterator[QuitEvent]:
    event = QuitEvent()
    yield event
    event.close()
