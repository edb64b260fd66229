"""`evaluate.tasks` of a job: read the task files, and check that its model can do the tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from forge.config.evaluate import kind_of_model, task_problem
from forge.config.load import LoadedJob, load_task_text
from forge.config.yaml_reader import read_text
from forge.environment import expand_home
from forge.plan.plan import DraftPlan

_Plan = TypeVar("_Plan", bound=DraftPlan)


def with_tasks(plan: _Plan, loaded: LoadedJob) -> _Plan:
    """Return a plan with the texts of the job's task files.

    Raises: JobFileError for a file that is no task, or a task that the job's model cannot do.
    """
    if plan.job.evaluate is None:
        return plan
    texts: dict[str, str] = {}
    names: dict[str, str] = {}
    for path in plan.job.evaluate.tasks:
        text = read_text(Path(expand_home(path)))
        task = load_task_text(text, path=path).task
        problem = task_problem(task.kind, model=kind_of_model(plan.job.training))
        if task.data.held_out and not plan.job.data.held_out:
            problem = "its data are the held-out ones of the run, but data.held_out is 0"
        if task.name in names:
            problem = f"has the name of the task in {names[task.name]}, {task.name}"
        if problem is not None:
            raise loaded.source.error("evaluate.tasks", f"{path}: {problem}", show_value=False)
        texts[path], names[task.name] = text, path
    return replace(plan, tasks=texts)
