"""`evaluate.tasks` of a job: read the task files, and check that its model can do the tasks."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from forge.config.evaluate import METRIC_PREFIX, kind_of_model, task_problem
from forge.config.load import LoadedJob, LoadedTask, load_task_text
from forge.config.task import TaskSpec
from forge.config.task_metrics import LOWER_IS_BETTER
from forge.config.yaml_reader import read_text
from forge.environment import expand_home
from forge.errors import DataError, JobFileError
from forge.plan.plan import DraftPlan

_Plan = TypeVar("_Plan", bound=DraftPlan)


def with_tasks(plan: _Plan, loaded: LoadedJob) -> _Plan:
    """Return a plan with the texts of the job's task files.

    Raises: JobFileError for a file that is no task, or a task that the job's model cannot do.
    """
    if plan.job.evaluate is None:
        _check_stopping(loaded, [])
        return plan
    texts: dict[str, str] = {}
    names: dict[str, str] = {}
    tasks: list[TaskSpec] = []
    for path in plan.job.evaluate.tasks:
        try:
            text = read_text(Path(expand_home(path)))
        except JobFileError as error:
            raise loaded.source.error("evaluate.tasks", f"{path}: {error.problem}", show_value=False) from None
        task = _checked(load_task_text(text, path=path))
        problem = task_problem(task.kind, model=kind_of_model(plan.job.training))
        if task.data.held_out and not plan.job.data.held_out:
            problem = "its data are the held-out ones of the run, but data.held_out is 0"
        if task.name in names:
            problem = f"has the name of the task in {names[task.name]}, {task.name}"
        lora = plan.job.model.lora
        if plan.job.evaluate.is_in_training and lora is not None and lora.quantize != "none":
            problem = "model.lora.quantize is possible with evaluate.every: end alone"
        if problem is not None:
            raise loaded.source.error("evaluate.tasks", f"{path}: {problem}", show_value=False)
        texts[path], names[task.name] = text, path
        tasks.append(task)
    _check_stopping(loaded, tasks)
    return replace(plan, tasks=texts)


def _checked(loaded: LoadedTask) -> TaskSpec:
    """Compile the templates of a task, and read the first record of its own files.

    Raises: JobFileError with the line in the task file.
    """
    from forge.evaluate.task import build_task, first_example  # imports jinja2

    task = build_task(loaded)
    try:
        if loaded.task.data.files is not None:
            first_example(task)
    except DataError as error:
        raise loaded.source.error("data", str(error), show_value=False) from None
    return loaded.task


def with_task_direction(loaded: LoadedJob) -> LoadedJob:
    """Return a job with the direction of its search's metric, if that is one of a task.

    Raises: JobFileError if no evaluation reports it, or for a file that is no task.
    """
    search, spec = loaded.job.search, loaded.job.evaluate
    if search is None or not search.metric.startswith(METRIC_PREFIX):
        return loaded
    tasks = []
    for path in spec.tasks if spec is not None else ():
        try:
            tasks.append(load_task_text(read_text(Path(expand_home(path))), path=path).task)
        except JobFileError as error:
            raise loaded.source.error("evaluate.tasks", f"{path}: {error.problem}", show_value=False) from None
    metric = _reported(loaded, tasks, name=search.metric, key="search.metric")
    if spec is not None and spec.every != "evaluation":
        problem = "compares trials at every evaluation, so it needs evaluate.every: evaluation"
        raise loaded.source.error("search.metric", problem)
    if search.mode is not None:
        return loaded
    found = search.model_copy()
    found.__dict__["mode"] = "min" if metric in LOWER_IS_BETTER else "max"  # not a key that the user has set
    return replace(loaded, job=loaded.job.model_copy(update={"search": found}))


def _check_stopping(loaded: LoadedJob, tasks: list[TaskSpec]) -> None:
    """Raises: JobFileError if early stopping names a metric of a task that no evaluation reports."""
    stopping = loaded.job.training.early_stopping
    if stopping is not None and stopping.metric.startswith(METRIC_PREFIX):
        _reported(loaded, tasks, name=stopping.metric, key="training.early_stopping.metric")


def _reported(loaded: LoadedJob, tasks: list[TaskSpec], *, name: str, key: str) -> str:
    """Return the metric of a task that a name is a value of. Raises: JobFileError if no evaluation reports it."""
    spec = loaded.job.evaluate
    own, _, value = name.removeprefix(METRIC_PREFIX).partition("/")
    task = next((task for task in tasks if task.name == own), None)
    chosen = list(task.metrics.chosen) if task is not None else []
    known = [f"{METRIC_PREFIX}{task.name}/{metric}" for task in tasks for metric in task.metrics.chosen]
    fitting = [each for each in chosen if value.startswith(each.removesuffix("_at_k")) or value.endswith(each)]
    if spec is None or not spec.is_in_training:
        problem = "is a metric of a task, which is scored during training only with evaluate.every: evaluation"
    elif not fitting:
        problem = f"is not a metric of the tasks: {', '.join(known)}"
    else:
        return max(fitting, key=len)
    nearest = next(iter(difflib.get_close_matches(name, known, n=1)), None)
    if nearest is not None and nearest != name:
        problem += f"; did you mean {nearest}?"
    raise loaded.source.error(key, problem)
