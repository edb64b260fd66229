"""W&B: one W&B run for a run of forge, however often it is resumed, online or in files for `wandb sync`.

A step is one row of W&B's history, whose own step number is the training step, so that the rows of several files
of one run do not overlap. If W&B cannot be reached, it records offline.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from forge.config.resources import WandbSpec
from forge.environment import home_folder
from forge.process import first_line
from forge.runs.scores import TaskScore
from forge.runs.trackers.base import EVENT_KEY, RunStatus, StepRanges, TrackedRow, TrackedRun
from forge.runs.trackers.wandb_log import is_offline, log_files, repair_log, rows_in, steps_in, wait_until_closed

# How long W&B may take to start before the run is recorded offline.
_INIT_TIMEOUT_S = 20
# How long W&B may take to upload the rest at the end; what is missing stays in the run folder for `wandb sync`.
_FINISH_TIMEOUT_S = 60
# How long the process of W&B that a killed recorder left behind may take to end.
_CLOSE_TIMEOUT_S = 10.0


OF_TASKS = "-tasks"
"""Ends the id of W&B's run with the scores of a run."""


class WandbTracker:
    """Writes a run to W&B."""

    name: ClassVar[str] = "W&B"
    max_rows: ClassVar[int] = 500
    pause_s: ClassVar[float] = 0.0

    def __init__(self, spec: WandbSpec, run: TrackedRun) -> None:
        self._spec, self._run = spec, run
        self._mode = spec.mode
        self._tracker: Any = None
        self._next_step = 0
        """The least step that W&B takes."""

    def start(self) -> StepRanges:
        if self._mode == "online":
            try:
                if not (os.environ.get("WANDB_API_KEY") or _has_netrc()):
                    raise RuntimeError("W&B has no API key (set WANDB_API_KEY)")
                known = StepRanges(self._steps_in_files())
                self._open()
                # The server continues its run after the last row that it has; a killed W&B may have had more.
                known.add(1, self._next_step)
                return known
            except Exception as error:  # W&B raises many unrelated classes
                self._run.report(f"{_sentence(error)}; recording offline instead")
                self._mode = "offline"
                self.abandon()
        return StepRanges(self._steps_in_files())

    def send(self, rows: Sequence[TrackedRow]) -> None:
        if self._tracker is None:
            self._open()  # offline, a file is created only if there is something for it
        for row in rows:
            values: dict[str, Any] = {"step": row.step, **row.metrics}
            if row.events:
                values[EVENT_KEY] = "; ".join(row.events)
            # W&B takes no row below its last step; a row that fills an older gap gets the next number instead.
            step = max(row.step, self._next_step)
            self._tracker.log(values, step=step, commit=True)
            self._next_step = step + 1

    def alert(self, *, title: str, text: str, level: str) -> None:
        """Send a W&B alert: to the server at once, or with `wandb sync`.

        Args:
            level: `INFO`, `WARN` or `ERROR`.
        """
        if self._tracker is None:
            self._open()
        self._tracker.alert(title=title, text=text, level=level, wait_duration=0)

    def finish(self, status: RunStatus, events: Sequence[str]) -> None:
        if self._tracker is None:
            return
        if events:
            self._tracker.summary[EVENT_KEY] = "; ".join(events)
        self._tracker.summary["status"] = status
        tracker, self._tracker = self._tracker, None
        try:
            tracker.finish(exit_code=1 if status == "failed" else 0)
            if self._run.group is None:
                import wandb

                # `finish` does not wait for the file; the end of W&B's background service does.
                wandb.teardown()
        except Exception as error:  # the service may be gone
            self._run.report(f"W&B did not finish: {first_line(error)}")

    def abandon(self) -> None:
        tracker, self._tracker = self._tracker, None
        with contextlib.suppress(Exception):
            if tracker is not None:
                tracker.finish(exit_code=1)
        if self._run.group is None:
            end_wandb()  # its background service still holds the run's id; the next attempt needs it

    def _open(self) -> None:
        """Start W&B's run, or continue it."""
        self._tracker = _init(
            self._spec,
            folder=self._run.folder,
            run_id=self._run.run_id,
            mode=self._mode,
            group=self._run.group,
            config=dict(self._run.config),
        )
        self._next_step = self._tracker.starting_step
        self._tracker.define_metric("step")
        self._tracker.define_metric("*", step_metric="step")

    def _steps_in_files(self) -> Iterator[int]:
        """The steps of W&B's files of this run, which are repaired first; online, those of the server are not."""
        for path in log_files(self._run.folder, run_id=self._run.run_id):
            if not wait_until_closed(path, timeout_s=_CLOSE_TIMEOUT_S):
                self._run.report(f"another process still writes {path.name}; steps may be in W&B twice")
            elif repaired := repair_log(path):
                self._run.report(f"W&B was killed: {repaired}; its rows are sent again")
        for path in log_files(self._run.folder, run_id=self._run.run_id):
            if self._mode != "online" or is_offline(path):
                yield from steps_in(path)


def scores_sent(folder: Path, *, run_id: str) -> set[tuple[int, str]]:
    """Which steps and tasks W&B's files of `RUN-tasks` have, so that they are not sent twice."""
    return {
        (int(row["step"]), name.partition("/")[0])
        for path in log_files(folder, run_id=run_id + OF_TASKS)
        for row in rows_in(path)
        if isinstance(row.get("step"), int | float)
        for name in row
    }


def log_scores(spec: WandbSpec, *, folder: Path, run_id: str, scores: Sequence[TaskScore]) -> str | None:
    """Write scores of tasks to a W&B run of their own, `RUN-tasks`, whose steps are those of the checkpoints.

    W&B takes no row below the last step of a run, so the run itself cannot have them.

    Returns: why that was not possible; None if it was.
    """
    rows: dict[int, dict[str, float]] = {}
    for score in scores:
        found = {f"{score.task}/{name}": value.value for name, value in score.values.items()}
        rows.setdefault(score.step or 0, {}).update({name: v for name, v in found.items() if v is not None})
    name = run_id + OF_TASKS
    try:
        if spec.mode == "online" and not (os.environ.get("WANDB_API_KEY") or _has_netrc()):
            raise RuntimeError("W&B has no API key (set WANDB_API_KEY)")
        tracker = _init(
            spec,
            folder=folder,
            run_id=name,
            mode=spec.mode,
            group=run_id,
            config={"run": run_id},
            job_type="evaluation",
        )
        tracker.define_metric("step")
        tracker.define_metric("*", step_metric="step")
        for step, values in sorted(rows.items()):
            tracker.log({"step": step, **values})
        tracker.finish()
    except Exception as error:  # W&B raises many unrelated classes
        return _sentence(error)
    finally:
        end_wandb()
    return None


def _init(
    spec: WandbSpec,
    *,
    folder: Path,
    run_id: str,
    mode: str,
    group: str | None,
    config: dict[str, Any],
    job_type: str | None = None,
) -> Any:
    """Start a run of W&B, or continue it."""
    import wandb

    ignore_workspace_settings()
    return wandb.init(
        project=spec.project,
        entity=spec.entity,
        id=run_id,
        name=run_id,
        group=group,
        job_type=job_type,
        dir=folder.absolute(),
        config=config,
        resume="allow" if mode == "online" else None,
        reinit="create_new",  # beside an earlier one that is still uploading
        mode="online" if mode == "online" else "offline",
        settings=wandb.Settings(
            init_timeout=_INIT_TIMEOUT_S,
            finish_timeout=_FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
            console="off",
            silent=True,
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
        ),
    )


def ignore_workspace_settings() -> None:
    """Keep W&B from reading `./wandb/settings` and `./.wandb/settings`; the user's own settings file is still read.

    A current folder that was copied from elsewhere would choose the server that gets the API key, its headers
    and its proxies. W&B has no setting for this.

    Raises: RuntimeError if this version of W&B finds the file in another way.
    """
    from wandb.sdk.wandb_settings import Settings

    if not isinstance(getattr(Settings, "settings_workspace", None), property):
        raise RuntimeError("W&B: this version reads ./wandb/settings in a way that forge does not know")
    Settings.settings_workspace = property(lambda _: os.devnull)


def end_wandb() -> None:
    """End W&B's background service, after which its files are complete."""
    if "wandb" in sys.modules:
        import wandb

        with contextlib.suppress(Exception):  # it may be gone
            wandb.teardown()


def _sentence(error: Exception) -> str:
    text = first_line(error)
    return text if text.startswith("W&B") else f"W&B could not be started: {text}"


def _has_netrc() -> bool:
    return any((home_folder() / name).is_file() for name in (".netrc", "_netrc"))
