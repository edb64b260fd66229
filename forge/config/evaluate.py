"""`evaluate:` tasks that a run is scored in when it has reached its last step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from forge.config.section import Count, Section, Strings
from forge.config.task_metrics import TaskKind
from forge.config.training import TrainingSpec
from forge.objective.registry import AutoClass
from forge.units import Every, parse_every

METRIC_PREFIX = "evaluate/"
"""What the keys of tasks' metrics in `metrics.jsonl` begin with: `evaluate/TASK/METRIC`."""


def _read_every(value: Any) -> Any:
    if value in ("end", "evaluation") or isinstance(value, Every):
        return value
    try:
        every = parse_every(value)
    except ValueError:
        every = None
    if every is None or every.steps is None:
        raise ValueError("must be 'end', 'evaluation' or a number of steps such as '500 steps'")
    return every


TaskInterval = Annotated[
    Literal["end", "evaluation"] | Every,
    BeforeValidator(_read_every),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "examples": ["end", "evaluation", "500 steps"]}),
]


class EvaluateSpec(Section):
    """Tasks of `forge eval` that the run's own weights are scored in, on its machines."""

    tasks: Strings = Field(min_length=1)
    """Task files, such as `jobs/eval/translation.yaml`."""

    every: TaskInterval = "end"
    """When the tasks are scored. `end`: the `checkpoints` after the last step. `evaluation`: also the current
    weights at each evaluation (`training.evaluate_every`), by the workers that train, between two steps; the values
    are `evaluate/TASK/METRIC` in `metrics.jsonl` and the trackers, and can be the metric of
    `training.early_stopping` and of the best checkpoints. `500 steps`: the same every 500 steps, which are
    evaluations too. Each worker then holds the whole model once more, in `training.precision`, while it scores. Set
    `limit`."""

    checkpoints: Literal["last", "best", "kept"] = "last"
    """Which checkpoints are scored after the last step: the last, the best, or all that `checkpoint.keep` and
    `checkpoint.keep_best` have kept."""

    limit: Count | None = Field(None, ge=1)
    """Most examples of each task; None: those that its file says."""

    @property
    def is_in_training(self) -> bool:
        """Whether tasks are scored between steps."""
        return self.every != "end"

    def is_due(self, step: int) -> bool:
        """Whether the tasks make an evaluation due after a step."""
        return isinstance(self.every, Every) and self.every.is_due(step=step, seconds_since_last=0.0)

    def is_scored(self, step: int, *, is_last: bool) -> bool:
        """Whether the tasks are scored in an evaluation after a step."""
        return self.every == "evaluation" or (self.is_in_training and (is_last or self.is_due(step)))


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
