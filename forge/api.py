"""forge from Python: load a job, plan it, train it to the end, or search for its best values.

The same way as `forge train` and `forge tune`, without a screen. The run is carried by a process of its own, so
torch is not imported here; an exception or Ctrl-C in the caller stops the run with a checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from forge.cluster.registry import find_cluster
from forge.config import load
from forge.config.load import LoadedJob
from forge.config.overrides import check_kind
from forge.errors import JobFileError
from forge.plan.plan import DraftPlan
from forge.remote.submit import preflight, resolve_there, submit
from forge.report.search_summary import SearchSummary, no_result_error, search_summary
from forge.runs.create import create_run
from forge.runs.reader import RunSummary, failure_of, follow, read_run
from forge.runtime.driver_process import RunHandle, start_driver
from forge.runtime.resolve import resolve, resolve_draft


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> LoadedJob:
    """Read a job file.

    Args:
        path: a YAML file.
        overrides: as `--set` takes them: `["training.total_steps=50"]`.

    Raises: JobFileError with all that is wrong.
    """
    return load.load_job(path, overrides=overrides)


def plan_job(job: str | Path | LoadedJob) -> DraftPlan:
    """What a job will do, as `forge plan` shows it; trains nothing.

    Raises: JobFileError, PlanError, DataError.
    """
    return resolve_draft(_loaded(job))


def train_job(
    job: str | Path | LoadedJob,
    *,
    cluster: str | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
) -> RunSummary:
    """Train a job to its last step.

    Args:
        cluster: name or file of one that is up; by default this machine.
        on_record: called with every step (`{"step": 1, "train/loss": ...}`) and event (`{"event": ...}`).

    Returns: the run; its status is `finished`, or `stopped` if somebody else asked it to stop.
    Raises: JobFileError, PlanError, DataError, ArgumentError before it starts; afterwards what ended it:
        RunError, ClusterError, CheckpointError.
    """
    loaded = _loaded(job)
    check_kind(loaded, is_search=False)
    return _carry_out(loaded, cluster=cluster, on_record=on_record)


def tune_job(
    job: str | Path | LoadedJob,
    *,
    cluster: str | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
) -> SearchSummary:
    """Make the trials of a job's search; its folder then holds `report.html` and `best.yaml`.

    Args:
        cluster: name or file of one that is up; by default this machine.
        on_record: called with every event (`{"event": "TrialReported", "trial": 1, "step": 20, "value": ...}`).

    Returns: the search and its best trial; stopped before its end, the best until then.
    Raises: as `train_job`; RunError also if no trial came to a value.
    """
    from forge.report.search_record import write_results

    loaded = _loaded(job)
    check_kind(loaded, is_search=True)
    summary = search_summary(_carry_out(loaded, cluster=cluster, on_record=on_record))
    if summary.book.trials:
        with contextlib.suppress(JobFileError):  # the job itself cannot have what its proxy could: no best.yaml
            write_results(summary.run.folder)
    futility = no_result_error(summary) if summary.run.status == "finished" else None
    if futility is not None:
        raise futility
    return summary


def _carry_out(
    loaded: LoadedJob, *, cluster: str | None, on_record: Callable[[dict[str, Any]], None] | None
) -> RunSummary:
    """Make a new run and follow it to its end. Raises: what ended it."""
    if cluster is None:
        folder = create_run(resolve(loaded))
        carried: RunHandle = start_driver(folder)
    else:
        site = preflight(find_cluster(cluster))
        plan = resolve_there(site, loaded)
        folder = create_run(plan, root=loaded.job.checkpoint.runs)
        carried = submit(site, plan, folder=folder)
    try:
        for record in follow(folder, goes_on=carried.is_alive):
            if record is not None and on_record is not None:
                on_record(record)
    except BaseException:
        carried.request_stop()
        raise
    finally:
        carried.wait()
    run = read_run(folder)
    failure = failure_of(run)
    if failure is not None:
        raise failure
    return run


def _loaded(job: str | Path | LoadedJob) -> LoadedJob:
    return job if isinstance(job, LoadedJob) else load_job(job)
