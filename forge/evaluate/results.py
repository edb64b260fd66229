"""The scores of a task from the outputs of a model, and the files that hold both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forge.errors import RunError
from forge.evaluate.bootstrap import MetricScore, score_examples, score_metric
from forge.evaluate.compare import TaskOutputs
from forge.evaluate.metrics.base import ScoredExample
from forge.evaluate.metrics.build import build_metrics
from forge.evaluate.shards import TaskShards
from forge.evaluate.task import TaskExamples
from forge.foreign import parse_object, read_file
from forge.fs import write_atomic
from forge.runs.scores import TaskValue, finite
from forge.units import counted

ANSWERS = "evaluations"
"""The folder of the files with the answers, in that of the run."""
_MAX_BYTES = 2**32


def score_task(shards: TaskShards, outputs: Sequence[ScoredExample]) -> dict[str, TaskValue]:
    """Compute the metrics of a task. Raises: DataError for an output that a metric cannot read; ArgumentError."""
    spec = shards.task.spec
    values: dict[str, TaskValue] = {}
    for metric in build_metrics(spec.metrics, examples=outputs, label_kind=spec.label_kind).values():
        found = score_metric(metric, outputs, seed=spec.seed)
        values |= {name: _value(score) for name, score in found.items()}
    return values


def task_digest(shards: TaskShards) -> str:
    """Digest of a task file and its examples: scores are comparable only if it is equal."""
    digest = hashlib.blake2b(shards.task.spec.model_dump_json().encode(), digest_size=16)
    for example in shards.data.examples:
        digest.update(json.dumps([example.digest, example.target, example.gains]).encode())
    return digest.hexdigest()


def write_answers(path: Path, shards: TaskShards, outputs: Sequence[ScoredExample]) -> None:
    """Write what the model answered: one line for each example. Raises: RunError."""
    lines = [json.dumps(line, ensure_ascii=False, sort_keys=True) for line in _lines(shards, outputs)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error


def read_outputs(path: Path) -> TaskOutputs:
    """Read a file of `write_answers`. Raises: RunError if that cannot be done."""
    try:
        records = [parse_object(line) for line in read_file(path, max_bytes=_MAX_BYTES).splitlines()]
        return TaskOutputs(
            ids=tuple(f"{record['id']} {record['prompt']}" for record in records),
            examples=tuple(_output(record["output"]) for record in records),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"cannot read the answers in {path}: {error}") from error


def answers_path(score_name: str, *, step: int | None, ema: bool) -> str:
    """Where the answers of a task are, in the folder of a run."""
    which = "" if step is None else f".step-{step:08d}" + (".ema" if ema else "")
    return f"{ANSWERS}/{score_name}{which}.jsonl"


def count_read(data: TaskExamples) -> str:
    """What was read of a task, in a sentence."""
    skipped = f", {counted(data.num_skipped, 'record')} skipped: {data.skipped[0]}" if data.num_skipped else ""
    return f"{len(data.examples):,} of {counted(data.num_records, 'example')}{skipped}"


def _value(score: MetricScore) -> TaskValue:
    return TaskValue(
        value=finite(score.value),
        low=finite(score.low),
        high=finite(score.high),
        direction=score.direction,
        num_examples=score.num_examples,
        signature=score.signature,
    )


def _lines(shards: TaskShards, outputs: Sequence[ScoredExample]) -> Iterator[dict[str, Any]]:
    spec = shards.task.spec
    metrics = build_metrics(spec.metrics, examples=outputs, label_kind=spec.label_kind).values()
    single: dict[str, Any] = {}
    for metric in metrics:
        single |= score_examples(metric, outputs)
    for number, (example, output) in enumerate(zip(shards.data.examples, outputs, strict=True)):
        scores = {name: finite(float(values[number])) for name, values in single.items()}
        yield {
            "id": example.id,
            "prompt": example.digest,
            "output": _without_defaults(asdict(output)),
            "scores": scores,
        }


def _output(record: Any) -> ScoredExample:
    if not isinstance(record, dict):
        raise ValueError("an output is not a JSON object")
    fields: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    return ScoredExample(**fields)


def _without_defaults(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if value not in (None, ())}
