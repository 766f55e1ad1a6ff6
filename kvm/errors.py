"""What the lower floor raises: a refusal of the kernel, with the name of what was asked."""

from __future__ import annotations

import os


class KvmError(OSError):
    """The kernel refused; *what* is the request and its object: `KVM_GET_DIRTY_LOG (slot 7)`."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(number, os.strerror(number))
        self.what = what

    def __str__(self) -> str:
        return f"[Errno {self.errno}] {self.what}: {self.strerror}"


class BackingError(KvmError):
    """Guest memory cannot be had as asked; str() is a sentence for the user, without a number."""

    def __init__(self, number: int, what: str, *, reason: bool = True) -> None:
        """*what* is the sentence; *reason* appends the system's text for *number*."""
        super().__init__(number, what)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.what}: {self.strerror}" if self.reason else self.what
