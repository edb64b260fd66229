"""`model.init_from`: find the run, choose its checkpoint, and put its path where pretrained weights are named.

After this, a job names one checkpoint by its absolute path or URL, or an exported folder, and does not depend on
later checkpoints of the other run. The plan has the digest of the checkpoint, and the ranks verify it before they
train.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from forge.checkpoint.best import best_scores
from forge.checkpoint.manifest import step_name
from forge.checkpoint.peft_folder import adapters_problem, is_peft_folder
from forge.checkpoint.source import open_source, source_digest, weights_digest
from forge.checkpoint.storage import open_storage
from forge.config.checkpoint_path import is_checkpoint
from forge.config.data import TokenizerSpec
from forge.config.job import JobSpec
from forge.config.load import LoadedJob
from forge.environment import looked_in
from forge.errors import ArgumentError, CheckpointError, PlanError
from forge.fs import leads_to_file, leads_to_folder
from forge.plan.inputs import InitInfo
from forge.runs.reader import read_plan
from forge.runtime.find_weights import find_weights, is_same_run
from forge.runtime.resolve_adapters import with_adapters
from forge.runtime.resolve_teacher import with_teacher

_KEY = "model.init_from"


def with_init(loaded: LoadedJob, *, resume: Path | None = None) -> LoadedJob:
    """Return a job that names what `model.init_from` stands for in `model.from_pretrained`; its adapters and its
    teacher likewise.

    Args:
        resume: folder of a run that is resumed: it keeps the checkpoint that it started from, if that is of the run
            which `init_from` names.

    Raises: JobFileError if there is no such run, or it has no complete checkpoint.
    """
    for key in ("from_pretrained", "init_from"):
        given = getattr(loaded.job.model, key)
        problem = adapters_problem(given) if given is not None else None
        if problem is not None:
            remedy = "name it in model.lora.init_from; model.from_pretrained is its base unless the job gives it"
            raise loaded.source.error(f"model.{key}", f"{problem}; {remedy}")
    loaded = with_adapters(with_teacher(loaded, resume=resume), resume=resume)
    name = loaded.job.model.init_from
    if name is None:
        return loaded
    try:
        source, tokenizer = find_weights(name, root=Path(loaded.job.checkpoint.runs))
    except (ArgumentError, CheckpointError, PlanError, OSError, ValueError) as error:
        raise loaded.source.error(_KEY, str(error)) from error
    former = read_plan(resume).job if resume is not None else None
    if former is not None and is_same_run(former.model.from_pretrained, source):
        source, tokenizer = former.model.from_pretrained or "", former.data.tokenizer.from_pretrained or ""
    source_map = loaded.source
    if _KEY in source_map.locations:
        locations = {**source_map.locations, "model.from_pretrained": source_map.locations[_KEY]}
        source_map = replace(source_map, locations=locations)
    return replace(loaded, job=_rewritten(loaded.job, source=source, tokenizer=tokenizer), source=source_map)


def init_info(source: str | None) -> InitInfo | None:
    """Return what the plan records about a checkpoint or an adapter folder that a job starts from; None if it is
    another folder, or none.

    Raises: CheckpointError if it cannot be read.
    """
    if source is not None and is_peft_folder(source):
        return InitInfo(source=source, step=None, digest=weights_digest(source))
    if source is None or not is_checkpoint(source):
        return None
    progress, digest = open_source(source).progress, source_digest(source)
    storage = open_storage(source.rstrip("/").rpartition("/")[0])
    best = best_scores(storage, count=1)
    return InitInfo(
        source=source,
        step=progress.step,
        digest=digest,
        metric=progress.metric,
        metric_value=progress.metric_value,
        is_best=bool(best) and step_name(best[0].step) == source.rstrip("/").rpartition("/")[2],
    )


def _rewritten(job: JobSpec, *, source: str, tokenizer: str) -> JobSpec:
    model = job.model.model_copy(update={"from_pretrained": source, "init_from": None})
    model.model_fields_set.discard("init_from")
    data = job.data
    if data.tokenizer.from_pretrained is None:
        spec = TokenizerSpec(from_pretrained=tokenizer, add_tokens=data.tokenizer.add_tokens)
        data = data.model_copy(update={"tokenizer": spec})
    return job.model_copy(update={"model": model, "data": data})


def missing_weights(source: str) -> str | None:
    """What is wrong if there is nothing where the pretrained weights should be; None if there is something."""
    path = Path(source).expanduser()
    if "://" in source or leads_to_folder(path):
        return None
    if leads_to_file(path):
        return f"{source} is a file; give the folder of the model"
    return (
        f"{source} does not exist{looked_in(path)}; forge reads a local folder. A model of the Hub: "
        "hf download ORG/NAME --local-dir FOLDER"
    )
