"""The order in which the records of a running run are shown: a generation's steps come after its start.

The supervisor records GenerationStarted and an agent the steps, so either may be written first.
"""

from __future__ import annotations

from typing import Any

# The supervisor records a generation's start milliseconds after rank 0 sends its first step. A supervisor that dies
# in between never records it.
START_PATIENCE_S = 10.0
_STARTING = "GenerationStarting"
_RELEASING = {"RunStarted", "MembershipChangeStarted", _STARTING, "RunFinished", "RunStopped", "RunFailed"}


class StartBeforeSteps:
    """Holds back the steps of a starting generation until its GenerationStarted has been read."""

    def __init__(self) -> None:
        self._is_starting = False
        self._held: list[dict[str, Any]] = []
        self._held_since_s = 0.0

    def add(self, records: list[dict[str, Any]], *, now_s: float) -> list[dict[str, Any]]:
        """Return what may be shown now: of these records and of those held back.

        Args:
            now_s: a monotonic clock.
        """
        ordered: list[dict[str, Any]] = []
        for record in records:
            event = record.get("event")
            if event is None and self._is_starting:
                self._held_since_s = self._held_since_s if self._held else now_s
                self._held.append(record)
            elif event == "GenerationStarted":
                ordered += [record, *self.release()]
            elif event in _RELEASING:
                ordered += [*self.release(), record]
                self._is_starting = event == _STARTING
            else:
                ordered.append(record)
        if self._held and now_s - self._held_since_s > START_PATIENCE_S:
            ordered += self.release()
        return ordered

    def release(self) -> list[dict[str, Any]]:
        """Return the steps held back, and hold back no more."""
        held, self._held, self._is_starting = self._held, [], False
        return held
