"""Whether the ranks make progress, and which is behind if they do not.

Every rank notes when it did something last (a micro-step, an update, a part of forming); heartbeats carry
it. All ranks wait for each other, so one that stands still makes all stand still; but the others went on
until they had to wait for it, and so it is the one that has been silent for longest. One that is stopped by
a signal is told apart at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_NUM_RECENT_STEPS = 200
# Before a step was seen.
_UNKNOWN_STEP_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StalledRank:
    """No rank does anything any more."""

    rank: int
    """The one behind the others."""
    seconds: float


@dataclass(slots=True, kw_only=True)
class _RankProgress:
    moved_at: float
    is_halted: bool = False


class HangDetector:
    """The ranks of one generation."""

    def __init__(self) -> None:
        self._ranks: dict[int, _RankProgress] = {}

    def update(self, rank: int, *, silent_s: float, is_halted: bool, now: float) -> None:
        """A heartbeat has told of a rank."""
        self._ranks[rank] = _RankProgress(moved_at=now - silent_s, is_halted=is_halted)

    def find_stalled_rank(self, *, limit_s: float, now: float) -> StalledRank | None:
        """Who holds the others up, if none has done anything for longer than the limit."""
        if not self._ranks or now - max(progress.moved_at for progress in self._ranks.values()) <= limit_s:
            return None
        rank, progress = min(self._ranks.items(), key=lambda item: (not item[1].is_halted, item[1].moved_at))
        return StalledRank(rank=rank, seconds=now - progress.moved_at)


class StepTimes:
    """How long steps take."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, float]] = deque(maxlen=_NUM_RECENT_STEPS)

    def add(self, step: int, seconds: float) -> None:
        """A heartbeat has told of the last step; of the same one more than once."""
        if step and (not self._recent or self._recent[-1][0] != step):
            self._recent.append((step, seconds))

    @property
    def p99_s(self) -> float:
        """The 99th percentile of the recent ones."""
        recent = sorted(seconds for _, seconds in self._recent)
        return recent[int(0.99 * (len(recent) - 1))] if recent else _UNKNOWN_STEP_S
