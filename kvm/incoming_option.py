"""-incoming without a URI: one channel as JSON or as dotted keys (cli.md §6).

{"channel-type": "main", "addr": {…}}     main,addr.transport=socket,addr.type=unix,addr.path=P
"""

from __future__ import annotations

from typing import Any

from qemumig.commands.command import CommandError
from qemumig.commands.types import CHANNELS

from .from_text import json_object, nest, typed
from .keyval import UsageError, split


def read_channel(text: str) -> dict[str, Any]:
    """The channel; UsageError."""
    channel = json_object(text) if text.startswith("{") else nest(split(text, "channel-type"))
    kind = CHANNELS.element
    try:
        checked: dict[str, Any] = kind.check(typed(channel, kind), "")
    except CommandError as error:
        raise UsageError(error.desc) from error
    if checked["channel-type"] != "main":
        raise UsageError(f"channels of type '{checked['channel-type']}' are not built")
    return checked
