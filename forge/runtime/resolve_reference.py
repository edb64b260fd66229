"""The reference model of preference objectives: its log-probabilities become a column of the prepared data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from forge.config.job import JobSpec
from forge.data.prepare import PrepareProgress
from forge.objective.registry import OBJECTIVES
from forge.plan.inputs import CorpusInfo, ModelInfo
from forge.plan.memory import WEIGHT_BYTES
from forge.runtime.torch_subprocess import reference_log_probs
from forge.units import format_bytes

_COMPUTED = "reference: log-probabilities of the pretrained weights, computed once and stored with the data"
_ADAPTERS_OFF = "reference: the model without its adapters, asked in every step"
_HELD = "reference: the pretrained weights, {} more in every worker beside the model, asked in every step"


def needs_reference(job: JobSpec) -> bool:
    """Whether the log-probabilities of a reference model are computed before the job is trained."""
    objective = OBJECTIVES.get(job.training.objective)
    has_one = objective is not None and objective.has_reference_model
    return has_one and not job.has_live_reference


def reference_notes(job: JobSpec, model: ModelInfo) -> tuple[str, ...]:
    """What the plan says about the reference."""
    objective = OBJECTIVES.get(job.training.objective)
    if objective is None or not objective.has_reference_model:
        return ()
    if job.holds_reference:
        return (_HELD.format(format_bytes(WEIGHT_BYTES[job.training.precision] * model.num_parameters)),)
    return (_COMPUTED if needs_reference(job) else _ADAPTERS_OFF,)


def with_reference(
    corpus: CorpusInfo,
    *,
    job: JobSpec,
    find_model: Callable[[], ModelInfo],
    only_if_computed: bool = False,
    on_progress: Callable[[PrepareProgress], None] | None,
) -> CorpusInfo:
    """Return the corpus with the log-probabilities of the job's reference, if it needs any.

    Args:
        find_model: inspects the job's model.
        only_if_computed: return the corpus as it is rather than compute them.
        on_progress: called with the examples that are done.

    Raises: DataError, CheckpointError, PlanError; RunError if the process failed.
    """
    if not needs_reference(job):
        return corpus

    def show(done: int, total: int) -> None:
        if on_progress is not None:
            phase: Any = "reference" if total else "waiting"
            on_progress(PrepareProgress(phase=phase, num_documents=done, num_documents_in_all=total))

    model = find_model()
    answer = reference_log_probs(
        model=job.model.model_dump(mode="json"),
        corpus={name: None if value != value else value for name, value in asdict(corpus).items()},
        precision=job.training.precision,
        seed=job.training.seed,
        uses_gpu=job.resources.gpu != "none",
        has_linear_head=model.has_linear_head and job.training.cross_entropy == "chunked",
        keeps_examples_apart=model.isolation_problem is None,
        only_if_computed=only_if_computed,
        on_progress=show,
    )
    found = answer["corpus"]
    return corpus if found is None else replace(corpus, folder=found["folder"], digest=found["digest"])
