"""`training.distillation.teacher`: find it, name its files by a digest, and compare its tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from forge.checkpoint.source import weights_digest
from forge.config.checkpoint_path import tokenizer_of
from forge.config.data import TokenizerSpec
from forge.config.job import JobSpec
from forge.config.load import LoadedJob
from forge.data.tokenizer import load_tokenizer
from forge.data.tokenizer_files import vocabulary_problem
from forge.errors import ArgumentError, CheckpointError, DataError, PlanError
from forge.runs.reader import read_plan
from forge.runtime.find_weights import find_weights, is_same_run

_KEY = "training.distillation.teacher"


def with_teacher(loaded: LoadedJob, *, resume: Path | None = None) -> LoadedJob:
    """Return a job that names its teacher by an absolute path and a digest, with the teacher's tokenizer unless the
    job gives one.

    Args:
        resume: folder of a run that is resumed: it keeps its checkpoint of the run that the job names.

    Raises: JobFileError if there is no such teacher, or its files have another digest than the job gives.
    """
    job, spec = loaded.job, loaded.job.training.distillation
    if spec.teacher is None:
        return loaded
    try:
        source, tokenizer = find_weights(spec.teacher, root=Path(job.checkpoint.runs))
        former = read_plan(resume).job.training.distillation.teacher if resume is not None else None
        if former is not None and is_same_run(former, source):
            source, tokenizer = former, tokenizer_of(former)
        digest = weights_digest(source)
    except (ArgumentError, CheckpointError, PlanError, OSError, ValueError) as error:
        raise loaded.source.error(_KEY, str(error)) from error
    if spec.digest not in (None, digest):
        raise loaded.source.error("training.distillation.digest", f"the files of {source} have the digest {digest}")
    distillation = spec.model_copy(update={"teacher": source, "digest": digest})
    training = job.training.model_copy(update={"distillation": distillation})
    data = job.data
    if data.tokenizer == TokenizerSpec():
        data = data.model_copy(update={"tokenizer": TokenizerSpec(from_pretrained=tokenizer)})
    return replace(loaded, job=job.model_copy(update={"training": training, "data": data}))


def check_teacher_tokenizer(loaded: LoadedJob) -> None:
    """Raises: JobFileError if the teacher has another tokenizer than the student, or none."""
    job: JobSpec = loaded.job
    teacher, given = job.training.distillation.teacher, job.data.tokenizer.from_pretrained
    if teacher is None:
        return
    if given is None:
        problem = "must be that of the teacher, and not one trained on this corpus; leave data.tokenizer out"
        raise loaded.source.error("data.tokenizer", problem, show_value=False)
    try:
        own = load_tokenizer(tokenizer_of(teacher)).content
    except DataError as error:
        problem = f"its tokenizer cannot be used: {str(error).removeprefix('data.tokenizer.from_pretrained: ')}"
        raise loaded.source.error(_KEY, problem) from error
    student = load_tokenizer(given).content
    difference = vocabulary_problem(own, given=student) or vocabulary_problem(student, given=own)
    if difference is not None:
        raise loaded.source.error(_KEY, f"{difference}; teacher and student must have the same vocabulary")
