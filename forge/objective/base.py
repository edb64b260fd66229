"""What an objective is, and the module that DeepSpeed wraps around a model and its objective.

An objective says what is minimised and which metrics come with it. It returns sums and weights, never means: the
engine divides the sum over all ranks by the total weight of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from forge.config.training import TrainingSpec
from forge.errors import RunError
from forge.objective.registry import Direction
from forge.plan.inputs import LabelsInfo

Arrays = Mapping[str, NDArray[Any]]
"""Arrays by name, all with the same first two dimensions, rows and positions; `row_seeds` has one value a row."""

IGNORED = -100
"""Target of a position that carries no loss; torch's own convention, and that of `forge.data.rows`."""

RESERVED_METRICS = frozenset({"loss", "learning_rate", "grad_norm", "tokens"})
"""Names that every run reports itself."""

MODEL_PREFIX = "model."
"""What the names of the model's parameters begin with in `ObjectiveModule`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedSum:
    """A sum and the number of terms it has; the mean over all ranks is the one sum over the other."""

    sum: Tensor
    """float[]; of a loss with its gradient."""
    weight: Tensor | float
    metrics: Mapping[str, WeightedSum] = field(default_factory=dict)
    """Of a loss: metrics that come out of the same forward pass, reported at every step as `train/<name>`."""
    counts: Mapping[str, Tensor] = field(default_factory=dict)
    """Of a loss: vectors that are added up over all rows, for metrics that are no mean, such as the F1 score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveContext:
    """What a built-in objective may be built with."""

    training: TrainingSpec
    """The job's `training:` section."""
    tokenizer: Path
    """The folder with the tokenizer's files."""
    has_positionwise_head: bool = False
    """`ModelInfo.has_positionwise_head` of the plan."""
    keeps_examples_apart: bool = False
    """Whether the model keeps sequences apart that share a row, by positions that restart."""
    vocab_size: int | None = None
    """Of the tokenizer."""
    teacher: nn.Module | None = None
    """Of a distillation; None if its outputs are stored with the data."""
    reference: nn.Module | None = None
    """Of a preference objective, where it is held beside the model."""
    labels: LabelsInfo | None = None
    """`CorpusInfo.labels` of the plan."""


class Objective(Protocol):
    """What is minimised. The class is built without arguments, once in every worker; a built-in one whose
    constructor has a parameter `context` gets an `ObjectiveContext`.

    Further methods are called if there are any. `derived(means) -> Mapping[str, float]` gives metrics computed
    from the means of the others, such as a perplexity from the loss. `weight(batch) -> float` gives the number of
    loss terms of a batch that `batch` has made, where it is not what the format gave its examples.
    `metrics_of(counts) -> Mapping[str, float]` gives metrics computed from the sums, over all ranks, of the
    vectors in `WeightedSum.counts`; `count_sizes: Mapping[str, int]` are their lengths.
    """

    @property
    def metric_directions(self) -> Mapping[str, Direction]:
        """Every metric that may be reported besides the loss, and whether less or more of it is better."""

    def batch(self, rows: Arrays) -> dict[str, Tensor]:
        """Choose and convert what the model is given.

        Shapes: rows: `tokens` and `targets` int64[m, T]; of examples also `position_ids` and `segment_ids`
        int64[m, T], and every other array of the format; `row_seeds` uint64[m], a number for each row drawn from
        `training.seed`, the step and the row, the same at every world size; of held-out rows the same at every
        evaluation.

        Returns: tensors for the model. If they have other sequences than one for each row, `sequence_rows` int64[n]
        says from which row each comes, so that dropout does not depend on how rows share a batch.
        """

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> WeightedSum:
        """The loss of some rows. The weights of a row must sum to the weight that the format gave its examples;
        rows that fill up a batch, whose every target is -100, must have weight 0."""

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, WeightedSum]:
        """Return metrics that need a separate forward pass, without gradient; reported at evaluations as
        `eval/<name>`, beside those of the loss."""


@runtime_checkable
class TwoPassObjective(Protocol):
    """An objective with a loss whose terms depend on all rows of a step, as with in-batch negatives.

    A step then runs all micro-batches twice, at first without gradient. What the model draws at random is equal in
    both passes. If the step has a single micro-batch, there is no first pass, and `loss` does all of it.
    """

    def first_pass(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run the model on a micro-batch without gradient. Returns: what is needed of it."""

    def second_inputs(self, results: Sequence[Mapping[str, Tensor]]) -> Sequence[Mapping[str, Tensor]]:
        """Return what is added to each micro-batch before `loss` is called for it; collective.

        Args:
            results: of this rank's micro-batches in the step.
        """

    def held_out(
        self,
        results: Sequence[Mapping[str, Tensor]],
        *,
        positions: Sequence[NDArray[Any]],
        parts: Sequence[str | None] = (),
    ) -> Mapping[str, WeightedSum]:
        """Return the loss, under `loss`, and the metrics of this rank's held-out micro-batches; collective.

        Args:
            positions: of the rows of each micro-batch among the held-out rows, -1 for rows that only fill up.
            parts: of a mixture, the part of each micro-batch; the loss of each part is then under `loss/<part>`.
        """


class ObjectiveModule(nn.Module):
    """A model with its objective, as one module for DeepSpeed.

    DeepSpeed gathers weights and hooks gradients around the forward pass of the module it wraps, so every call of
    the model goes through here. `forward` returns the sum alone; the whole result is in `result`.
    """

    def __init__(self, model: nn.Module, *, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = (objective,)  # in a tuple: an objective that is a module must not add parameters
        self.result: Mapping[str, WeightedSum] = {}
        """Results of the last forward pass; the loss is under `loss`."""
        self.first_result: Mapping[str, Tensor] = {}
        """That of the last first pass."""

    @property
    def objective(self) -> Objective:
        return self._objective[0]

    def forward(
        self, batch: Mapping[str, Tensor], *, with_metrics: bool = False, is_first_pass: bool = False
    ) -> Tensor:
        """Return the summed loss of a batch; 0 in a first pass, whose result is in `first_result`.

        Raises: RunError if the objective reports a metric that it does not declare.
        """
        if is_first_pass:
            assert isinstance(self.objective, TwoPassObjective), "only such an objective has a first pass"
            self.first_result = self.objective.first_pass(self.model, batch)
            return torch.zeros(())
        loss = self.objective.loss(self.model, batch)
        further = self.objective.metrics(self.model, batch) if with_metrics else {}
        found = {**loss.metrics, **further}
        unknown = sorted(set(found) - set(self.objective.metric_directions))
        if unknown:
            declared = ", ".join(self.objective.metric_directions) or "none"
            name = type(self.objective).__name__
            raise RunError(f"{name} reports the metric {unknown[0]!r}, but its metric_directions are: {declared}")
        self.result = {"loss": loss, **found}
        return loss.sum


def batch_weight(objective: Objective, batch: Mapping[str, Tensor]) -> float | None:
    """Return the number of loss terms of a batch, if the objective decides on it."""
    count: Callable[[Mapping[str, Tensor]], float] | None = getattr(objective, "weight", None)
    return None if count is None else float(count(batch))


def count_sizes(objective: Objective) -> Mapping[str, int]:
    """The lengths of the vectors that an objective counts; empty if it counts none."""
    found: Mapping[str, int] = getattr(objective, "count_sizes", {})
    return found


def derived_metrics(
    objective: Objective, means: Mapping[str, float], *, counts: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Return the means, and what the objective derives from them and from its counts.

    Raises: RunError for a derived metric that is not declared, is already among the means, or is not a number.
    """
    derive: Callable[[Mapping[str, float]], Mapping[str, Any]] | None = getattr(objective, "derived", None)
    derived = dict(derive(means)) if derive is not None and means else {}
    if counts and means:
        derived |= objective.metrics_of(counts)  # type: ignore[attr-defined]
    for name, value in derived.items():
        problem = None
        if name in means or name in RESERVED_METRICS:
            problem = "which it must not replace"
        elif name not in objective.metric_directions:
            problem = "which its metric_directions do not name"
        elif isinstance(value, bool) or not isinstance(value, Real):
            problem = f"which must be a number, not {type(value).__name__}"
        if problem is not None:
            raise RunError(f"{type(objective).__name__}.derived returns the metric {name!r}, {problem}")
    return {**means, **{name: float(value) for name, value in derived.items()}}
