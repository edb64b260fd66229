"""List and verify the checkpoints of a run, in a folder or an object store, and find the best one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.checkpoint.best import BEST, best_name, best_scores
from forge.checkpoint.manifest import step_name
from forge.checkpoint.reader import list_checkpoints, open_checkpoint
from forge.checkpoint.storage import Storage, open_storage
from forge.checkpoint.verify import verify_checkpoint
from forge.config.job import JobSpec
from forge.errors import ArgumentError, CheckpointError
from forge.fs import leads_to_folder
from forge.runs.reader import RunSummary, find_run, read_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLocation:
    """Where checkpoints are stored, and the tokenizer of their run."""

    url: str
    tokenizer: Path | None
    """Folder; None if the location is not a run."""
    job: JobSpec | None = None
    """That of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEntry:
    """One checkpoint; fields are None if its manifest cannot be read."""

    name: str
    url: str
    step: int | None
    num_tokens: int | None
    size_bytes: int | None
    num_parts: int | None
    has_average: bool
    metric: str
    """What the run's checkpoints are compared by; empty if its step was not evaluated."""
    metric_value: float | None
    """Its value at this step."""
    is_best: bool
    """Whether it is the best of those that can be used, and is named `best`."""
    problem: str | None
    """Why it cannot be used; None if it passed every check."""


def locate(name: str, *, root: Path) -> CheckpointLocation:
    """Find checkpoints by the name of a run, or by their folder or URL.

    Raises: ArgumentError if there is neither.
    """
    if "://" in name:
        return CheckpointLocation(url=name.rstrip("/"), tokenizer=None)
    if name and leads_to_folder(Path(name)) and any(Path(name).glob("step-*")):
        return CheckpointLocation(url=name.rstrip("/"), tokenizer=None)
    folder = find_run(name, root=root)
    plan = read_plan(folder)
    url = plan.job.checkpoint.url_of(str(folder))
    return CheckpointLocation(url=url, tokenizer=folder / "tokenizer", job=plan.job)


def embedding_of(job: JobSpec | None) -> dict[str, Any] | None:
    """How a job makes embeddings, as fields of `forge.serve.sentence_transformers.EmbeddingModel`; None if it does
    not."""
    if job is None or job.training.objective != "contrastive":
        return None
    spec = job.training.contrastive
    prefixes = {name: getattr(job.data.embedding, name) for name in ("query_prefix", "passage_prefix")}
    return {"pooling": spec.pooling, "similarity": spec.similarity, "max_seq_len": job.data.seq_len, **prefixes}


def entries(url: str, *, step: int | str | None = None, with_checksums: bool = False) -> Iterator[CheckpointEntry]:
    """Yield every checkpoint at a URL, newest first, or the one of `step`.

    Args:
        step: a number, or `best`.
        with_checksums: read and verify every byte; otherwise only file sizes are compared.

    Raises: CheckpointError if the storage cannot be listed, or has no best checkpoint; ArgumentError if it has no
        checkpoint of that step.
    """
    storage = open_storage(url)
    names = list_checkpoints(storage)
    best = [step_name(score.step) for score in best_scores(storage, count=1)]
    if step is not None:
        name = best_name(storage) if step == BEST else step_name(int(step))
        if name not in names:
            known = ", ".join(name.removeprefix("step-").lstrip("0") for name in names[:5]) or "none"
            raise ArgumentError(f"{url} has no checkpoint of step {step}; it has steps: {known}")
        names = [name]
    for name in names:
        problem = verify_checkpoint(storage, name, with_checksums=with_checksums)
        yield _entry(storage, name, problem=problem, is_best=name in best)


def best_checkpoint(run: RunSummary) -> CheckpointEntry | None:
    """Return the best complete checkpoint by the run's metric, or the newest if none was evaluated.

    The metric is that of `training.early_stopping`, else the held-out loss. Checkpoints of an earlier forge do not
    record it, and are compared by the held-out loss of the run's events.

    Raises: CheckpointError if the storage cannot be listed.
    """
    losses: dict[int, float] = {}
    for event in run.events:
        if event["event"] == "Evaluated" and event.get("loss") is not None:
            losses[event["step"]] = min(event["loss"], losses.get(event["step"], math.inf))
    complete = [
        entry for entry in entries(run.plan.job.checkpoint.url_of(str(run.folder))) if entry.problem is None
    ]
    best = next((entry for entry in complete if entry.is_best), None)
    if best is not None:
        return best
    return min(complete, key=lambda entry: losses.get(entry.step or 0, math.inf), default=None)


def _entry(storage: Storage, name: str, *, problem: str | None, is_best: bool) -> CheckpointEntry:
    try:
        found = open_checkpoint(storage, name)
    except CheckpointError as error:
        return CheckpointEntry(
            name=name,
            url=f"{storage.url}/{name}",
            step=None,
            num_tokens=None,
            size_bytes=None,
            num_parts=None,
            has_average=False,
            metric="",
            metric_value=None,
            is_best=False,
            problem=problem or str(error),
        )
    return CheckpointEntry(
        name=name,
        url=found.url,
        step=found.progress.step,
        num_tokens=found.progress.num_tokens,
        size_bytes=found.manifest.size_bytes,
        num_parts=len(found.manifest.parts),
        has_average="ema" in found.kinds,
        metric=found.progress.metric,
        metric_value=found.progress.metric_value,
        is_best=is_best and problem is None,
        problem=problem,
    )
