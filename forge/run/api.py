"""forge from Python: load a job, plan it, train it to the end.

The same way as `forge train`, without a screen. The run is carried by a process of its own, so torch is
not imported here; an exception or Ctrl-C in the caller stops the run with a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from forge.plan.plan import Plan
from forge.report.runs import RunSummary, failure_of, follow, read_run
from forge.run.submit import carry, create_run, resolve
from forge.spec import load
from forge.spec.load import LoadedJob


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> LoadedJob:
    """Read a job file.

    Args:
        path: a YAML file.
        overrides: as `--set` takes them: `["training.total_steps=50"]`.

    Raises: JobFileError with all that is wrong.
    """
    return load.load_job(path, overrides=overrides)


def plan_job(job: str | Path | LoadedJob) -> Plan:
    """What a job will do, as `forge plan` shows it; trains nothing.

    Raises: JobFileError, PlanError, DataError.
    """
    return resolve(_loaded(job), is_dry_run=True)


def train_job(
    job: str | Path | LoadedJob, *, on_record: Callable[[dict[str, Any]], None] | None = None
) -> RunSummary:
    """Train a job to its last step.

    Args:
        on_record: called with every step (`{"step": 1, "train/loss": ...}`) and event (`{"event": ...}`).

    Returns: the run; its status is `finished`, or `stopped` if somebody else asked it to stop.
    Raises: JobFileError, PlanError, DataError, ArgumentError before it starts; afterwards what ended it:
        RunError, ClusterError, CheckpointError.
    """
    folder = create_run(resolve(_loaded(job), is_dry_run=False))
    carried = carry(folder)
    try:
        for record in follow(folder, goes_on=carried.is_alive):
            if record is not None and on_record is not None:
                on_record(record)
    except BaseException:
        carried.request_stop()
        raise
    finally:
        carried.end()
    run = read_run(folder)
    failure = failure_of(run)
    if failure is not None:
        raise failure
    return run


def _loaded(job: str | Path | LoadedJob) -> LoadedJob:
    return job if isinstance(job, LoadedJob) else load_job(job)
