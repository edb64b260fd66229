"""Freeze the parameters that `model.freeze` names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from forge.config.parameter_names import matching, near
from forge.errors import ModelError


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """Turn off the gradient of every parameter that a pattern matches, or that lies below a matched name.

    A tied parameter is one parameter: freezing the input embedding freezes an output head tied to it.

    Raises: ModelError if a pattern matches nothing, or nothing is left to train.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matched = matching(pattern, named)
        if not matched:
            raise ModelError(f"{pattern!r} matches no parameter{near(pattern, named)}", key="freeze")
        for name in matched:
            named[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in named.values()):
        raise ModelError("matches every parameter: nothing would be trained", key="freeze")
