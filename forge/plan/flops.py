"""Floating-point operations that training needs per token; the numerator of MFU.

MFU (model FLOPs utilisation) is defined as in PaLM (arXiv 2204.02311, appendix B): the operations that the forward
and backward pass require, recomputation not counted, divided by the hardware's peak in the same time.
"""

from __future__ import annotations

from forge.plan.inputs import ModelInfo


def flops_per_token(model: ModelInfo, *, seq_len: int) -> int:
    """Return the FLOPs of forward and backward per predicted token: `6·N - 2·F + 12·L·H·Q·T`.

    N is the number of parameters that each token is multiplied with (not the input embedding, which is a look-up),
    F those of them that are frozen, whose own gradient is not computed, L the number of layers, H·Q the width of
    all attention heads, T the sequence length in tokens. Attention is counted as if it were not causal, as in the
    paper.

    Source: PaLM, arXiv 2204.02311, appendix B.
    """
    products = 6 * model.num_matmul_parameters - 2 * model.num_frozen_matmul_parameters
    return products + 12 * model.num_layers * model.attention_width * seq_len
