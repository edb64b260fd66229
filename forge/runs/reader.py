"""Read run folders: find them, summarise them, follow them while the run is running.

Only `plan.json`, `events.jsonl`, `metrics.jsonl` and the end of a log are read, so this works on a running run, on
one that died, and on a folder copied from another machine, whatever it contains (`forge.foreign`). Lines that are
not valid records (partial after a crash, or damaged) are skipped and counted.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forge import errors
from forge.environment import looked_in
from forge.errors import ArgumentError, ForgeError, PlanError, RunError, printable
from forge.foreign import read_file
from forge.plan.plan import Plan, plan_from_json
from forge.runs.annotations import read_annotations
from forge.runs.goodput import goodput_of, moment
from forge.runs.goodput_report import GoodputReport
from forge.runs.index import find_known, read_index, remember_run
from forge.runs.lock import driver_pid
from forge.runs.log_end import last_line
from forge.runs.record_order import StartBeforeSteps
from forge.runs.records import RecordReader, last_step_of
from forge.runs.remote_ref import read_remote_ref
from forge.runs.trials import TRIALS, TrialTable

Status = Literal["running", "finished", "stopped", "failed", "died"]
ENDINGS: dict[str, Status] = {"RunFinished": "finished", "RunStopped": "stopped", "RunFailed": "failed"}
_POLL_S = 0.2
MAX_PLAN_BYTES = 64 * 2**20
"""Of `plan.json`, which has about 2 kB for each world size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One run: its plan, status, newest step and events."""

    run_id: str
    folder: Path
    status: Status
    plan: Plan
    started: float
    """Seconds since the epoch."""
    updated: float
    last: dict[str, Any]
    """The newest line of `metrics.jsonl`; empty before the first step."""
    events: tuple[dict[str, Any], ...]
    num_invalid: int = 0
    """Lines of `events.jsonl` that are not valid records and were skipped."""

    @property
    def step(self) -> int:
        """The last recorded step."""
        return int(self.last.get("step", 0))

    @property
    def is_stopped_early(self) -> bool:
        """Whether `training.early_stopping` has ended the run at its last recorded step."""
        return self.newest("EarlyStopped", step=self.step) is not None

    def newest(self, kind: str, **fields: Any) -> dict[str, Any] | None:
        """Return the newest event of a kind whose fields have these values; None if there is none."""
        for event in reversed(self.events):
            if event["event"] == kind and all(event.get(key) == value for key, value in fields.items()):
                found: dict[str, Any] = event
                return found
        return None

    def goodput(self) -> GoodputReport:
        """Return where its time went, until now if it is running; reads `metrics.jsonl` again."""
        now = time.time() if self.status == "running" else None
        return goodput_of(self.events, iter_metrics(self.folder), now=now)


def find_run(name: str, *, root: Path, is_search: bool | None = None) -> Path:
    """Find a run's folder by its path, its id, a unique prefix of it, or `latest`; a trial's by its id.

    A run that is not under `root` is found by its id if it was created or opened on this machine before.

    Args:
        is_search: whether `latest` means the newest search, or the newest other run; None for either.

    Raises: ArgumentError that lists the runs that exist.
    """
    folder = _find_run(name, root=root, is_search=is_search)
    remember_run(search_folder(folder) or folder)
    return folder


def _find_run(name: str, *, root: Path, is_search: bool | None) -> Path:
    with contextlib.suppress(OSError, ValueError):  # a name may be too long for a path, or have a zero byte
        if name and (Path(name) / "plan.json").is_file():
            return Path(name)
    folders = run_folders(root)
    if name == "latest" and folders:
        return _newest(folders, is_search=is_search, root=root)
    search = name.rpartition("-")[0]
    trial = root / search / TRIALS / name
    if search and len(Path(name).parts) == 1 and (trial / "plan.json").is_file():
        return trial
    exact = [folder for folder in folders if folder.name == name]
    found = exact or [folder for folder in folders if name and folder.name.startswith(name)] or find_known(name)
    if len(found) == 1:
        return found[0]
    if found:
        is_one_folder = len({folder.parent for folder in found}) == 1
        names = ", ".join(folder.name if is_one_folder else str(folder) for folder in found[:5])
        raise ArgumentError(f"{name} could be any of {len(found)} runs: {names}")
    known = ", ".join(folder.name for folder in folders[:5])
    elsewhere = "" if known or not read_index().runs else "; list the runs in other folders: forge runs list --all"
    raise ArgumentError(
        f"no run '{printable(name, limit=80)}' under {root}{looked_in(root)}"
        + (f"; its runs are {known}" if known else f", which holds no runs{elsewhere}")
    )


def search_folder(folder: Path) -> Path | None:
    """Return the folder of the search that a trial belongs to; None for other runs."""
    is_trial = folder.parent.name == TRIALS and (folder.parent.parent / "plan.json").is_file()
    return folder.parent.parent if is_trial else None


def list_runs(
    root: Path, *, on_skip: Callable[[Path, ForgeError], None] = lambda path, error: None
) -> list[RunSummary]:
    """Return every run under a folder, newest first; folders without a readable run are skipped.

    Args:
        on_skip: called with each folder that has a plan but cannot be read, and why.
    """
    return read_runs(run_folders(root), on_skip=on_skip)


def read_runs(
    folders: Iterable[Path], *, on_skip: Callable[[Path, ForgeError], None] = lambda path, error: None
) -> list[RunSummary]:
    """Return the runs of these folders in their order; `on_skip` as for `list_runs`."""
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except (ArgumentError, PlanError) as error:
            on_skip(folder, error)
    return runs


def read_run(folder: Path) -> RunSummary:
    """Summarise a run. Raises: ArgumentError if the folder holds no run, PlanError if its plan cannot be read."""
    plan = read_plan(folder)
    reader = RecordReader(folder, kind="event")
    try:
        started = (folder / "plan.json").stat().st_mtime
        events, last = tuple(reader.read()), last_step_of(folder)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{folder} cannot be read: {error}") from error
    return RunSummary(
        run_id=folder.name,
        folder=folder,
        status=status_of(folder, ending=ending_of(events)),
        plan=plan,
        started=events[0]["time"] if events else started,
        updated=max([started, *(record["time"] for record in (*events[-1:], last) if record)]),
        last=last,
        events=events,
        num_invalid=reader.num_invalid,
    )


def read_plan(folder: Path) -> Plan:
    """Read a run's plan. Raises: ArgumentError if the folder holds no run, PlanError if it cannot be read."""
    try:
        return plan_from_json(read_file(folder / "plan.json", max_bytes=MAX_PLAN_BYTES))
    except OSError as error:
        raise ArgumentError(f"{folder} holds no run: {error.strerror}") from error
    except (ValueError, PlanError) as error:
        raise PlanError(f"the plan of {folder} cannot be read: {error}") from error


def failure_of(run: RunSummary) -> ForgeError | None:
    """Return the error that ended a run; None if it did not fail or die."""
    if run.status == "died":
        log = run.folder / "logs" / "driver.log"
        end = f" and ends with: {line}" if (line := last_line(log)) else ""
        return RunError(f"the driver of the run died without recording why; its log is {log}{end}")
    if run.status != "failed":
        return None
    failed = run.newest("RunFailed") or {}
    return error_named(str(failed.get("error")), message=str(failed.get("message")))


def error_named(name: str, *, message: str) -> ForgeError:
    """Rebuild an error from the name of its class, as stored in a file; RunError if the name is unknown."""
    kind = getattr(errors, name, None)
    return kind(message) if isinstance(kind, type) and issubclass(kind, ForgeError) else RunError(message)


def summary_record(run: RunSummary) -> dict[str, Any]:
    """Return a run as JSON values, without its plan."""
    unigram, failure = run.plan.corpus.unigram_perplexity, failure_of(run)
    evaluated = run.newest("Evaluated", weights="current") or {}
    averaged = run.newest("Evaluated", weights="ema") or {}
    saved = run.newest("CheckpointSaved") or {}
    annotations = read_annotations(run.folder)
    return {
        "run_id": run.run_id,
        "folder": str(run.folder),
        "status": run.status,
        "tags": list(annotations.tags),
        "note": annotations.note,
        "step": run.step,
        "total_steps": run.plan.total_steps,
        "started": run.started,
        "updated": run.updated,
        "last_step": run.last,
        "held_out_perplexity": evaluated.get("metrics", {}).get("perplexity"),
        "held_out_perplexity_ema": averaged.get("metrics", {}).get("perplexity"),
        "unigram_perplexity": unigram if math.isfinite(unigram) else None,
        "checkpoint": saved.get("folder"),
        "trials": _trials_record(run),
        "usd": (run.newest("CostUpdated") or {}).get("usd"),
        "failure": str(failure) if failure else None,
        "goodput": run.goodput().as_record(),
    }


def _trials_record(run: RunSummary) -> dict[str, int] | None:
    """Return the number of planned and of ended trials of a search; None for other runs."""
    if run.plan.search is None:
        return None
    trials = TrialTable(run.events).trials.values()
    return {"total": run.plan.search.num_trials, "over": sum(trial.is_over for trial in trials)}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return every recorded step. Raises: ArgumentError if the file cannot be one of forge's."""
    return list(iter_metrics(folder))


def iter_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield every recorded step. Raises: ArgumentError if the file cannot be one of forge's."""
    try:
        yield from RecordReader(folder, kind="step").read()
    except ValueError as error:
        raise ArgumentError(f"{folder} cannot be read: {error}") from error


def count_records(folder: Path) -> tuple[int, int]:
    """Return the number of recorded events and of recorded steps. Raises: ArgumentError as `iter_metrics`."""
    try:
        return sum(1 for _ in RecordReader(folder, kind="event").read()), sum(1 for _ in iter_metrics(folder))
    except ValueError as error:
        raise ArgumentError(f"{folder} cannot be read: {error}") from error


def follow(
    folder: Path, *, goes_on: Callable[[], bool], past_events: int = 0, past_steps: int = 0
) -> Iterator[dict[str, Any] | None]:
    """Yield the events and steps of a run as they are written, until it ended or its driver died.

    Yields None if there is nothing new, so that a screen can update its clock. Steps are the records without an
    `event` key. A generation's steps come after its GenerationStarted, and the record that ends the run comes last.

    Args:
        goes_on: returns whether more records may be written.
        past_events, past_steps: number of records to skip.

    Raises: ArgumentError if the records cannot be read; RunError if the run ended because its folder is gone.
    """
    events = RecordReader(folder, kind="event", skip=past_events)
    steps = RecordReader(folder, kind="step", skip=past_steps)
    order = StartBeforeSteps()
    gone_since: float | None = None
    while True:
        records = _read_new(events, steps, folder=folder)
        ordered = order.add(records, now_s=time.monotonic())
        yield from ordered
        if any(record.get("event") in ENDINGS for record in records):
            return
        if not ordered:
            yield None
            if not goes_on():
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since > 2 * _POLL_S:
                    yield from order.release()
                    _require_run_folder(folder)
                    return
            time.sleep(_POLL_S)


def _require_run_folder(folder: Path) -> None:
    if not any((folder / name).exists() for name in ("plan.json", "map.json")):
        raise RunError(
            f"the run folder {folder} was removed or moved while the run was in progress, and its records with it. "
            "A run on this machine is ended then; one on a cluster goes on there: forge cluster status"
        )


def _read_new(events: RecordReader, steps: RecordReader, *, folder: Path) -> list[dict[str, Any]]:
    """Return what both files have got since the last call: each file in its order, the record of an end last."""
    try:
        # Events first: a step recorded before the last event is then read too.
        new_events = list(events.read())
        records = list(heapq.merge(new_events, steps.read(), key=moment))
    except ValueError as error:
        raise ArgumentError(f"{folder} cannot be read: {error}") from error
    return sorted(records, key=lambda record: record.get("event") in ENDINGS)


def ending_of(events: Sequence[Mapping[str, Any]]) -> Status | None:
    """Return how the last session of a run ended, as it recorded; None if it did not."""
    for event in reversed(events):
        if event["event"] in ENDINGS:
            return ENDINGS[event["event"]]
        if event["event"] == "RunStarted":
            break
    return None


def status_of(folder: Path, *, ending: Status | None) -> Status:
    """Return the status of a run whose last session has recorded this ending."""
    if driver_pid(folder) is not None:
        return "running"
    if ending is not None:
        return ending
    search = search_folder(folder)
    is_in_search = search is not None and driver_pid(search) is not None
    return "running" if is_in_search or _is_elsewhere(folder) else "died"


def _is_elsewhere(folder: Path) -> bool:
    """Whether this machine has a record of a remote job of the run."""
    ref = read_remote_ref(folder)
    return ref is not None and bool(ref.job)


def _newest(folders: list[Path], *, is_search: bool | None, root: Path) -> Path:
    """Return the newest folder of a kind. Raises: ArgumentError if there is none."""
    for folder in folders:
        if is_search is None:
            return folder
        with contextlib.suppress(ArgumentError, PlanError):
            if (read_plan(folder).search is not None) == is_search:
                return folder
    raise ArgumentError(f"no {'search' if is_search else 'run that is not a search'} under {root}")


def run_folders(root: Path) -> list[Path]:
    """Return the folders under `root` that hold a plan, newest first."""
    changed: dict[Path, float] = {}
    try:
        candidates = list(root.iterdir())
    except OSError:
        return []
    for path in candidates:
        with contextlib.suppress(OSError):  # no plan, or deleted since it was listed
            changed[path] = (path / "plan.json").stat().st_mtime
    return sorted(changed, key=changed.__getitem__, reverse=True)
