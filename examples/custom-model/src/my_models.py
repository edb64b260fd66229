"""A small language model without attention: a causal variant of MLP-Mixer (arXiv 2105.01601)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TinyMixer(nn.Module):
    """Token and channel mixing in turns; position t sees positions up to t only.

    Args:
        vocab_size, seq_len: given by forge from the data.
        width, depth: keys of the job's `model:` section.
    """

    def __init__(self, *, vocab_size: int, seq_len: int, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.num_layers, self.hidden_size = depth, width  # shown in the plan
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(seq_len=seq_len, width=width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Shapes: input_ids: int64[B, T], T <= seq_len; returns logits float[B, T, vocab_size]."""
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class Block(nn.Module):
    """One learned weight per pair of positions (t, s <= t), then an MLP per position."""

    def __init__(self, *, seq_len: int, width: int) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(seq_len, seq_len) / seq_len**0.5)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        length = hidden.shape[1]
        mixing = self.mixing[:length, :length].tril()
        hidden = hidden + mixing @ self.norms[0](hidden)
        return hidden + self.mlp(self.norms[1](hidden))
