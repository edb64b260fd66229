"""Run tasks of lm-eval by its own harness, on an exported folder, in a process of its own.

Tasks are those installed with lm-eval, by name, or task files in its format. The harness runs offline: data sets
come from local files, or from what the library `datasets` has in its cache. A task file of lm-eval can name Python
functions beside it (`!function`), which the harness imports: run only files that you trust.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from forge.environment import expand_home
from forge.errors import ArgumentError, RunError, harmless
from forge.evaluate.compare import Comparison, ScoreCell, ScoreColumn
from forge.foreign import parse_object, read_file
from forge.objective.registry import Direction
from forge.runs.checkpoints import locate
from forge.runtime.torch_subprocess import export_weights

_MAX_RESULT_BYTES = 64 * 2**20
_LAST_LINES = 12
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LmEvalOptions:
    """How the harness runs."""

    num_fewshot: int | None = None
    """None: as the task says."""
    limit: int | None = None
    """The first so many examples of each task."""
    apply_chat_template: bool = False
    batch_size: int = 8
    dtype: str = "float32"
    device: str | None = None
    """None: a GPU if there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LmEvalScore:
    """One value that the harness has reported."""

    task: str
    metric: str
    """`acc`; with another filter than none, `exact_match,strict-match`."""
    value: float
    stderr: float
    """Standard error; NaN if the harness gives none."""
    direction: Direction | None
    """None if the task does not say whether larger is better."""
    num_examples: int
    signature: str
    """Version of lm-eval and of the task, and the number of few-shot examples."""


def score_with_lm_eval(
    model: str,
    *,
    tasks: Sequence[str],
    root: Path,
    step: int | str | None = None,
    options: LmEvalOptions = LmEvalOptions(),
) -> list[LmEvalScore]:
    """Score a run, whose checkpoint is exported in fp32 for it and deleted afterwards, or a folder of weights.

    Args:
        model: a run by its id, a prefix of it or its folder, or a folder in the layout of the hub.
        tasks: as of `run_lm_eval`.
        root: the folder of runs.
        step: of the checkpoint, or `best`; None: the newest.

    Raises: as `run_lm_eval`; ArgumentError, CheckpointError if the run or its checkpoint cannot be found.
    """
    require_lm_eval(tasks)
    folder = Path(expand_home(model))
    if (folder / "config.json").is_file():
        return run_lm_eval(folder, tasks=tasks, options=options)
    found = locate(model, root=root)
    tokenizer = None if found.tokenizer is None else str(found.tokenizer)
    with tempfile.TemporaryDirectory(prefix="forge-exported-") as draft:
        exported = Path(draft) / "model"
        export_weights(url=found.url, to=str(exported), step=step, dtype="fp32", tokenizer=tokenizer)
        return run_lm_eval(exported, tasks=tasks, options=options)


def require_lm_eval(tasks: Sequence[str]) -> list[str]:
    """Return the tasks as the harness names them.

    Raises: ArgumentError if it is not installed, or a task file does not exist.
    """
    if find_spec("lm_eval") is None:
        raise ArgumentError("tasks of lm-eval need their harness: pip install 'forge-train[lm-eval]'")
    return [_task_of(task) for task in tasks]


def run_lm_eval(
    folder: Path, *, tasks: Sequence[str], options: LmEvalOptions = LmEvalOptions(), log: Path | None = None
) -> list[LmEvalScore]:
    """Score an exported folder.

    Args:
        folder: in the layout of the hub.
        tasks: names of installed tasks, or paths of task files of lm-eval.
        log: where the harness writes what it prints; None: nowhere, but an error has its last lines.

    Raises: ArgumentError if lm-eval is not installed, or a task file does not exist; RunError if the harness fails.
    """
    names = require_lm_eval(tasks)
    with tempfile.TemporaryDirectory(prefix="forge-lm-eval-") as draft:
        scratch = Path(draft)
        config = scratch / "config.yaml"
        config.write_text(json.dumps(_config(folder, tasks=names, options=options, output=scratch / "results")))
        log = log or scratch / "log.txt"
        command = [sys.executable, "-P", "-m", "lm_eval", "run", "--config", str(config)]
        with log.open("ab") as output:
            code = subprocess.run(
                command, env={**os.environ, **_OFFLINE}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            ).returncode
        results = sorted((scratch / "results").rglob("results*.json"))
        if code != 0 or not results:
            lines = _last_lines(log)
            shown = "".join(f"\n  {line}" for line in lines)
            raise RunError(f"lm-eval ended with exit code {code}: {lines[-1].strip()}; its last lines:{shown}")
        return list(_scores(parse_object(read_file(results[-1], max_bytes=_MAX_RESULT_BYTES))))


def with_lm_eval(comparison: Comparison, scores: Sequence[Sequence[LmEvalScore]]) -> Comparison:
    """Add the harness's scores to a table, with intervals of 1.96 standard errors to both sides, and no p-values.

    Args:
        scores: of each model of the comparison.
    """
    columns = dict.fromkeys((one.task, one.metric) for of_model in scores for one in of_model)
    added: list[ScoreColumn] = []
    cells: list[list[ScoreCell | None]] = []
    for column in columns:
        found = [next((one for one in of_model if (one.task, one.metric) == column), None) for of_model in scores]
        first = next(one for one in found if one is not None)
        direction = first.direction or "max"
        added.append(
            ScoreColumn(
                task=first.task,
                value_name=first.metric,
                direction=direction,
                signature=first.signature,
                num_examples=first.num_examples,
            )
        )
        values = [one.value for one in found if one is not None and not math.isnan(one.value)]
        best = (max if direction == "max" else min)(values, default=math.nan)
        is_compared = len(scores) > 1 and first.direction is not None
        cells.append(
            [None if one is None else _cell(one, is_best=is_compared and one.value == best) for one in found]
        )
    rows = tuple((*row, *(column[at] for column in cells)) for at, row in enumerate(comparison.rows))
    note = "scores of lm-eval have intervals of 1.96 of its standard errors to both sides, and no p-values"
    return replace(comparison, columns=(*comparison.columns, *added), rows=rows, notes=(*comparison.notes, note))


def _cell(score: LmEvalScore, *, is_best: bool) -> ScoreCell:
    half = 1.96 * score.stderr
    low, high = score.value - half, score.value + half
    return ScoreCell(score=score.value, low=low, high=high, p_value=None, is_best=is_best)


def _task_of(task: str) -> str:
    """The name of an installed task, or the absolute path of a file."""
    if not task.endswith((".yaml", ".yml")):
        if not task or "," in task or "/" in task:
            raise ArgumentError(f"{task!r} is neither the name of an lm-eval task nor a YAML file")
        return task
    path = Path(task).absolute()
    if not path.is_file():
        raise ArgumentError(f"the task file {path} does not exist")
    if "," in str(path):
        raise ArgumentError(f"lm-eval cannot read {path}: it takes a comma as the end of a name")
    return str(path)


def _config(folder: Path, *, tasks: Sequence[str], options: LmEvalOptions, output: Path) -> dict[str, Any]:
    """The configuration file of the harness; a file, since its command line splits values at commas."""
    return {
        "model": "hf",
        "model_args": {
            "pretrained": str(folder.absolute()),
            "dtype": options.dtype,
            "trust_remote_code": False,
        },
        "tasks": list(tasks),
        "num_fewshot": options.num_fewshot,
        "limit": options.limit,
        "apply_chat_template": options.apply_chat_template,
        "batch_size": options.batch_size,
        "device": options.device,
        "output_path": str(output),
    }


def _scores(results: Mapping[str, Any]) -> Iterator[LmEvalScore]:
    """Read the results file of lm-eval 0.4: `results.TASK["METRIC,FILTER"]`."""
    version = results.get("lm_eval_version", "")
    for task, values in results["results"].items():
        counts = results.get("n-samples", {}).get(task, {})
        better = results.get("higher_is_better", {}).get(task, {})
        shots, of_task = results.get("n-shot", {}).get(task), results.get("versions", {}).get(task)
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{filtered}")
            is_larger = better.get(metric)
            yield LmEvalScore(
                task=task,
                metric=metric if filtered == "none" else key,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else math.nan,
                direction=None if is_larger is None else "max" if is_larger else "min",
                num_examples=int(counts.get("effective", 0)),
                signature=f"lm-eval {version}|task:{task} {of_task}|shots:{shots}",
            )


def _last_lines(log: Path) -> list[str]:
    text = log.read_bytes()[-20_000:].decode("utf-8", "replace")
    lines = [line.rstrip()[:300] for line in harmless(text).splitlines() if line.strip()]
    return lines[-_LAST_LINES:] or ["it printed nothing"]
