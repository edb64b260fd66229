"""What a list shows of a run, kept up to date from its files without reading again what was read before.

A list of a thousand runs looks at the sizes and times of their files, and reads the records that were added. It
keeps a few numbers of each run, neither its events nor its plan.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge.errors import ArgumentError
from forge.plan.plan import Plan
from forge.runs.annotations import ANNOTATIONS
from forge.runs.lock import LOCK
from forge.runs.reader import ENDINGS, RunSummary, Status, read_plan, status_of
from forge.runs.records import EVENTS, METRICS, RecordReader, last_step_of
from forge.runs.remote_ref import REMOTE
from forge.runs.trials import TrialTable

_MAX_AT_ONCE = 20_000
"""Events that one `refresh` reads, so that a large file does not keep other runs waiting."""
_PLAN = "plan.json"
_Stamp = tuple[int, int, int] | None
"""Inode, size and time of modification of a file; None if there is none."""


class RunGlance:
    """The newest numbers of one run."""

    def __init__(self, plan: Plan, *, folder: Path) -> None:
        self.folder, self.total_steps = folder, plan.total_steps
        self.search = plan.job.search
        self.num_trials = plan.search.num_trials if plan.search is not None else 0
        self.trials = TrialTable()
        """Of a search; empty for other runs."""
        self.status: Status = "died"
        self.updated = 0.0
        """When the newest record was written, in seconds since the epoch."""
        self.last: dict[str, Any] = {}
        """The newest line of `metrics.jsonl`."""
        self.perplexity: float | None = None
        """Held-out perplexity, where the objective has one."""
        self.usd: float | None = None
        self.world_size = 0
        """0 while no generation trains."""
        self.ending: Status | None = None
        """How its last session ended, as it recorded."""

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in one record of `events.jsonl`."""
        kind = event["event"]
        self.updated = max(self.updated, event["time"])
        if kind in ENDINGS or kind == "RunStarted":
            self.ending, self.world_size = ENDINGS.get(kind), 0
        elif kind == "MembershipChangeStarted":
            self.world_size = 0
        elif kind == "GenerationStarted":
            self.world_size = event["world_size"]
        elif kind == "CostUpdated":
            self.usd = event["usd"]
        elif kind == "Evaluated" and event["weights"] == "current":
            self.perplexity = event["metrics"].get("perplexity")
        if self.search is not None:
            self.trials.add(event)


def glance_of(run: RunSummary) -> RunGlance:
    """Return the same of a run that was read as a whole."""
    glance = RunGlance(run.plan, folder=run.folder)
    for event in run.events:
        glance.add(event)
    glance.last, glance.status, glance.updated = run.last, run.status, run.updated
    return glance


class GlanceReader:
    """Keeps the glance of one run folder up to date.

    Raises: as `read_plan`, if the folder holds no run that can be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.has_more = False
        """Whether there are events that were not read yet."""
        self._stamps: dict[str, _Stamp] = {}
        self._open(stamps_of(folder))

    def refresh(self) -> bool:
        """Read what was written since the last call. Returns: whether anything may have changed.

        Raises: ArgumentError if the folder holds no run any more, or cannot be read; as `read_plan`.
        """
        before, now = self._stamps, stamps_of(self._folder)
        if now[_PLAN] is None:
            raise ArgumentError(f"{self._folder} holds no run any more")
        if now == before and self.glance.status != "running" and not self.has_more:
            return False  # a driver writes its pid into the lock
        if is_rewritten(before, now):
            self._open(now)
            before = self._stamps
        self._stamps = now
        try:
            if self.has_more or before[EVENTS] != now[EVENTS]:
                self._read_events()
            if before[METRICS] != now[METRICS]:
                self.glance.last = last_step_of(self._folder, only_end=True)
                self.glance.updated = max(self.glance.updated, self.glance.last.get("time", 0.0))
        except (OSError, ValueError) as error:
            raise ArgumentError(f"{self._folder} cannot be read: {error}") from error
        status = status_of(self._folder, ending=self.glance.ending)
        is_changed = status != self.glance.status or before != now or self.has_more
        self.glance.status = status
        return is_changed

    def _open(self, now: dict[str, _Stamp]) -> None:
        """Begin to read the folder from its start."""
        self.glance = RunGlance(read_plan(self._folder), folder=self._folder)
        self.glance.updated = (now[_PLAN] or (0, 0, 0))[2] / 1e9
        self._reader = RecordReader(self._folder, kind="event")
        self._stamps = dict.fromkeys(now) | {_PLAN: now[_PLAN]}

    def _read_events(self) -> None:
        num_read = 0
        for event in itertools.islice(self._reader.read(), _MAX_AT_ONCE):
            self.glance.add(event)
            num_read += 1
        self.has_more = num_read == _MAX_AT_ONCE


def is_rewritten(before: Mapping[str, _Stamp], now: Mapping[str, _Stamp]) -> bool:
    """Whether a run has another plan than before, or a file of records that does not continue the former one."""
    for name in (EVENTS, METRICS):
        then, later = before[name], now[name]
        if then is not None and (later is None or later[0] != then[0] or later[1] < then[1]):
            return True
    return now[_PLAN] != before[_PLAN]


def stamps_of(folder: Path) -> dict[str, _Stamp]:
    """Return inode, size and time of modification of the files of a run that change; of the lock, for its pid."""
    return {name: _stamp(f"{folder}/{name}") for name in (_PLAN, EVENTS, METRICS, REMOTE, ANNOTATIONS, LOCK)}


def _stamp(path: str) -> _Stamp:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
