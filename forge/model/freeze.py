"""Freeze the parameters that `model.freeze` names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from forge.errors import ModelError


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """Turn off the gradient of every parameter that a pattern matches, or that lies below a matched name.

    A tied parameter is one parameter: freezing the input embedding freezes an output head tied to it.

    Raises: ModelError if a pattern matches nothing, or nothing is left to train.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matched = [name for name in named if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not matched:
            raise ModelError(f"{pattern!r} matches no parameter{_near(pattern, list(named))}", key="freeze")
        for name in matched:
            named[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in named.values()):
        raise ModelError("matches every parameter: nothing would be trained", key="freeze")


def _near(pattern: str, names: list[str]) -> str:
    """Suggest up to three names of parameters or modules that resemble a pattern."""
    modules = {name.rpartition(".")[0] for name in names}
    near = difflib.get_close_matches(pattern.replace("*", ""), sorted({*names, *modules}), n=3, cutoff=0.4)
    return f"; names like it are {', '.join(near)}" if near else ""
