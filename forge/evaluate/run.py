"""The process that evaluates one model: `python -m forge.evaluate.run`, with an `EvaluationRequest` on stdin.

Tasks are read, their examples divided into shards, the shards answered on all workers of the cluster, the answers
scored. Answers are kept in the cache under the digest of the model, so what was answered once is not asked again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from forge.cluster.registry import find_cluster
from forge.config.evaluate import task_problem
from forge.config.load import load_task_text
from forge.data.held_out import held_out_of_run
from forge.data.sources.base import Record
from forge.errors import ArgumentError, DataError
from forge.evaluate.contamination import count_in_corpus, overlaps, task_ngrams, training_texts
from forge.evaluate.results import answers_path, count_read, score_task, task_digest, write_answers
from forge.evaluate.shards import TaskShards
from forge.evaluate.stored_examples import stored_examples
from forge.evaluate.task import Task, TaskExamples, build_task
from forge.fs import default_cache_dir
from forge.inference.identity import ModelIdentity, identify
from forge.remote.models import PlacedModel, place_model
from forge.remote.shard_task import RemoteMap
from forge.remote.submit import preflight
from forge.runs.reader import read_plan
from forge.runs.run_files import pack_run
from forge.runs.scores import TaskScore, append_score, read_scores
from forge.runs.trackers.wandb_tracker import log_scores
from forge.runtime.shard_files import ShardFiles
from forge.runtime.shard_process import ShardProcess, answer_request
from forge.runtime.shard_worker import ShardWorkerSpec
from forge.units import counted

_CACHE = "evaluations"
_MAX_SEARCHED_TOKENS = 500_000_000
"""Of training data that are searched without being asked to: some minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """What is to be evaluated."""

    source: str
    """Folder of a run or of weights."""
    tasks: list[list[str]]
    """Path and text of each task file."""
    step: int | str | None = None
    ema: bool = False
    dtype: str = "fp32"
    limit: int | None = None
    """Most examples of each task."""
    num_workers: int | None = None
    address: str | None = None
    """Of the Ray cluster; None: one that ends with this process."""
    contamination: bool | None = None
    """Whether the run's training data are searched for the examples; None: unless they have many tokens."""
    cluster: str | None = None
    """Name or file of a cluster of other machines, on which the shards are answered."""
    examples: str | None = None
    """Digest of the examples that the run has stored; None: they are read from the data of the tasks."""
    folder: str | None = None
    """Where the scores are written; None: the folder of the run, or of the cache for a folder of weights."""


def evaluate(request: EvaluationRequest, process: ShardProcess) -> dict[str, Any]:
    """Evaluate a model. Returns: `scores`, one `TaskScore` for each task, and `folder`, which has their files.

    Raises: JobFileError, DataError for a task; what `load` and `ShardMap.run` raise.
    """
    tasks = [build_task(load_task_text(text, path=path)) for path, text in request.tasks]
    source = Path(request.source)
    there = _place(request, process)
    model = _identify(request, there)
    for task in tasks:
        _require_kind(task, model)
    stored = stored_examples(request.examples, run_folder=source) if request.examples is not None else {}
    found = [
        _read(task, source, limit=request.limit, stored=stored.get(path))
        for task, (path, _) in zip(tasks, request.tasks, strict=True)
    ]
    for shards in found:
        process.message(f"task {shards.task.spec.name}: {count_read(shards.data)}")
    files = _files(request, model)
    _answer(found, files, request=request, model=model, process=process, there=there)
    folder = Path(request.folder) if request.folder is not None else source if model.is_run else files.folder.parent
    before = read_scores(folder)
    scores = [_score(one, files, request=request, model=model, folder=folder, process=process) for one in found]
    if model.is_run:
        _log(Path(request.source), [score for score in scores if score not in before], process=process)
    return {"scores": [asdict(score) for score in scores], "folder": str(folder)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Elsewhere:
    """A model on the cluster that answers."""

    model: PlacedModel
    map: RemoteMap


def _place(request: EvaluationRequest, process: ShardProcess) -> _Elsewhere | None:
    """Give the cluster the model; None if this machine, or its own cluster, answers."""
    if request.cluster is None:
        return None
    target = preflight(find_cluster(request.cluster))
    model = place_model(target, Path(request.source), step=request.step, on_message=process.message)
    return _Elsewhere(model=model, map=RemoteMap(target, model))


def _identify(request: EvaluationRequest, there: _Elsewhere | None) -> ModelIdentity:
    if there is None:
        return identify(request.source, step=request.step, ema=request.ema)
    return ModelIdentity(**there.model.identify(step=request.step, ema=request.ema))


def _require_kind(task: Task, model: ModelIdentity) -> None:
    """Raises: ArgumentError if a model of this kind cannot do a task."""
    problem = task_problem(task.spec.kind, model=model.kind)
    if problem is not None:
        raise ArgumentError(f"task {task.spec.name} cannot be done by {model.name}: {problem}")


def _read(task: Task, source: Path, *, limit: int | None, stored: TaskExamples | None) -> TaskShards:
    if limit is not None:
        spec = task.spec.model_copy(update={"limit": min(limit, task.spec.limit or limit)})
        task = replace(task, spec=spec)
    if stored is not None:
        return TaskShards(task=task, data=stored)
    held_out = partial(_held_out, source) if (source / "plan.json").is_file() else None
    try:
        return TaskShards(task=task, data=task.examples(held_out=held_out))
    except (ArgumentError, DataError) as error:
        raise type(error)(f"task {task.spec.name}: {error}") from error


def _held_out(folder: Path) -> Iterator[Record]:
    plan = read_plan(folder)
    return held_out_of_run(plan.job.data, folder=Path(plan.corpus.folder))


def _files(request: EvaluationRequest, model: ModelIdentity) -> ShardFiles:
    """The answers of a model, in the cache: they depend on its weights and the versions of what computes them."""
    versions = [f"{name}={version(name)}" for name in ("forge-train", "torch", "transformers")]
    digest = hashlib.blake2b(repr([model.digest, request.dtype, versions]).encode(), digest_size=16).hexdigest()
    return ShardFiles(folder=default_cache_dir().absolute() / _CACHE / digest / "answers", digest=digest)


def _answer(
    tasks: list[TaskShards],
    files: ShardFiles,
    *,
    request: EvaluationRequest,
    model: ModelIdentity,
    process: ShardProcess,
    there: _Elsewhere | None,
) -> None:
    config: dict[str, Any] = {
        "source": request.source if there is None else there.model.folder,
        "step": model.step,
        "ema": request.ema,
        "dtype": request.dtype,
    }
    config["packed"] = pack_run(Path(request.source))
    total = sum(shards.count for shards in tasks)

    def inputs() -> Iterable[Any]:
        return (one for shards in tasks for one in shards.inputs())

    totals = process.map(
        inputs,
        spec=ShardWorkerSpec(function="forge.evaluate.worker:EvaluationWorker", config=config),
        files=files,
        total=total,
        num_workers=request.num_workers,
        address=request.address,
        elsewhere=None if there is None else there.map,
    )
    if totals.num_reused:
        process.message(f"{totals.num_reused} of {counted(total, 'shard')} answered before, by the same weights")
    if totals.num_reused == total:
        return
    lost = totals.num_lost + totals.num_replaced
    process.message(
        f"{counted(total - totals.num_reused, 'shard')} answered by {counted(totals.most_workers, 'worker')}"
        + (f", {counted(lost, 'worker')} lost and replaced" if lost else "")
    )


def _score(
    shards: TaskShards,
    files: ShardFiles,
    *,
    request: EvaluationRequest,
    model: ModelIdentity,
    folder: Path,
    process: ShardProcess,
) -> TaskScore:
    spec = shards.task.spec
    outputs = shards.scored(list(files.read_all(shards.inputs())))
    answers = answers_path(spec.name, step=model.step, ema=request.ema)
    write_answers(folder / answers, shards, outputs)
    score = TaskScore(
        task=spec.name,
        kind=spec.kind,
        model=model.name,
        step=model.step,
        ema=request.ema,
        model_digest=model.digest,
        task_digest=task_digest(shards),
        values=score_task(shards, outputs),
        num_examples=len(outputs),
        num_skipped=shards.data.num_skipped,
        contamination=_contamination(shards, request=request, model=model, process=process),
        examples=answers,
    )
    return append_score(folder, score)


def _contamination(
    shards: TaskShards, *, request: EvaluationRequest, model: ModelIdentity, process: ShardProcess
) -> dict[str, float] | None:
    """How many examples overlap with what the run was trained on; None where that is not known or not wanted."""
    name = shards.task.spec.name
    if not model.is_run or request.contamination is False:
        return None
    corpus = read_plan(Path(request.source)).corpus
    if not Path(corpus.folder).is_dir():
        process.message(f"task {name}: not compared with the training data, which are not on this machine")
        return None
    if request.contamination is None and corpus.num_train_tokens > _MAX_SEARCHED_TOKENS:
        process.message(
            f"task {name}: not compared with the {corpus.num_train_tokens:,} training tokens, which takes long; "
            "--contamination does it"
        )
        return None
    files = ShardFiles(folder=default_cache_dir().absolute() / _CACHE / "overlaps", digest=corpus.digest)
    key = files.key([example.digest for example in shards.data.examples])
    found: dict[str, float] | None = files.read(key)
    if found is None:
        ngrams = task_ngrams(shards.data.examples)
        overlap = overlaps(ngrams, counts=count_in_corpus(ngrams, training_texts(Path(corpus.folder))))
        compared = overlap.num_examples - overlap.num_too_short
        found = {"num_overlapping": len(overlap.overlapping), "num_compared": compared}
        files.prepare()
        files.write(key, found)
    share = f"{found['num_overlapping']:.0f} of {counted(int(found['num_compared']), 'example')}"
    verb = "shares" if found["num_overlapping"] == 1 else "share"
    process.message(f"task {name}: {share} {verb} 13 words in a row with the training data")
    return found


def _log(folder: Path, scores: list[TaskScore], *, process: ShardProcess) -> None:
    """Send new scores of a run to W&B, if its job says so."""
    spec = read_plan(folder).job.tracking.wandb
    if not scores or spec.mode == "disabled":
        return
    problem = log_scores(spec, folder=folder, run_id=folder.resolve().name, scores=scores)
    if problem is not None:
        process.message(f"the scores are not in W&B: {problem}")


def _handle(request: dict[str, Any], process: ShardProcess) -> dict[str, Any]:
    return evaluate(EvaluationRequest(**request), process)


def main() -> None:
    """Answer one request."""
    answer_request(_handle)


if __name__ == "__main__":
    main()
