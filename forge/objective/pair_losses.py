"""Losses of preference pairs, each of its pair alone: means over a batch would depend on how it is divided.

Source: the papers named in `forge.config.preference`, in the form that trl gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRatios:
    """Log of the policy's probability of each answer over the reference's.

    Shapes: float32[p], of p pairs; lengths: tokens of the answers.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @property
    def difference(self) -> Tensor:
        return self.chosen - self.rejected

    @property
    def mean_difference(self) -> Tensor:
        """Of the means per token."""
        return self.chosen / self.chosen_lengths - self.rejected / self.rejected_lengths


def _sigmoid(ratios: LogRatios, beta: float, smoothing: float) -> Tensor:
    logits = beta * ratios.difference
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def _robust(ratios: LogRatios, beta: float, smoothing: float) -> Tensor:
    logits = beta * ratios.difference
    corrected = -(1 - smoothing) * F.logsigmoid(logits) + smoothing * F.logsigmoid(-logits)
    return corrected / (1 - 2 * smoothing)


def _nca_pair(ratios: LogRatios, beta: float, smoothing: float) -> Tensor:
    chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


PAIR_LOSSES: Mapping[str, Callable[[LogRatios, float, float], Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": lambda ratios, beta, _: -F.logsigmoid(beta * ratios.mean_difference),
    "hinge": lambda ratios, beta, _: torch.relu(1 - beta * ratios.difference),
    "ipo": lambda ratios, beta, _: (ratios.mean_difference - 1 / (2 * beta)) ** 2,
    "robust": _robust,
    "nca_pair": _nca_pair,
    "apo_zero": lambda ratios, beta, _: (
        1 - torch.sigmoid(beta * ratios.chosen) + torch.sigmoid(beta * ratios.rejected)
    ),
    "apo_down": lambda ratios, beta, _: (
        torch.sigmoid(beta * ratios.chosen) + 1 - torch.sigmoid(beta * ratios.difference)
    ),
}
"""By the name of `training.dpo.loss`: of log ratios, β and label smoothing, float32[p]."""


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Log of the odds of the chosen answer over those of the rejected one, of mean log-probabilities per token.

    Source: Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691,
    equation 4.
    """
    return (chosen - rejected) - (_log_1m_exp(chosen) - _log_1m_exp(rejected))


def _log_1m_exp(values: Tensor) -> Tensor:
    """`log(1 - exp(x))` for x < 0; of a certain answer, x = 0, that of the nearest smaller float32.

    Source: M. Mächler, "Accurately computing log(1 - exp(-|a|))", 2012.
    """
    values = values.clamp(max=-(2.0**-24))
    # Each branch gets values that it can differentiate, as `where` would pass on a nan of the other.
    is_near = values > -0.6931
    near = torch.log(-torch.expm1(torch.where(is_near, values, -0.5)))
    return torch.where(is_near, near, torch.log1p(-torch.exp(torch.where(is_near, -1.0, values))))
