"""Send the trackers of a run that is over the steps that they lack, such as after a server did not answer."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forge.config.resources import WandbSpec
from forge.errors import ArgumentError
from forge.events import TrackingDegraded
from forge.plan.plan import Plan, written_job
from forge.redact import redacted_values
from forge.runs.create import require_plain_folder
from forge.runs.lock import hold_lock
from forge.runs.patient_file import open_whole_lines
from forge.runs.reader import read_run, search_folder
from forge.runs.recorder import append_event, end_tracking
from forge.runs.records import EVENTS
from forge.runs.remote_ref import read_remote_ref
from forge.runs.scores import read_scores
from forge.runs.trackers.base import RunStatus, TrackedRun
from forge.runs.trackers.feed import TrackerFeed
from forge.runs.trackers.mlflow_tracker import database_problem
from forge.runs.trackers.registry import build_trackers, tracking_problem
from forge.runs.trackers.wandb_tracker import OF_TASKS, log_scores, scores_sent
from forge.runs.trials import TRIALS

_TIMEOUT_S = 600.0
_STATUS: dict[str, RunStatus] = {"finished": "finished", "failed": "failed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncResult:
    """What one tracker of one run was sent."""

    run_id: str
    tracker: str
    num_sent: int
    is_complete: bool
    """Whether the tracker has every step now."""


def sync_run(folder: Path, *, on_reason: Callable[[str], None]) -> list[SyncResult]:
    """Send the trackers of a run, or of all trials of a search, the steps that they lack.

    Args:
        on_reason: called with why a tracker does not take them, on another thread.

    Raises: ArgumentError if the run is running, was recorded on another machine, has no trackers, has links that
        lead out of it, or if one of its trackers cannot be used here; PlanError if the run cannot be read.
    """
    folder = folder.resolve() if folder.name in ("", "..") else folder.absolute()  # its name is the run's id
    if read_remote_ref(folder) is not None:
        raise ArgumentError(f"{folder.name} was recorded on a cluster; sync it on the cluster's head")
    root = search_folder(folder) or folder
    require_plain_folder(root)
    _require_appendable(folder / EVENTS)
    with hold_lock(root):
        run = read_run(folder)
        if run.status == "running":  # on another machine
            raise ArgumentError(f"{folder.name} is running; its trackers are fed")
        if problem := tracking_problem(run.plan.job.tracking):
            raise ArgumentError(f"{folder.name}: {problem}")
        if problem := database_problem(run.plan.job.tracking.mlflow, folder=root):
            raise ArgumentError(f"{folder.name}: {problem}")
        folders = [folder]
        if run.plan.search is not None:
            folders = sorted(path.parent for path in (folder / TRIALS).glob("*/plan.json"))
        results = [result for one in folders for result in _sync(one, group=root.name, on_reason=on_reason)]
    if not results:
        raise ArgumentError(f"{folder.name} has no trackers: its job sets none under tracking")
    return results


def _require_appendable(path: Path) -> None:
    """Check that what a tracker does not take can be recorded. Raises: ArgumentError if not."""
    try:
        open_whole_lines(path).close()
    except OSError as error:
        raise ArgumentError(f"{path} cannot be written: {error.strerror}") from None


def _sync(folder: Path, *, group: str, on_reason: Callable[[str], None]) -> list[SyncResult]:
    def report(reason: str) -> None:
        append_event(folder, TrackingDegraded(reason=reason))
        on_reason(reason)

    run = read_run(folder)
    plan: Plan = run.plan
    tracked = TrackedRun(
        folder=folder,
        run_id=folder.name,
        config=redacted_values(written_job(plan), os.environ),
        group=group if folder.parent.name == TRIALS else None,
        report=report,
    )
    feeds = [TrackerFeed(tracker, tracked) for tracker in build_trackers(plan.job.tracking, tracked)]
    for feed in feeds:
        feed.begin_end(_STATUS.get(run.status, "stopped"), timeout_s=_TIMEOUT_S)
    for feed in feeds:
        feed.wait_for_end()
    end_tracking()
    results = [
        SyncResult(run_id=folder.name, tracker=feed.name, num_sent=feed.num_sent, is_complete=feed.is_complete)
        for feed in feeds
    ]
    return results + _sync_scores(folder, spec=plan.job.tracking.wandb, report=report)


def _sync_scores(folder: Path, *, spec: WandbSpec, report: Callable[[str], None]) -> list[SyncResult]:
    """Send the scores of tasks that W&B's run `RUN-tasks` lacks. Returns: nothing if there are no scores."""
    scores = read_scores(folder)
    if spec.mode == "disabled" or not scores:
        return []
    sent = scores_sent(folder, run_id=folder.name)
    missing = [score for score in scores if (score.step or 0, score.task) not in sent]
    problem = log_scores(spec, folder=folder, run_id=folder.name, scores=missing) if missing else None
    if problem is not None:
        report(problem)
    return [
        SyncResult(
            run_id=f"{folder.name}{OF_TASKS}",
            tracker="W&B",
            num_sent=len({score.step for score in missing}) if problem is None else 0,
            is_complete=problem is None,
        )
    ]
