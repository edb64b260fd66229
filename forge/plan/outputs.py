"""The outputs of a job's model: the class of transformers that has them, and for a classifier its labels. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from forge.config.job import JobSpec
from forge.objective.registry import AutoClass, num_labels_of
from forge.plan.inputs import CorpusInfo

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

_PROBLEM_TYPES: Mapping[str, ProblemType] = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutputs:
    """What a model gives for tokens or texts; the fields are those of `DataShape`."""

    auto_class: AutoClass
    num_labels: int | None = None
    label_names: tuple[str, ...] = ()
    problem_type: ProblemType | None = None
    pad_id: int | None = None


def outputs_of(job: JobSpec, *, corpus: CorpusInfo | None) -> ModelOutputs:
    """Return the outputs of a job's model.

    Args:
        corpus: None if it is not prepared; then the labels are those that the job names.
    """
    training = job.training
    if training.objective != "classification":
        return ModelOutputs(
            auto_class=training.auto_class,
            num_labels=num_labels_of(training.objective),
            pad_id=None if corpus is None else corpus.pad_id,
        )
    names = job.data.labels.names or ()
    if corpus is not None and corpus.labels is not None:
        names = corpus.labels.names
    kind = training.classification.kind
    return ModelOutputs(
        auto_class=training.auto_class,
        num_labels=1 if kind == "regression" else len(names) or None,
        label_names=names,
        problem_type=_PROBLEM_TYPES.get(kind),
        pad_id=None if corpus is None else corpus.pad_id,
    )


def must_find_labels(job: JobSpec) -> bool:
    """Whether the labels are known only after the records were read."""
    is_named = job.data.labels.names is not None or job.training.classification.kind == "regression"
    return job.training.objective == "classification" and not is_named
