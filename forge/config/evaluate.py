"""`evaluate:` tasks that a run is scored in when it has reached its last step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from forge.config.section import Count, Section, Strings
from forge.config.task_metrics import TaskKind
from forge.config.training import TrainingSpec
from forge.objective.registry import AutoClass


class EvaluateSpec(Section):
    """Tasks of `forge eval` that the run's own checkpoints are scored in, on its machines."""

    tasks: Strings = Field(min_length=1)
    """Task files, such as `jobs/eval/translation.yaml`."""

    checkpoints: Literal["last", "best", "kept"] = "last"
    """Which checkpoints are scored after the last step: the last, the best, or all that `checkpoint.keep` and
    `checkpoint.keep_best` have kept."""

    limit: Count | None = Field(None, ge=1)
    """Most examples of each task; None: those that its file says."""


KINDS_OF_MODELS: Mapping[TaskKind, tuple[str, ...]] = {
    "generate": ("causal-lm", "seq2seq"),
    "multiple-choice": ("causal-lm", "seq2seq", "reward"),
    "log-likelihood": ("causal-lm", "seq2seq", "masked-lm"),
    "classify": ("classification", "token-classification"),
    "embed": ("embedding",),
}
"""The kinds of models that can do tasks of a kind."""

_KINDS: Mapping[AutoClass, str] = {
    "AutoModelForCausalLM": "causal-lm",
    "AutoModelForSeq2SeqLM": "seq2seq",
    "AutoModelForSequenceClassification": "classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForMaskedLM": "masked-lm",
    "AutoModel": "embedding",
}


def kind_of_model(training: TrainingSpec) -> str:
    """The kind of the model that a job trains, as `forge.inference` names it."""
    return "reward" if training.objective == "reward" else _KINDS[training.auto_class]


def task_problem(kind: TaskKind, *, model: str) -> str | None:
    """Why a kind of model cannot do a kind of task; None if it can."""
    fitting = KINDS_OF_MODELS[kind]
    if model in fitting:
        return None
    return f"kind {kind} is for models of the kind {' or '.join(fitting)}, and this is a {model} model"
