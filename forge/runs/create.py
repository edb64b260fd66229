"""Create and reopen run folders before any process is started.

A run folder begins with `job.yaml`, `plan.json`, the tokenizer, the code archive of the job and the examples of its
tasks.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from pathlib import Path

from forge.checkpoint.storage import open_storage
from forge.code_archive import ARCHIVE, changed_files, code_folder, pack_code, read_run_code
from forge.config.dump import dump_job
from forge.config.job import JobSpec
from forge.errors import ArgumentError, DataError, PlanError
from forge.foreign import open_file, require_plain_tree
from forge.fs import write_atomic
from forge.plan.curve import config_digest, curve_differences, with_length_of
from forge.plan.lengths import PlanT, continue_plan, is_same_length
from forge.plan.plan import Plan, plan_to_json
from forge.plan.search import changed_keys
from forge.runs.reader import read_plan, read_run
from forge.runs.task_examples import TASK_EXAMPLES, examples_content
from forge.runs.trackers.mlflow_tracker import database_problem

_PROBE_PATIENCE_S = 5.0
_MAX_LISTED = 5

# Each run of W&B links to its log in W&B's cache, and nothing is written through the link of an earlier one.
_LINKS_OF_WANDB = ("wandb/*run-*/logs/debug-core.log", "trials/*/wandb/*run-*/logs/debug-core.log")


def create_run(plan: Plan, *, root: str | None = None) -> Path:
    """Create the folder of a new run.

    Args:
        plan: of a prepared corpus.
        root: parent folder; by default the job's `checkpoint.runs`.

    Raises: ArgumentError if the folder or the checkpoint storage is not writable.
    """
    run_id = f"{plan.job.name}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = Path(root or plan.job.checkpoint.runs) / run_id
    _require_writable(plan.job.checkpoint.url_of(str(folder)))
    fill_run_folder(folder, plan)
    _keep_task_examples(folder, plan)
    return folder


def fill_run_folder(folder: Path, plan: Plan) -> None:
    """Write the files of a new run, or overwrite those of a trial that continues with other values.

    Raises: ArgumentError if the folder cannot be written; it is removed then.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True, mode=0o700)
        shutil.copytree(Path(plan.corpus.folder) / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
        if plan.model.generation:
            text = json.dumps(dict(plan.model.generation), indent=2, sort_keys=True)
            write_atomic(folder / "tokenizer" / "generation_config.json", text + "\n")
        (folder / "job.yaml").write_text(dump_job(plan.job, templates=plan.templates))
        (folder / "plan.json").write_text(plan_to_json(plan, is_file=True))
        if plan.code is not None:
            write_atomic(folder / ARCHIVE, pack_code(code_folder(plan.code.digest)).to_tar(), mode=0o600)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ArgumentError(
            f"cannot write the run folder {folder}: {error.strerror or error}; "
            "set checkpoint.to to a folder you own"
        ) from error


def resumed_plan(folder: Path, plan: PlanT) -> PlanT:
    """Return the plan of a run that is resumed: with the lengths that it had before.

    Raises: ArgumentError if the run cannot have this length.
    """
    if plan.search is not None:
        return plan
    run = read_run(folder)
    try:
        return continue_plan(plan, before=run.plan, last_step=run.step, is_stopped_early=run.is_stopped_early)
    except PlanError as error:
        raise ArgumentError(f"cannot resume {folder.name}: {error}") from error


def reopen_run(folder: Path, plan: Plan) -> None:
    """Replace the plan of a run that ended early, before it is resumed from its newest checkpoint.

    Raises: ArgumentError if the new plan would change the loss curve, or how a search compares its trials.
    """
    require_plain_folder(folder)
    if problem := database_problem(plan.job.tracking.mlflow, folder=folder):
        raise ArgumentError(f"cannot resume {folder.name}: {problem}")
    before = read_plan(folder)
    _require_same_code(folder, before, plan)
    require_same_curve(folder, before.job, plan.job)
    job = with_length_of(plan.job, before.job) if plan.search is None else plan.job
    if config_digest(before.job, code=before.code) != config_digest(job, code=plan.code):
        raise ArgumentError(
            f"cannot resume {folder.name}: the code of a class that the job names changed, so the loss curve would "
            "not continue; start a new run"
        )
    if before.corpus.digest != plan.corpus.digest:
        raise ArgumentError(
            f"cannot resume {folder.name}: the content of the corpus changed ({before.corpus.num_documents:,} "
            f"documents then, {plan.corpus.num_documents:,} now), so the loss curve would not continue; restore "
            "its files, or start a new run"
        )
    for then, now in ((before.init, plan.init), (before.adapters_init, plan.adapters_init)):
        if then is not None and now is not None and then.digest != now.digest:
            raise ArgumentError(
                f"cannot resume {folder.name}: the checkpoint that it started from, {then.source}, has another "
                f"content now (digest {then.digest[:12]} then, {now.digest[:12]} now); start a new run"
            )
    _require_writable(plan.job.checkpoint.url_of(str(folder)))
    if plan.search is None and not is_same_length(before.job, plan.job):  # the next resume reads it
        job = with_length_of(before.job, plan.job)
        write_atomic(folder / "job.yaml", dump_job(job, templates=before.templates))
    _keep_task_examples(folder, plan)
    write_atomic(folder / "plan.json", plan_to_json(plan, is_file=True))


def _keep_task_examples(folder: Path, plan: Plan) -> None:
    """Copy the examples of the tasks from the cache. Raises: DataError if they cannot be read or written."""
    if plan.task_examples is None:
        return
    content = examples_content(plan.task_examples, run_folder=folder)
    try:
        write_atomic(folder / TASK_EXAMPLES, content, mode=0o600)
    except OSError as error:
        raise DataError(f"cannot write {folder / TASK_EXAMPLES}: {error.strerror}") from error


def require_plain_folder(folder: Path) -> None:
    """Check a run folder before anything is written to it.

    Raises: ArgumentError if a link in it leads out of it, since the run would write to another file, or if it has
        pipes or devices.
    """
    try:
        require_plain_tree(folder, allowed_links=_LINKS_OF_WANDB)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"the run folder {folder} cannot be used: {error}") from error


def require_regular(job_file: Path) -> None:
    """Raises: ArgumentError if the job file of a run folder is a link or a pipe."""
    try:
        os.close(open_file(job_file))
    except OSError as error:
        raise ArgumentError(f"{job_file} cannot be read: {error.strerror}") from None


def require_same_curve(folder: Path, before: JobSpec, now: JobSpec) -> None:
    """Check that a job may continue a run: only keys that do not change its loss curve, or its trials, differ.

    Raises: ArgumentError naming the keys with both values.
    """
    changed = curve_differences(before, now)
    if changed:
        listed = "; ".join(map(str, changed[:_MAX_LISTED]))
        more = f"; and {len(changed) - _MAX_LISTED} more" if len(changed) > _MAX_LISTED else ""
        raise ArgumentError(
            f"cannot resume {folder.name}: {listed}{more}. The loss curve would not be that of one job. Start a "
            f"new run; to begin it from these weights, set model.init_from: {folder.name}"
        )
    searched = changed_keys(before.search, now.search)
    if searched:
        raise ArgumentError(
            f"cannot resume {folder.name}: {searched[0]} changed, so old and new trials would not be comparable; "
            "start a new search (search.max_trials, max_hours, max_usd and trials_at_once may change)"
        )
    urls = [job.checkpoint.url_of(str(folder)) for job in (before, now)]
    if urls[0] != urls[1]:
        raise ArgumentError(
            f"cannot resume {folder.name}: its checkpoints are in {urls[0]}, and this checkpoint.to would have "
            f"them looked for in {urls[1]}"
        )


def _require_same_code(folder: Path, before: Plan, plan: Plan) -> None:
    """Raises: ArgumentError naming the files of the code folder that changed since the run was created."""
    if before.code is None or plan.code is None or before.code.digest == plan.code.digest:
        return
    former = read_run_code(before.code.digest, run_folder=folder)
    changed = changed_files(former, pack_code(code_folder(plan.code.digest)))
    more = f" and {len(changed) - _MAX_LISTED} more" if len(changed) > _MAX_LISTED else ""
    listed = ", ".join(changed[:_MAX_LISTED]) + more
    raise ArgumentError(
        f"cannot resume {folder.name}: its code changed ({listed}), so the loss curve would not continue; resume "
        "it with the code it began with by leaving the job file out, or start a new run"
    )


def _require_writable(url: str) -> None:
    """Write and delete a small object, so that missing permissions are found before machines cost money.

    Raises: ArgumentError, CheckpointError.
    """
    if "://" not in url:
        return
    storage = open_storage(url, patience_s=_PROBE_PATIENCE_S)
    try:
        storage.write(".probe/empty", lambda: [b""])
        storage.remove_files(".probe", ["empty"])
    except OSError as error:
        raise ArgumentError(f"checkpoint.to: cannot write to {url}: {error}") from error
