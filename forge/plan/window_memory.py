"""Memory that sliding windows take where ranks share sequences (`forge.train.windowed_attention`).

Torch's fused attention takes a mask with as many heads of keys and values as of queries only, so both are repeated
and kept for the backward pass; the mask of a chunk is shared by all chunks and layers.
"""

from __future__ import annotations

from forge.plan.inputs import ModelInfo

WINDOW_CHUNK = 1024
"""Queries that attend the keys in reach of their windows at once. Of a window as long, half of the computed scores
are masked; with longer chunks more, with shorter ones the kernels are small."""
_ALIGNED = 16
"""Columns of the mask are a multiple of it, as fused attention copies others (`pad_bias` in torch's
`transformers/attention.cpp`)."""


def window_mask_shape(*, window: int, chunk: int = WINDOW_CHUNK) -> tuple[int, int]:
    """Return the queries and keys of a chunk's mask: the chunk, and as many keys before it as windows reach."""
    return chunk, -(-(window - 1) // _ALIGNED) * _ALIGNED + chunk


def has_windows(model: ModelInfo, *, seq_len: int) -> bool:
    """Whether any layer sees less than a whole row."""
    return model.sliding_window is not None and model.num_window_layers > 0 and seq_len > model.sliding_window


def repeated_bytes(model: ModelInfo, *, tokens: int, width: int) -> int:
    """Return the bytes of keys and values repeated for all heads, without their originals, of a layer with windows.

    Args:
        width: bytes of a value.
    """
    keys = model.attention_width * model.num_key_value_heads // max(1, model.num_attention_heads)
    return 2 * tokens * (model.attention_width - keys) * width


def window_mask_bytes(model: ModelInfo, *, width: int) -> int:
    """Return the bytes of the mask of a chunk. Args: width: bytes of a value."""
    if model.sliding_window is None:
        return 0
    num_queries, num_keys = window_mask_shape(window=model.sliding_window)
    return num_queries * num_keys * width
