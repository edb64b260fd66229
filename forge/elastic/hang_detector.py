"""Detects that the ranks of a generation make no progress, and which rank hangs.

Every rank publishes the time of its last progress (a micro-step, an update, a part of its startup); heartbeats
report these times. A rank that hangs stops all others at their next collective operation, so the rank without
progress for longest is the one that hangs. A rank suspended by a signal is identified immediately.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

from forge.elastic.states import Phase

_NUM_RECENT_STEPS = 200
_NUM_TYPICAL_STEPS = 32
# Assumed before a step was measured.
_UNKNOWN_STEP_S = 1.0
# A rank hangs after the larger of this time and this multiple of a long step.
_STALL_S = 5.0
_STALL_STEPS = 4
# A starting generation may take this long without progress; the first one has to initialise the model.
_STARTUP_S = 20.0
_FIRST_STARTUP_S = 300.0
# A machine that is busy with other programs looks like one that hangs. So every hang in a row doubles the limits,
# except of a rank that a signal has stopped; after this number of steps they are as at first.
_MAX_DOUBLINGS = 4
_CALM_STEPS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class StalledRank:
    """The rank that the others wait for."""

    rank: int
    seconds: float
    """Since its last progress."""
    is_suspended: bool
    """A signal has stopped its process."""


@dataclass(slots=True, kw_only=True)
class _RankProgress:
    moved_at: float
    is_suspended: bool = False


class HangDetector:
    """Progress of the ranks of one generation."""

    def __init__(self) -> None:
        self._ranks: dict[int, _RankProgress] = {}
        self._last_moved_at = -math.inf
        self._has_found = False

    def update(self, rank: int, *, silent_s: float, is_suspended: bool, now: float) -> None:
        """Note a rank's progress from a heartbeat.

        Args:
            silent_s: seconds since its last progress.
            is_suspended: a signal has stopped its process.
        """
        moved_at = now - silent_s
        self._ranks[rank] = _RankProgress(moved_at=moved_at, is_suspended=is_suspended)
        self._last_moved_at = max(self._last_moved_at, moved_at)

    def find_stalled_rank(self, *, limit_s: float, now: float) -> StalledRank | None:
        """Return, once, the rank that holds up the others if none has made progress for longer than the limit."""
        if self._has_found or not self._ranks:
            return None
        if now - self._last_moved_at <= limit_s:
            return None
        self._has_found = True
        rank, progress = min(self._ranks.items(), key=lambda item: (not item[1].is_suspended, item[1].moved_at))
        return StalledRank(rank=rank, seconds=now - progress.moved_at, is_suspended=progress.is_suspended)


class StepTimes:
    """Durations of the most recent steps."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, float, int]] = deque(maxlen=_NUM_RECENT_STEPS)
        self._num_doublings = self._num_calm = 0

    def add(self, step: int, *, seconds: float, num_workers: int) -> None:
        """Note the duration of the last step; heartbeats report the same step repeatedly."""
        if step and (not self._recent or self._recent[-1][0] != step):
            self._recent.append((step, seconds, num_workers))
            self._num_calm += 1
            if self._num_calm >= _CALM_STEPS:
                self._num_doublings = 0

    def note_hang(self, stalled: StalledRank) -> None:
        """Double the limits, in case the rank was only slow."""
        self._num_calm = 0
        if not stalled.is_suspended:
            self._num_doublings = min(self._num_doublings + 1, _MAX_DOUBLINGS)

    @property
    def last_step(self) -> int | None:
        """The last step that was noted."""
        return self._recent[-1][0] if self._recent else None

    @property
    def worker_s(self) -> float | None:
        """Workers times seconds of a step: the median of the last ones, at whatever numbers of workers."""
        recent = list(self._recent)[-_NUM_TYPICAL_STEPS:]
        return median(seconds * num_workers for _, seconds, num_workers in recent) if recent else None

    @property
    def p99_s(self) -> float:
        """The 99th percentile."""
        recent = sorted(seconds for _, seconds, _ in self._recent)
        return recent[int(0.99 * (len(recent) - 1))] if recent else _UNKNOWN_STEP_S

    def stall_limit_s(self, phase: Phase, *, is_first: bool) -> float:
        """How long all ranks may be silent; infinite in phases without ranks.

        Args:
            is_first: no generation of the run has started before.
        """
        factor: int = 2**self._num_doublings
        if phase is Phase.STARTING:
            return _FIRST_STARTUP_S if is_first else min(_FIRST_STARTUP_S, factor * _STARTUP_S)
        if phase in (Phase.TRAINING, Phase.DRAINING):
            return factor * max(_STALL_S, _STALL_STEPS * self.p99_s)
        return math.inf
