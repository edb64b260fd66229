"""forge from Python: load a job, plan it, train it to the end.

The same way as `forge train`, without a screen. The run is carried by a process of its own, so torch is
not imported here; an exception or Ctrl-C in the caller stops the run with a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from forge.cluster.known import find_cluster
from forge.plan.plan import Plan
from forge.report.runs import RunSummary, failure_of, follow, read_run
from forge.run.remote import fit_to, hardware_there, submit, survey
from forge.run.submit import Carried, carry, create_run, resolve
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
    if cluster is None:
        folder = create_run(resolve(loaded, is_dry_run=False))
        carried: Carried = carry(folder)
    else:
        site = survey(find_cluster(cluster))
        plan = resolve(fit_to(site, loaded), is_dry_run=False, find_hardware=hardware_there(site))
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
        carried.end()
    run = read_run(folder)
    failure = failure_of(run)
    if failure is not None:
        raise failure
    return run


def _loaded(job: str | Path | LoadedJob) -> LoadedJob:
    return job if isinstance(job, LoadedJob) else load_job(job)
