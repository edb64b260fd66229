"""MLflow: one MLflow run, on a tracking server or in a SQLite file in the run's folder.

The MLflow run is found again by its tag `forge.run_id`. Steps are sent in their order, and one transaction of
MLflow's database holds a batch of them, so the newest step of a metric tells which steps the server has. Requests
have short timeouts: what cannot be sent now is sent later, from `metrics.jsonl`.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from forge.config.resources import MlflowSpec
from forge.environment import home_folder
from forge.errors import ArgumentError
from forge.runs.trackers.base import RunStatus, StepRanges, TrackedRow, TrackedRun

DATABASE = "mlflow.db"
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # forge sends nothing to anyone but the tracking server
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the feed tries again
}
_URI_VARIABLE = "MLFLOW_TRACKING_URI"
_CREDENTIALS = tuple(f"MLFLOW_TRACKING_{name}" for name in ("TOKEN", "USERNAME", "PASSWORD", "AUTH", "AWS_SIGV4"))
_RUN_TAG, _GROUP_TAG, _EVENTS_TAG = "forge.run_id", "forge.search", "forge.events"
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_LAST_KEY = "step"
"""The metric that is written last of a step."""
_MAX_BATCH = 1000
"""Metrics of one request. Source: MLflow REST API, "Log Batch"."""
_MAX_PARAMS = 100
_MAX_TRIGGER_CHARS = 2000
_REFUSAL = re.compile(
    r"CREATE TRIGGER \w+\s+BEFORE \w+ ON \w+\s+FOR EACH ROW\s+WHEN [\w.!=<>\s]+"
    r"BEGIN\s+SELECT RAISE\(ABORT, '[^']*'\);\s*END"
)
_MAX_VALUE_CHARS = 500
_MAX_EVENTS_CHARS = 4900
_CUT = "..."


class MlflowTracker:
    """Writes a run to MLflow."""

    name: ClassVar[str] = "MLflow"
    max_rows: ClassVar[int] = 100
    pause_s: ClassVar[float] = 1.0

    def __init__(self, spec: MlflowSpec, run: TrackedRun) -> None:
        self._spec, self._run = spec, run
        self._client: Any = None
        self._id = ""
        self._events: list[str] = []
        """Lines of the tag `forge.events`."""
        self._last_steps: dict[str, int] = {}
        """The newest step of each metric that the server has."""

    def start(self) -> StepRanges:
        if problem := credentials_problem(self._spec):
            raise PermissionError(problem)
        os.environ.update({name: value for name, value in _SETTINGS.items() if name not in os.environ})
        from mlflow.tracking import MlflowClient

        uri = self._spec.uri or f"sqlite:///{(self._run.folder / DATABASE).absolute()}"
        if problem := _schema_problem(uri):
            raise PermissionError(problem)
        self._client = MlflowClient(tracking_uri=uri)
        found = self._find_run() or self._create_run()
        self._id = found.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        self._add_params(found.data.params)
        self._events = found.data.tags.get(_EVENTS_TAG, "").splitlines()
        self._last_steps = {metric.key: metric.step for metric in found.data.to_proto().metrics}
        return StepRanges(range(1, self._last_steps.get(_LAST_KEY, 0) + 1))

    def send(self, rows: Sequence[TrackedRow]) -> None:
        batch: list[Any] = []
        for row in rows:
            metrics = list(self._metrics_of(row))
            if len(batch) + len(metrics) > _MAX_BATCH:
                self._client.log_batch(self._id, metrics=batch)
                batch = []
            batch += metrics
        self._client.log_batch(self._id, metrics=batch)
        self._add_events([f"step {row.step}: {text}" for row in rows for text in row.events])

    def finish(self, status: RunStatus, events: Sequence[str]) -> None:
        self._add_events([f"end: {text}" for text in events])
        self._client.set_terminated(self._id, status=_STATUS[status])
        self._client = None

    def abandon(self) -> None:
        self._client = None

    def _find_run(self) -> Any:
        experiment = self._client.get_experiment_by_name(self._spec.experiment)
        if experiment is None:
            return None
        condition = f"tags.`{_RUN_TAG}` = '{self._run.run_id}'"
        found = self._client.search_runs([experiment.experiment_id], filter_string=condition, max_results=1)
        return found[0] if found else None

    def _create_run(self) -> Any:
        experiment = self._client.get_experiment_by_name(self._spec.experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(self._spec.experiment)
        tags = {_RUN_TAG: self._run.run_id}
        if self._run.group is not None:
            tags[_GROUP_TAG] = self._run.group
        return self._client.create_run(number, tags=tags, run_name=self._run.run_id)

    def _add_params(self, known: Mapping[str, str]) -> None:
        """Write the job file as parameters. MLflow keeps first values; what a resumed run changes becomes a tag."""
        from mlflow.entities import Param, RunTag

        params = {key: _cut(value) for key, value in _flat(self._run.config)}
        new = [Param(key, value) for key, value in params.items() if key not in known]
        changed = [
            RunTag(f"resumed.{key}", value) for key, value in params.items() if known.get(key, value) != value
        ]
        for start in range(0, len(new), _MAX_PARAMS):
            self._client.log_batch(self._id, params=new[start : start + _MAX_PARAMS])
        if changed:
            self._client.log_batch(self._id, tags=changed[:_MAX_PARAMS])

    def _add_events(self, lines: Sequence[str]) -> None:
        """Append lines to the tag with the events; the oldest are left out beyond the length that MLflow allows."""
        if not lines:
            return
        self._events += lines
        while len("\n".join(self._events)) > _MAX_EVENTS_CHARS:
            del self._events[0]
        self._client.set_tag(self._id, _EVENTS_TAG, "\n".join(self._events))

    def _metrics_of(self, row: TrackedRow) -> Iterator[Any]:
        from mlflow.entities import Metric

        for key, value in [*row.metrics.items(), (_LAST_KEY, row.step)]:
            if row.step > self._last_steps.get(key, 0):
                yield Metric(key, value, int(row.time * 1000), row.step)


def credentials_problem(spec: MlflowSpec) -> str | None:
    """Return why MLflow's credentials must not be sent to the server that a job names; None if they may.

    A job file or run folder from elsewhere may name any server, so the environment says which one they are for.
    """
    if spec.uri is None or not spec.uri.startswith("http"):
        return None
    found = [name for name in _CREDENTIALS if os.environ.get(name)]
    with contextlib.suppress(ArgumentError):  # without a home folder there is no such file
        file = home_folder() / ".mlflow" / "credentials"
        found += [str(file)] if file.exists() else []
    if not found or os.environ.get(_URI_VARIABLE, "").rstrip("/") == spec.uri.rstrip("/"):
        return None
    return (
        f"{found[0]} is not sent to {spec.uri}, because {_URI_VARIABLE} does not name this server; set it to the "
        "server that the credentials are for"
    )


def database_problem(spec: MlflowSpec | None, *, folder: Path) -> str | None:
    """Return why the database that the plan of a run names is not opened; None if it may be.

    A run folder from elsewhere may name any file of this machine. It is in the run's folder, or the environment
    names it too.
    """
    if spec is None or spec.uri is None or not spec.uri.startswith("sqlite:"):
        return None
    path = Path(spec.uri.removeprefix("sqlite:///"))
    is_inside = "?" not in spec.uri and path.resolve().is_relative_to(folder.resolve())
    if is_inside or os.environ.get(_URI_VARIABLE) == spec.uri:
        return None
    return (
        f"tracking.mlflow.uri names {spec.uri}, a database outside the run's folder; if you want it to be written, "
        f"set {_URI_VARIABLE} to the same URI"
    )


def _schema_problem(uri: str) -> str | None:
    """Return why a database is not written to: it has views or triggers, which would run with every write.

    MLflow's own triggers do nothing but refuse a change.
    """
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:") or not path.is_file():
        return None
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        found = connection.execute("SELECT name, sql FROM sqlite_master WHERE type IN ('view', 'trigger')")
        odd = [name for name, sql in found if not _REFUSAL.fullmatch(str(sql)[:_MAX_TRIGGER_CHARS])]
    return f"{path} has views or triggers that MLflow does not make, such as {odd[0]!r:.80}" if odd else None


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of nested mappings under keys such as `training.optimizer.lr`."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    elif value is not None:
        yield key, str(value)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_VALUE_CHARS else text[: _MAX_VALUE_CHARS - len(_CUT)] + _CUT
