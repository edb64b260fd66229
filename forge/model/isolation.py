"""Whether a model keeps the examples that share a row apart (`data.packing: examples`).

A model finds the examples in `position_ids`, which restart at each of them. The inspection of a model checks this
for the plan, and the objective checks it in the workers.
"""

from __future__ import annotations

import inspect
import sys

from torch import nn
from transformers import PreTrainedModel

from forge.errors import PlanError


def isolation_problem(model: nn.Module) -> str | None:
    """Return why an example would see the others in its row, such as "TinyMixer takes no position_ids".

    Only the class is examined, so the model may be on the meta device.

    Returns: None if each example sees only itself.
    """
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{name} takes no position_ids"
    names = vars(sys.modules[type(model).__module__])
    # Masks of transformers' masking_utils honour positions that restart; a model's own masks may not.
    is_known = any(name in names for name in ("create_causal_mask", "create_masks_for_generate"))
    if isinstance(model, PreTrainedModel) and not is_known:
        return f"{name} does not separate examples by position_ids"
    return None


def require_isolation(model: nn.Module) -> None:
    """Raises: PlanError if the model would let an example see the others in its row."""
    problem = isolation_problem(model)
    if problem is not None:
        raise PlanError(f"{problem}, so the examples of a sequence would see each other; use data.packing: none")
