"""An interrupt line that remembers, and deadlines that come when a test says so."""

from __future__ import annotations

from kvm.devices.deadlines import Deadlines


class RecordedLine:
    """`level` as it is now, `moves` as they were told, `edges` how often it rose."""

    def __init__(self) -> None:
        self.level = False
        self.moves: list[bool] = []
        self.adopted: list[bool] = []

    def __call__(self, level: bool) -> None:
        if level is not self.level:
            self.level = level
            self.moves.append(level)

    def adopt(self, level: bool) -> None:
        self.level = level
        self.adopted.append(level)

    @property
    def edges(self) -> int:
        return self.moves.count(True)


class ManualDeadlines(Deadlines):
    """Nothing comes by itself: `come` calls whoever has a deadline, however far off it is."""

    def __init__(self) -> None:
        super().__init__(self._raise)

    @staticmethod
    def _raise(error: Exception) -> None:
        raise error

    def _start(self) -> None:
        """No thread."""

    def come(self) -> bool:
        """Call everyone whose deadline is set; False when there is none."""
        due = [one for one in self._all if one.when is not None]
        for one in due:
            one.when = None
            one.call()
        return bool(due)
