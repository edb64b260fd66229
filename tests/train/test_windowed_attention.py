"""Sliding windows in chunks of queries: the values of a mask of all pairs, without one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from forge.plan.memory import activation_bytes
from forge.plan.window_memory import window_mask_shape
from forge.train.windowed_attention import windowed_attention
from tests.support.jobs import tiny_facts, tiny_job


def inputs(*, length: int, dtype: torch.dtype = torch.float64, rows: int = 2) -> list[Tensor]:
    """Queries of four heads, keys and values of two."""
    torch.manual_seed(0)
    return [torch.randn(rows, heads, length, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]


def masked(query: Tensor, key: Tensor, value: Tensor, *, window: int) -> Tensor:
    """The same with a mask of all pairs."""
    places = torch.arange(query.shape[2])
    distance = places[:, None] - places
    repeated = (one.repeat_interleave(2, dim=1) for one in (key, value))
    mask = (distance >= 0) & (distance < window)
    return scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3).transpose(1, 2)


@pytest.mark.parametrize(("window", "chunk"), [(1, 16), (17, 16), (50, 16), (50, 1024)])
def test_windowed_attention__any_window_and_chunk__is_that_of_a_mask_of_all_pairs(window: int, chunk: int) -> None:
    given = inputs(length=101)
    expected, found = (
        masked(*given, window=window),
        windowed_attention(*given, scaling=0.3, window=window, chunk=chunk),
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((one * weights).sum(), given) for one in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Noted(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made, and the names of operations."""

    num_bytes = 0
    names: Counter[str]

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.names[operation.name()] += 1
        for one in result if isinstance(result, tuple) else (result,):
            if isinstance(one, Tensor):
                self.num_bytes = max(self.num_bytes, one.untyped_storage().nbytes())
        return result


def test_windowed_attention__long_sequence__makes_no_tensor_of_all_pairs() -> None:
    given = inputs(length=1024, rows=1, dtype=torch.float32)
    with Noted() as noted:
        noted.names = Counter()
        windowed_attention(*given, scaling=None, window=32, chunk=128).sum().backward()
    assert noted.num_bytes == 4 * 1024 * 4 * 8  # of all heads, in fp32; a mask of all pairs takes 1 MiB
    # The gradients of overlapping parts of keys and values are added into one tensor each.
    assert noted.names["aten::new_zeros"] == 2
    assert noted.names["aten::slice_backward"] == 0


def test_activation_bytes__sliding_window__counts_what_attention_keeps() -> None:
    job, length = tiny_job(), 2048
    sizes: dict[str, Any] = {"attention_width": 64, "num_attention_heads": 8, "num_key_value_heads": 4}

    def counted(window: int | None, **changes: Any) -> int:
        facts = tiny_facts(**sizes, sliding_window=window, num_window_layers=1 if window else 0)
        training = job.training.model_copy(update={"precision": "fp32"} | changes)
        return activation_bytes(
            facts, training, micro_batch_size=1, seq_len=length, is_on_host=False, sequence_parallel_size=2
        )

    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    # Rank's part of the heads: half.
    query, key, value = (torch.randn(1, heads, length, 8, requires_grad=True) for heads in (4, 2, 2))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = windowed_attention(query, key, value, scaling=None, window=32)
    fused = sum(one.numel() for one in (query, key, value, out)) * 4 + 4 * length * 4  # and a sum for each row
    mask = 4 * window_mask_shape(window=32)[0] * window_mask_shape(window=32)[1]
    assert sum(kept.values()) == fused + (counted(32) - counted(None))
    assert counted(32) - counted(None) == 4 * length * 8 * 4 + mask
    assert counted(length) == counted(None)
    # One of the two layers is computed again at a time.
    again = {"activation_checkpointing": True}
    assert counted(32, **again) - counted(None, **again) == 4 * length * 8 * 4 + mask
