"""Outputs of a model that become columns of the prepared data: of the reference of preference objectives, and of
the teacher of a distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from forge.config.job import JobSpec
from forge.config.model import ModelSpec
from forge.data.cache_index import read_index
from forge.data.further_columns import num_positions
from forge.data.mixture import mix
from forge.data.prepare import PrepareProgress
from forge.objective.registry import OBJECTIVES
from forge.plan.inputs import CorpusInfo, ModelInfo, TeacherInfo
from forge.plan.snapshot_memory import WEIGHT_BYTES
from forge.runtime.torch_subprocess import stored_outputs
from forge.units import format_bytes

_COMPUTED = "reference: log-probabilities of the pretrained weights, computed once and stored with the data"
_ADAPTERS_OFF = "reference: the model without its adapters, asked in every step"
_HELD = "reference: the pretrained weights, {} more in every worker beside the model, asked in every step"
_TOKEN_BYTES = 8
"""Of a token of the teacher: its number and its log-probability."""


def has_reference(job: JobSpec) -> bool:
    """Whether the job compares its model with what it was before training."""
    objective = OBJECTIVES.get(job.training.objective)
    return objective is not None and objective.has_reference_model


def reference_notes(job: JobSpec, model: ModelInfo) -> tuple[str, ...]:
    """What the plan says about the reference."""
    if not has_reference(job):
        return ()
    if job.holds_reference:
        return (_HELD.format(format_bytes(WEIGHT_BYTES[job.training.precision] * model.num_parameters)),)
    return (_ADAPTERS_OFF if job.has_live_reference else _COMPUTED,)


def outputs_key(job: JobSpec) -> object:
    """What of a job decides on its stored outputs, besides the data; None if it stores none."""
    training, teacher = job.training, job.training.distillation
    if has_reference(job) and not job.has_live_reference:
        return job.model.model_copy(update={"lora": None, "freeze": ()}), training.precision
    if teacher.teacher_logits == "stored":
        return teacher.teacher, teacher.top_k, teacher.temperature, training.precision
    return None


def with_stored_size(teacher: TeacherInfo | None, *, job: JobSpec, corpus: CorpusInfo) -> TeacherInfo | None:
    """Return a teacher whose outputs are stored with what they take on the disk. Raises: DataError."""
    top_k = job.training.distillation.top_k
    if teacher is None or job.holds_teacher or top_k is None:
        return teacher
    count = sum(num_positions(read_index(Path(one.folder)), seq_len=one.seq_len) for one in corpus.alone)
    return replace(teacher, stored_bytes=count * min(top_k, corpus.vocab_size) * _TOKEN_BYTES)


def with_outputs(
    corpus: CorpusInfo,
    *,
    job: JobSpec,
    find_model: Callable[[], ModelInfo],
    only_if_computed: bool = False,
    on_progress: Callable[[PrepareProgress], None] | None,
) -> CorpusInfo:
    """Return the corpus with the outputs of the job's reference or teacher, if it stores any.

    Args:
        find_model: inspects the job's model.
        only_if_computed: return the corpus as it is rather than compute them.
        on_progress: called with the examples that are done.

    Raises: DataError, CheckpointError, PlanError; RunError if the process failed.
    """
    if corpus.parts:
        ask = partial(with_outputs, job=job, find_model=cache(find_model), on_progress=on_progress)
        parts = [replace(part, corpus=ask(part.corpus, only_if_computed=only_if_computed)) for part in corpus.parts]
        is_complete = all(now.corpus != then.corpus for now, then in zip(parts, corpus.parts, strict=True))
        return mix(parts, home=Path(corpus.folder).parent) if is_complete else corpus
    teacher = job.training.distillation
    settings: dict[str, Any]
    if has_reference(job) and not job.has_live_reference:
        model = find_model()
        settings = {
            "model": job.model.model_dump(mode="json"),
            "has_linear_head": model.has_linear_head and job.training.cross_entropy == "chunked",
            "keeps_examples_apart": model.isolation_problem is None,
            "top_k": None,
        }
    elif teacher.teacher is not None and teacher.teacher_logits == "stored":
        settings = {
            "model": ModelSpec(from_pretrained=teacher.teacher).model_dump(mode="json"),
            "has_linear_head": False,
            "keeps_examples_apart": job.data.packing == "examples",
            "top_k": teacher.top_k,
            "temperature": teacher.temperature,
        }
    else:
        return corpus

    def show(done: int, total: int) -> None:
        if on_progress is not None:
            phase: Any = "outputs" if total else "waiting"
            on_progress(PrepareProgress(phase=phase, num_documents=done, num_documents_in_all=total))

    answer = stored_outputs(
        corpus={name: None if value != value else value for name, value in asdict(corpus).items()},
        precision=job.training.precision,
        seed=job.training.seed,
        uses_gpu=job.resources.gpu != "none",
        only_if_computed=only_if_computed,
        on_progress=show,
        **settings,
    )
    found = answer["corpus"]
    return corpus if found is None else replace(corpus, folder=found["folder"], digest=found["digest"])
