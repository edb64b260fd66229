"""Read the examples of a job's tasks once, when its run is started, and keep them with the run.

Workers and the scoring at the end take them from there, so a task may read files that only the client has, every
evaluation of a run asks the same, and the machines do not wait while a corpus is searched for its held-out records.
The file has one line of JSON for each task: the path of its file, and its examples.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from forge.config.load import load_task_text
from forge.data.held_out import held_out_of_run
from forge.errors import ArgumentError, DataError
from forge.evaluate.task import TaskExamples, build_task
from forge.foreign import from_record, typed
from forge.plan.plan import Plan
from forge.runs.task_examples import cache_examples, examples_content
from forge.units import counted, format_bytes

MAX_BYTES = 128 * 2**20
"""Of all examples of a job: they are sent to the head of a cluster in one piece, and to its nodes."""


def with_task_examples(plan: Plan, *, before: Plan | None = None, run_folder: Path | None = None) -> Plan:
    """Read the examples of the plan's tasks into the cache, and add their digest to the plan.

    Args:
        before: the plan of a run that is resumed: with the same tasks, its examples are kept.
        run_folder: of that run.

    Raises: DataError for data that cannot be read or exceed `MAX_BYTES`.
    """
    spec = plan.job.evaluate
    if spec is None or not plan.tasks:
        return replace(plan, task_examples=None)
    kept = _kept(plan, before, run_folder=run_folder)
    if kept is not None:
        return replace(plan, task_examples=cache_examples(kept))
    lines, size, skipped = [], 0, []
    for path, text in plan.tasks.items():
        found = task_examples(plan, path=path, text=text)
        lines.append(json.dumps([path, asdict(found)], separators=(",", ":")).encode() + b"\n")
        size += len(lines[-1])
        if found.num_skipped:
            first = f": {found.skipped[0]}" if found.skipped else ""
            skipped.append(f"{path}: {counted(found.num_skipped, 'record')} left out of the task{first}")
        if size > MAX_BYTES:
            raise DataError(
                f"{path}: the examples of evaluate.tasks take more than {format_bytes(MAX_BYTES)}, and every "
                "machine gets them: set evaluate.limit"
            )
    return replace(plan, task_examples=cache_examples(b"".join(lines)), warnings=(*plan.warnings, *skipped))


def task_examples(plan: Plan, *, path: str, text: str) -> TaskExamples:
    """Read the examples of one task: the held-out records of the plan's corpus, or the task's own data.

    Raises: DataError with the name of the task.
    """
    assert plan.job.evaluate is not None, "called for jobs with tasks"
    task, limit = build_task(load_task_text(text, path=path)), plan.job.evaluate.limit
    if limit is not None:
        task = replace(task, spec=task.spec.model_copy(update={"limit": min(limit, task.spec.limit or limit)}))
    folder = Path(plan.corpus.folder)
    try:
        return task.examples(held_out=lambda: held_out_of_run(plan.job.data, folder=folder))
    except (ArgumentError, DataError) as error:
        raise DataError(f"{path}: {error}") from error


def stored_examples(digest: str, *, run_folder: Path | None = None) -> dict[str, TaskExamples]:
    """Return the examples of each task, by the path of its file.

    Raises: DataError if the file is missing, changed, or none of forge's.
    """
    found = {}
    for line in examples_content(digest, run_folder=run_folder).splitlines():
        try:
            path, record = typed(tuple[str, Any], json.loads(line), where="task")
            found[path] = from_record(TaskExamples, record)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the stored examples of evaluate.tasks are not forge's: {error}") from error
    return found


def _kept(plan: Plan, before: Plan | None, *, run_folder: Path | None) -> bytes | None:
    """The examples of a run that is resumed, if its tasks are the same and its file is complete."""
    if before is None or before.task_examples is None or before.tasks != plan.tasks:
        return None
    old, new = before.job.evaluate, plan.job.evaluate
    if old is None or new is None or old.limit != new.limit:
        return None
    try:
        return examples_content(before.task_examples, run_folder=run_folder)
    except DataError:
        return None
