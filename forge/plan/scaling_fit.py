"""Fit a scaling law to small runs of one's own.

A handful of runs does not determine all five constants of `L = E + A/N^α + B/D^β`. The fit is the most probable law
given the runs and weak priors: the exponents are near the published ones, E and the two other terms are of the size
of the losses. The range of a prediction contains the uncertainty that remains; it is that of the linearised fit.
Residuals are of log losses, as in Hoffmann et al. 2022 (arXiv 2203.15556, equation 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forge.errors import PlanError
from forge.plan.scaling import BESIROGLU, ModelScale, ScalingLaw

MIN_RUNS = 3
_EXPONENT_SD = 0.1
"""Of the prior of both exponents. Published ones lie between 0.28 and 0.37: Hoffmann et al. 2022, Besiroglu et al.
2024, Muennighoff et al. 2023 (arXiv 2305.16264)."""
_TERM_SD = 1.0
"""Of the priors of ln E and of the logarithms of the two other terms at the middle of the runs."""
_TERM_SHARES = (0.4, 0.3, 0.3)
"""Shares of E and of the two other terms in the mean loss, where these priors have their mean."""
_LEAST_NOISE = 0.005
"""Relative noise of a loss that is assumed at least: seeds and the shapes of models differ by as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPoint:
    """A finished run, as a law sees it."""

    name: str
    num_parameters: int
    """Embeddings included."""
    num_tokens: int
    loss: float
    """In nats per token."""

    @property
    def scale(self) -> ModelScale:
        """Its numbers of parameters and tokens."""
        return ModelScale(num_parameters=self.num_parameters, num_tokens=self.num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutCheck:
    """What a law fitted to all other runs says about the largest one."""

    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative: predicted ÷ measured - 1."""
        return self.predicted / self.measured - 1


def fit_law(points: Sequence[RunPoint]) -> ScalingLaw:
    """Return the most probable law.

    Raises: PlanError if there are fewer than 3 runs, or if all have one size and one number of tokens.
    """
    from scipy.optimize import least_squares

    _require_enough(points)
    log_n = np.log([point.num_parameters for point in points])
    log_d = np.log([point.num_tokens for point in points])
    log_loss = np.log([point.loss for point in points])
    middle_n, middle_d = log_n.mean(), log_d.mean()
    mean_loss = float(np.exp(log_loss.mean()))
    prior = np.array(
        [
            *(math.log(share * mean_loss) for share in _TERM_SHARES),
            BESIROGLU.parameter_exponent,
            BESIROGLU.token_exponent,
        ]
    )
    prior_sd = np.array([_TERM_SD] * 3 + [_EXPONENT_SD] * 2)

    def residuals(values: np.ndarray, noise: float) -> np.ndarray:
        log_e, log_a, log_b, alpha, beta = values
        terms = np.exp(log_a - alpha * (log_n - middle_n)) + np.exp(log_b - beta * (log_d - middle_d))
        misfit = np.log(np.exp(log_e) + terms) - log_loss
        return np.concatenate([misfit / noise, (values - prior) / prior_sd])

    noise = _LEAST_NOISE
    for _ in range(3):  # the noise is that of the residuals, which depend on it a little through the prior
        best = least_squares(residuals, prior, args=(noise,), x_scale=prior_sd)
        misfit = best.fun[: len(points)] * noise
        noise = max(_LEAST_NOISE, float(np.sqrt(np.sum(misfit**2) / max(1, len(points) - 3))))
    covariance = np.linalg.inv(best.jac.T @ best.jac)
    log_e, log_a, log_b, alpha, beta = best.x
    # From (ln E, ln of the terms at the middle, exponents) to (E, ln A, α, ln B, β).
    change = np.array(
        [
            [math.exp(log_e), 0, 0, 0, 0],
            [0, 1, 0, middle_n, 0],
            [0, 0, 0, 1, 0],
            [0, 0, 1, 0, middle_d],
            [0, 0, 0, 0, 1],
        ]
    )
    return ScalingLaw(
        name="your runs",
        irreducible_loss=math.exp(log_e),
        parameter_factor=math.exp(log_a + alpha * middle_n),
        parameter_exponent=float(alpha),
        token_factor=math.exp(log_b + beta * middle_d),
        token_exponent=float(beta),
        loss_sd=noise * min(point.loss for point in points),
        covariance=tuple(tuple(row) for row in (change @ covariance @ change.T).tolist()),
    )


def check_held_out(points: Sequence[RunPoint]) -> HeldOutCheck | None:
    """Fit all runs but the one with the most FLOPs, and predict that; None if too few remain."""
    ordered = sorted(points, key=lambda point: point.scale.training_flops)
    others, largest = ordered[:-1], ordered[-1]
    try:
        law = fit_law(others)
    except PlanError:
        return None
    return HeldOutCheck(name=largest.name, predicted=law.loss(largest.scale), measured=largest.loss)


def next_scale(points: Sequence[RunPoint]) -> ModelScale:
    """Return the next step of the ladder: both numbers of the largest run, times the ratio to the one before it.

    At least twice the parameters; the tokens grow in proportion to them if they did not grow.
    """
    ordered = sorted(points, key=lambda point: point.scale.training_flops)
    before, largest = ordered[-2], ordered[-1]
    growth = max(2.0, largest.num_parameters / before.num_parameters)
    more_tokens = largest.num_tokens / before.num_tokens
    return ModelScale(
        num_parameters=largest.num_parameters * growth,
        num_tokens=largest.num_tokens * (more_tokens if more_tokens > 1 else growth),
    )


def fit_warnings(points: Sequence[RunPoint]) -> tuple[str, ...]:
    """Say what the runs do not determine."""
    warnings = []
    log_n = np.log([point.num_parameters for point in points])
    log_d = np.log([point.num_tokens for point in points])
    if np.ptp(log_n) == 0 or np.ptp(log_d) == 0:
        same = "parameters" if np.ptp(log_n) == 0 else "tokens"
        warnings.append(f"all runs have one number of {same}: its exponent is the published one, not fitted")
    elif abs(np.corrcoef(log_n, log_d)[0, 1]) > 0.98:
        warnings.append(
            "parameters and tokens grow together in these runs, which does not tell their effects apart: "
            "predictions hold along this line, and the best ratio of tokens to parameters is uncertain"
        )
    if len(points) < 5:
        warnings.append(f"{len(points)} runs do not determine the exponents, which stay near the published ones")
    return tuple(warnings)


def _require_enough(points: Sequence[RunPoint]) -> None:
    if len(points) < MIN_RUNS:
        raise PlanError(f"a law needs at least {MIN_RUNS} finished runs, better 5 or more; there are {len(points)}")
    if len({(point.num_parameters, point.num_tokens) for point in points}) == 1:
        raise PlanError("all runs have one size and one number of tokens; a law needs runs that differ")
