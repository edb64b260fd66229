"""Whether a model maps hidden states to logits position by position, so that only some positions need logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from forge.model.look_ahead import NUM_TOKENS, probe_sequences, small_copy
from forge.objective.registry import AutoClass

_TOLERANCE = 1e-4
"""Relative to the largest logit: products of other sizes round differently."""


@torch.no_grad()
def has_positionwise_head(config: PretrainedConfig, *, seq_len: int, auto_class: AutoClass) -> bool:
    """Whether logits of chosen positions are the same if the head is given only these.

    A small random copy is run both ways, as in `forge.model.look_ahead`; a model of which none can be run counts as
    not position-wise.
    """
    where = torch.arange(1, 2 * NUM_TOKENS, 3)
    for is_narrow in (True, False):
        model = small_copy(config, seq_len=seq_len, is_narrow=is_narrow, auto_class=auto_class)
        if model is None:
            continue
        try:
            tokens = probe_sequences(model.config)
            whole = model(input_ids=tokens).logits.flatten(0, 1)[where]
            with selected_positions(model, where):
                chosen = model(input_ids=tokens).logits.flatten(0, 1)
        except Exception:  # whatever it is; of a narrow copy, its sizes may not fit together
            continue
        tolerance = _TOLERANCE * float(whole.abs().max())
        return chosen.shape == whole.shape and torch.allclose(chosen, whole, atol=tolerance)
    return False


@contextmanager
def selected_positions(model: Any, where: Tensor) -> Iterator[None]:
    """Give the head of a model only some positions of its base model's last hidden state.

    Shapes: where: int64[k], positions of the flattened batch; the head is given float[1, k, H].
    """

    def select(module: nn.Module, arguments: Any, output: Any) -> Any:
        output["last_hidden_state"] = output[0].flatten(0, 1)[where].unsqueeze(0)
        return output

    handle = model.base_model.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits of last hidden states, by all that a model does to them after its base model.

    Shapes: hidden: [k, H]; result: float32[k, V].
    """
    base = model.base_model
    base.forward = lambda *arguments, **options: BaseModelOutputWithPast(last_hidden_state=hidden[None])
    try:
        logits: Tensor = model(input_ids=torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)).logits
    finally:
        del base.forward  # which restores that of the class
    return logits[0].float()
