"""The built-in objectives, by the name that `training.objective` gives them.

A new objective is one file in this folder and one entry here. The configuration reads the names and metrics from
this table, so the module imports no torch: `forge.objective.build` imports the class where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Direction = Literal["min", "max"]
"""Whether smaller or larger values of a metric are better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredObjective:
    """What is known about a built-in objective before it is imported."""

    reference: str
    """`module:Class` of an `Objective`."""
    metrics: Mapping[str, Direction]
    """Every metric besides the loss; the class's `metric_directions`."""
    predicts_tokens: bool
    """Whether every target must be a token id."""


_CAUSAL_LM = RegisteredObjective(
    reference="forge.objective.causal_lm:CausalLm",
    metrics={"perplexity": "min", "router_aux_loss": "min"},
    predicts_tokens=True,
)

OBJECTIVES: dict[str, RegisteredObjective] = {
    "causal-lm": _CAUSAL_LM,
    "chat": _CAUSAL_LM,  # the next token, where `data.format: chat` has targets
}
