"""One trial of `benchmarks.tune` as people write it: torch, transformers, and no more.

The tokens are those that forge prepared, in its order; the first weights are those that forge draws, read from a
file. What is fastest on CPU is taken for this size, as forge does by itself: plain attention and the fused AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.peers.ray_tune import record
from forge.data.cache_index import read_index
from forge.data.order import SampleOrder
from forge.data.store import TokenStream

_HELD_OUT_ROWS = 32


def train(request: dict[str, Any], *, lr: float, report: Callable[[dict[str, float]], None]) -> None:
    """All steps of one trial; the held-out loss is reported every few of them, and at the end.

    Args:
        request: as in `benchmarks.peers.ray_tune`.
    """
    torch.set_num_threads(1)
    model = build_model(request)
    optimizer = build_optimizer(model, request)
    index, folder = read_index(Path(request["corpus"])), Path(request["corpus"])
    tokens = TokenStream(folder=folder, entries=index.train, dtype=index.dtype)
    held_out = TokenStream(folder=folder, entries=index.held_out, dtype=index.dtype)
    order = SampleOrder(num_samples=tokens.num_sequences(request["seq_len"]), seed=request["data_seed"])
    rows = request["global_batch_size"]
    for step in range(1, request["total_steps"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step, request, peak=lr)
        chosen = order.samples(np.arange((step - 1) * rows, step * rows, dtype=np.int64))
        loss_of(model, tokens.read(chosen, request["seq_len"])).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), request["grad_clip"])
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            record(request, stepped=lr)
        if step % request["evaluate_every"] == 0 or step == request["total_steps"]:
            report({"step": step, "held_out_loss": evaluate(model, held_out, request)})


def build_model(request: dict[str, Any]) -> Any:
    """The network, with the weights that every contender begins with."""
    config = AutoConfig.for_model(
        **request["model"], vocab_size=request["vocab_size"], max_position_embeddings=request["seq_len"]
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.load_state_dict(load_file(request["first_weights"]))
    return model.train()


def build_optimizer(model: Any, request: dict[str, Any]) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": request["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=tuple(request["betas"]), eps=request["eps"], fused=True)


def rate_of(step: int, request: dict[str, Any], *, peak: float) -> float:
    """A linear warm-up, then half a cosine down to a fraction of the peak."""
    warm_up: int = request["warmup_steps"]
    fraction: float = request["final_fraction"]
    if step <= warm_up:
        return peak * step / warm_up
    done: float = (step - warm_up) / (request["total_steps"] - warm_up)
    return peak * (fraction + (1 - fraction) * (1 + math.cos(math.pi * done)) / 2)


def loss_of(model: Any, windows: np.ndarray[Any, Any], *, reduction: str = "mean") -> Tensor:
    """Cross entropy of each window's next tokens. Shapes: `windows: int64[B, T + 1]`."""
    rows = torch.from_numpy(windows)
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)


@torch.inference_mode()
def evaluate(model: Any, held_out: TokenStream, request: dict[str, Any]) -> float:
    """Mean cross entropy over all held-out sequences."""
    model.eval()
    total: float = sum(
        loss_of(model, rows, reduction="sum").item() for rows in all_rows(held_out, request["seq_len"])
    )
    model.train()
    return total / float(held_out.num_sequences(request["seq_len"]) * request["seq_len"])


def all_rows(held_out: TokenStream, seq_len: int) -> Iterator[np.ndarray[Any, Any]]:
    """Every held-out window, some at a time."""
    num_rows = held_out.num_sequences(seq_len)
    for first in range(0, num_rows, _HELD_OUT_ROWS):
        yield held_out.read(np.arange(first, min(first + _HELD_OUT_ROWS, num_rows)), seq_len)
