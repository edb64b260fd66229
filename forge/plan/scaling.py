"""Scaling laws: which model size and how many tokens give the least loss for a given number of FLOPs.

`L(N, D) = E + A/N^α + B/D^β` is the loss in nats per token of a model with N parameters (embeddings included) after
D tokens. Training takes `C = 6·N·D` FLOPs. The losses of published laws are those of their authors' corpora and
tokenizers: what carries over to another corpus is the ratio of tokens to parameters, and the differences between
losses rather than their values. A law fitted to one's own runs (`forge.plan.scaling_fit`) has neither limit.

Sources: Hoffmann et al. 2022, arXiv 2203.15556 ("Chinchilla"): equation 10 and table A3 (approach 3), table 3
(approach 1). Besiroglu et al. 2024, arXiv 2404.10102: the constants of approach 3, estimated again from the same
runs because the published ones neither fit them nor agree with approaches 1 and 2. Kaplan et al. 2020, arXiv
2001.08361: sections 1.2 and 6.1. Sardana et al. 2024, arXiv 2401.00448: equation 2, the demand of inference.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

from forge.plan.throughput import Estimate

QUANTILE = 1.2816
"""Standard deviations on both sides that contain 80 % of a normal distribution."""
_PETAFLOP_DAY = 8.64e19
_LARGEST_LOG = 80.0  # of numbers of parameters and tokens: e^80 is 5.5e34
_BISECTIONS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScale:
    """A number of parameters and the tokens to train them on."""

    num_parameters: float
    num_tokens: float

    @property
    def training_flops(self) -> float:
        """`6·N·D`, the convention of all laws here. Source: Kaplan et al. 2020, section 2.1."""
        return 6 * self.num_parameters * self.num_tokens

    def total_flops(self, *, inference_tokens: float) -> float:
        """Of training and of a forward pass, `2·N`, for each token of inference."""
        return self.training_flops + 2 * self.num_parameters * inference_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingLaw:
    """`L(N, D) = E + A/N^α + B/D^β`."""

    name: str
    irreducible_loss: float
    """E, in nats per token, as all losses."""
    parameter_factor: float
    """A"""
    parameter_exponent: float
    """α"""
    token_factor: float
    """B"""
    token_exponent: float
    """β"""
    loss_sd: float | None = None
    """Standard deviation of a measured loss from the law; None if unknown."""
    covariance: tuple[tuple[float, ...], ...] = ()
    """Of the estimates of E, ln A, α, ln B, β; empty if it is unknown."""

    def loss(self, scale: ModelScale) -> float:
        """Return the expected loss."""
        return self.irreducible_loss + sum(self._terms(scale))

    def loss_range(self, scale: ModelScale) -> Estimate | None:
        """Return the expected loss and the range that contains 80 % of outcomes; None if its error is unknown."""
        if self.loss_sd is None:
            return None
        of_parameters, of_tokens = self._terms(scale)
        slopes = (
            1.0,
            of_parameters,
            -of_parameters * math.log(scale.num_parameters),
            of_tokens,
            -of_tokens * math.log(scale.num_tokens),
        )
        rows = zip(slopes, self.covariance, strict=True) if self.covariance else ()
        variance = sum(slope * sum(map(operator.mul, row, slopes)) for slope, row in rows)
        spread = QUANTILE * math.sqrt(self.loss_sd**2 + max(0.0, variance))
        loss = self.loss(scale)
        return Estimate(low=loss - spread, likely=loss, high=loss + spread)

    def _terms(self, scale: ModelScale) -> tuple[float, float]:
        """`A/N^α` and `B/D^β`."""
        of_parameters = self.parameter_factor / scale.num_parameters**self.parameter_exponent
        return of_parameters, self.token_factor / scale.num_tokens**self.token_exponent

    def best_scale(self, flops: float, *, inference_tokens: float = 0.0) -> ModelScale:
        """Return the size with the least loss for so many FLOPs of training.

        With `inference_tokens` T: the size that takes all these FLOPs and, of all sizes of equal loss, the fewest
        FLOPs of training and inference together, `6·N·D + 2·N·T`. Where its derivatives and those of the loss have
        one ratio, `αA/N^α = βB/D^β · (1 + T/(3D))`; the left side falls with N and the right side rises.
        """
        _require_positive(flops, what="FLOPs")

        def excess(log_parameters: float) -> float:
            tokens = flops / 6 / math.exp(log_parameters)
            left = (
                math.log(self.parameter_exponent * self.parameter_factor) - self.parameter_exponent * log_parameters
            )
            right = math.log(self.token_exponent * self.token_factor) - self.token_exponent * math.log(tokens)
            return left - right - math.log1p(inference_tokens / (3 * tokens))

        num_parameters = math.exp(_root(excess, low=0.0, high=_LARGEST_LOG))
        return ModelScale(num_parameters=num_parameters, num_tokens=flops / 6 / num_parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierLaw:
    """`N = k·C^a` for the best size alone, without the loss of others."""

    name: str
    factor: float
    """k, with C in FLOPs."""
    exponent: float
    """a"""
    loss_scale: float | None = None
    """The loss is (this / C)^loss_exponent; None if no loss was published."""
    loss_exponent: float = 0.0

    def best_scale(self, flops: float) -> ModelScale:
        """Return the best size for so many FLOPs of training."""
        _require_positive(flops, what="FLOPs")
        num_parameters = self.factor * flops**self.exponent
        return ModelScale(num_parameters=num_parameters, num_tokens=flops / 6 / num_parameters)

    def loss(self, flops: float) -> float | None:
        """Return the loss of the best size."""
        return None if self.loss_scale is None else (self.loss_scale / flops) ** self.loss_exponent


HOFFMANN = ScalingLaw(
    name="Hoffmann 2022, approach 3 as published",
    # With the digits of the paper's TeX source, as Besiroglu et al. quote them (equation 2).
    irreducible_loss=1.6934,
    parameter_factor=406.4,
    parameter_exponent=0.3392,
    token_factor=410.7,
    token_exponent=0.2849,
)
BESIROGLU = ScalingLaw(
    name="Hoffmann 2022, approach 3 corrected",
    irreducible_loss=1.8172,
    parameter_factor=482.01,
    parameter_exponent=0.3478,
    token_factor=2085.43,
    token_exponent=0.3658,
    # The standard error of E, which is what remains of the error for large models: table 1.
    loss_sd=0.03,
)
HOFFMANN_1 = FrontierLaw(
    name="Hoffmann 2022, approach 1",
    # Table 2: a = 0.50; table 3: 67 billion parameters for 5.76e23 FLOPs.
    factor=67e9 / 5.76e23**0.50,
    exponent=0.50,
)
KAPLAN = FrontierLaw(
    name="Kaplan 2020",
    # Table 6: N = 1.3e9 · C^0.73 without embeddings, loss = (3.1e8 / C)^0.050; C in petaFLOP-days.
    factor=1.3e9 / _PETAFLOP_DAY**0.73,
    exponent=0.73,
    loss_scale=3.1e8 * _PETAFLOP_DAY,
    loss_exponent=0.050,
)
FITTED_SIZES = (44e6, 16.2e9)
"""Parameters of the smallest and the largest model of Hoffmann et al. 2022, table A9."""
WORTHWHILE_PASSES = 4
"""So many times a corpus may be read before its tokens are worth clearly less than new ones.

Source: Muennighoff et al. 2023, arXiv 2305.16264, abstract."""
OTHER_LAWS: tuple[ScalingLaw | FrontierLaw, ...] = (HOFFMANN, HOFFMANN_1, KAPLAN)
"""Shown beside the law that is used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchAndRate:
    """A batch size and a learning rate."""

    batch_tokens: float
    learning_rate: float


def batch_and_rate(scale: ModelScale) -> BatchAndRate:
    """Return the batch size and peak learning rate for a training: `0.2920·C^0.3271` tokens, `0.3118·C^-0.1250`.

    Source: DeepSeek LLM, arXiv 2401.02954, section 3.1, fitted to AdamW with a multi-step schedule on 1e17 to 2e19
    FLOPs and used there for 7 and 67 billion parameters.
    """
    return BatchAndRate(
        batch_tokens=0.2920 * scale.training_flops**0.3271, learning_rate=0.3118 * scale.training_flops**-0.1250
    )


def bisect_log(is_too_large: Callable[[float], bool], *, low: float, high: float) -> float:
    """Return the largest value between two positive ones that is not too large.

    To a relative 1e-6 if one is less than 1e7 times the other.
    """
    bottom, top = math.log(low), math.log(high)
    for _ in range(24):
        middle = (bottom + top) / 2
        if is_too_large(math.exp(middle)):
            top = middle
        else:
            bottom = middle
    return math.exp(bottom)


def _root(falling: Callable[[float], float], *, low: float, high: float) -> float:
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def _require_positive(value: float, *, what: str) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{what} must be positive and finite, not {value}")
