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
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from forge.errors import ArgumentError, RunError, harmless
from forge.foreign import parse_object, read_file
from forge.objective.registry import Direction

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
    if find_spec("lm_eval") is None:
        raise ArgumentError("tasks of lm-eval need their harness: pip install 'forge-train[lm-eval]'")
    names = [_task_of(task) for task in tasks]
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
            raise RunError(f"lm-eval ended with exit code {code}; its last lines:\n{_last_lines(log)}")
        return list(_scores(parse_object(read_file(results[-1], max_bytes=_MAX_RESULT_BYTES))))


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


def _last_lines(log: Path) -> str:
    text = log.read_bytes()[-20_000:].decode("utf-8", "replace")
    lines = [line for line in harmless(text).splitlines() if line.strip()]
    return "\n".join(f"  {line[:300]}" for line in lines[-_LAST_LINES:])
