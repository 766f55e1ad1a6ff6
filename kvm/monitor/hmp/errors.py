"""What can be wrong with a line."""

from __future__ import annotations


class LineError(Exception):
    """An argument of a command cannot be understood; a pointer to the command's help follows the text."""
