"""Evaluate models from a client: find runs and task files, and have a process of its own score each model."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forge.cluster.local.ray_cluster import find_local
from forge.cluster.registry import find_cluster
from forge.config.load import LoadedTask, load_task
from forge.config.task import TaskSpec
from forge.environment import expand_home, looked_in
from forge.errors import ArgumentError, printable
from forge.evaluate.compare import Comparison, EvaluatedModel, compare
from forge.evaluate.lm_eval import (
    LmEvalOptions,
    LmEvalScore,
    require_lm_eval,
    score_with_lm_eval,
    with_lm_eval,
)
from forge.evaluate.results import read_outputs
from forge.evaluate.task import HELD_OUT_PROBLEM, build_task
from forge.foreign import from_record
from forge.plan.plan import written_job
from forge.runs.find_model import find_model, require_weights
from forge.runs.reader import read_plan
from forge.runs.scores import TaskScore
from forge.runtime.torch_subprocess import run_driver

LM_EVAL = "lm-eval:"
"""Begins the name of a task of lm-eval."""

TASKS = Path("jobs/eval")
"""Where a task that is given by its name is looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """How models are evaluated."""

    step: int | str | None = None
    """Of a run's checkpoint, or `best`; None: the newest."""
    ema: bool = False
    """Use the averaged weights."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """In which models compute."""
    limit: int | None = None
    """Most examples of each task."""
    num_workers: int | None = None
    """None: as many as the cluster has CPUs or GPUs."""
    contamination: bool | None = None
    """Whether the training data of runs are searched for the examples; None: unless they have many tokens."""
    cluster: str | None = None
    """Name or file of a cluster; None: the one that is up on this machine, or else this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """The scores of one model."""

    source: str
    """The folder of the run, or of the weights."""
    folder: Path
    """Which has `evaluation.jsonl` and the answers."""
    scores: tuple[TaskScore, ...]
    """In the order of the tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The scores of several models, and their table."""

    models: tuple[ModelScores, ...]
    comparison: Comparison


def evaluate_models(
    sources: Sequence[str | Path],
    tasks: Sequence[str | Path],
    *,
    options: EvaluateOptions,
    root: Path = Path("runs"),
    on_message: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate models, one after the other, and compare them.

    Args:
        sources: runs by their ids, prefixes or folders, or folders of weights.
        tasks: task files, or names of those in `jobs/eval`; `lm-eval:NAME` and `lm-eval:FILE` are tasks of lm-eval.
        root: the folder of runs.
        on_message: called with what was read, reused, or happened to workers.
        on_progress: called with the shards that are done and those in all, of one model.

    Raises: ArgumentError, JobFileError before anything is started; then what `forge.evaluate.run.evaluate` raises.
    """
    if not sources or not tasks:
        raise ArgumentError("give at least one run or folder, and at least one task")
    folders = [find_model(source, root=root) for source in sources]
    harness = [str(task).removeprefix(LM_EVAL) for task in tasks if str(task).startswith(LM_EVAL)]
    own = [task for task in tasks if not str(task).startswith(LM_EVAL)]
    is_elsewhere = options.cluster is not None and not find_cluster(options.cluster).shares_files
    _require_effect(options, has_run=any(map(_is_run, folders)), own=bool(own))
    for folder in filter(_is_run, folders):
        require_weights(folder, step=options.step, ema=options.ema, is_elsewhere=is_elsewhere)
    loaded = [(path, load_task(path)) for path in map(find_task, own)]
    _require_different(loaded)
    for _, task in loaded:
        build_task(task)
        for folder in folders:
            _require_data(task, folder=folder)
    if harness:
        _require_harness(harness, options=options)
    local = find_local() if loaded and not is_elsewhere else None
    found = []
    for folder in folders:
        if not loaded:
            found.append(ModelScores(source=str(folder), folder=folder, scores=()))
            continue
        if len(folders) > 1 and on_message is not None:
            on_message(f"evaluating {folder}{_without(options, folder=folder)}")
        request: dict[str, Any] = {
            "source": str(folder.absolute()),
            "tasks": [[str(path), path.read_text(encoding="utf-8")] for path, _ in loaded],
            "step": options.step if _is_run(folder) else None,
            "ema": options.ema and _is_run(folder),
            "dtype": options.dtype,
            "limit": options.limit,
            "num_workers": options.num_workers,
            "contamination": options.contamination,
            "address": None if local is None else local.address,
            "cluster": options.cluster if is_elsewhere else None,
        }
        answer = run_driver(
            "forge.evaluate.run",
            request=request,
            what=f"cannot evaluate {folder.name}",
            on_progress=on_progress,
            on_message=on_message,
        )
        scores = tuple(from_record(TaskScore, score) for score in answer["scores"])
        found.append(ModelScores(source=str(folder), folder=Path(answer["folder"]), scores=scores))
    comparison = _compared(found, tasks=[one.task for _, one in loaded])
    if harness:
        comparison = with_lm_eval(comparison, list(_of_harness(folders, harness, options, on_message)))
    return Evaluation(models=tuple(found), comparison=comparison)


def _require_effect(options: EvaluateOptions, *, has_run: bool, own: bool) -> None:
    """Raises: ArgumentError for an option that would change nothing.

    Args:
        has_run: whether one of the models is that of a run.
        own: whether there are tasks other than those of lm-eval.
    """
    for option, is_given in (("--step", options.step is not None), ("--ema", options.ema and own)):
        if is_given and not has_run:
            raise ArgumentError(
                f"{option} is for checkpoints of runs, and folders of weights have none; leave it out, or name "
                "a run"
            )
    if options.contamination and not (has_run and own):
        why = (
            "the training data of a folder of weights is not known"
            if own
            else "lm-eval's tasks are not searched for"
        )
        raise ArgumentError(f"--contamination would change nothing: {why}; leave it out")
    if options.num_workers is not None and not own:
        raise ArgumentError("lm-eval scores in one process; leave out --workers")


def _without(options: EvaluateOptions, *, folder: Path) -> str:
    """Which options do not apply to a folder of weights that is compared with runs, for a message."""
    given = {"--step": options.step is not None, "--ema": options.ema}
    unused = [option for option, is_given in given.items() if is_given and not _is_run(folder)]
    return f", a folder of weights, without {' and '.join(unused)}" if unused else ""


def _require_data(task: LoadedTask, *, folder: Path) -> None:
    """Raises: JobFileError if a task reads the held-out records of a run, and the model is a folder of weights."""
    spec = task.task
    if _is_run(folder):
        return
    for key, data in (("data", spec.data), ("few_shot.data", spec.few_shot.data)):
        if data is not None and data.held_out:
            raise task.source.error(f"{key}.held_out", f"{HELD_OUT_PROBLEM} ({folder} has no plan.json)")


def _require_harness(tasks: Sequence[str], *, options: EvaluateOptions) -> None:
    """Raises: ArgumentError if lm-eval is not installed, a task file does not exist, or an option is not for it."""
    require_lm_eval(tasks)
    if options.ema or options.cluster is not None:
        raise ArgumentError(
            "tasks of lm-eval run on this machine, on the weights as they are trained; leave out --ema "
            "and --cluster"
        )


def _of_harness(
    folders: Sequence[Path],
    tasks: Sequence[str],
    options: EvaluateOptions,
    on_message: Callable[[str], None] | None,
) -> Iterator[list[LmEvalScore]]:
    given = LmEvalOptions(limit=options.limit, dtype="bfloat16" if options.dtype == "bf16" else "float32")
    for folder in folders:
        if on_message is not None:
            on_message(f"lm-eval scores {folder} in {', '.join(tasks)}")
        yield score_with_lm_eval(str(folder), tasks=tasks, root=folder.parent, step=options.step, options=given)


def find_task(name: str | Path) -> Path:
    """Return a task file: a path, or the name of one in `jobs/eval`. Raises: ArgumentError if there is none."""
    path = Path(expand_home(str(name)))
    named = TASKS / f"{name}.yaml"
    with contextlib.suppress(OSError, ValueError):  # a name may be too long for a path, or have a zero byte
        if path.suffix in (".yaml", ".yml") or path.exists():
            return path
        if named.exists():
            return named
    known = sorted(file.stem for file in TASKS.glob("*.yaml"))
    nearest = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(known)}" if known else ""
    shown = printable(str(name), limit=200)
    raise ArgumentError(f"there is no task file {shown}, and no {TASKS}/{shown}.yaml{looked_in(TASKS)}{hint}")


def _compared(models: Sequence[ModelScores], *, tasks: Sequence[TaskSpec]) -> Comparison:
    names = [Path(model.source).resolve().name for model in models]
    is_clear = len(set(names)) == len(names)
    evaluated = [
        EvaluatedModel(
            name=name if is_clear else model.source,
            outputs={score.task: read_outputs(model.folder / score.examples) for score in model.scores},
            job=_job(Path(model.source)),
        )
        for name, model in zip(names, models, strict=True)
    ]
    return compare(evaluated, tasks=tasks)


def _job(folder: Path) -> dict[str, Any] | None:
    return written_job(read_plan(folder)) if _is_run(folder) else None


def _is_run(folder: Path) -> bool:
    return (folder / "plan.json").is_file()


def _require_different(tasks: Sequence[tuple[Path, LoadedTask]]) -> None:
    """Raises: JobFileError if two tasks have the same name; ArgumentError for the same file twice."""
    seen: dict[str, Path] = {}
    for path, loaded in tasks:
        other = seen.setdefault(loaded.task.name, path)
        if other is not path and other.resolve() == path.resolve():
            raise ArgumentError(f"--tasks has {path} twice; leave one out")
        if other is not path:
            raise loaded.source.error("name", f"is also the name of the task in {other}")
