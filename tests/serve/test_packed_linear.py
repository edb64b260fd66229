"""Packed linear layers compute the bits of `nn.Linear`, and do not hold weights twice."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from forge.serve.packed_linear import pack_linears

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no kernels for bf16 on this CPU"
)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(576, 192), (100, 300), (33, 7)])
@torch.inference_mode()
def test_packed_linear__any_number_of_tokens__same_bits(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(*shape, bias=bias)).bfloat16()
    packed = deepcopy(plain)
    assert pack_linears(packed) == 1
    for num_tokens in (1, 4, 8, 33, 200):
        inputs = torch.randn(1, num_tokens, shape[0]).bfloat16()
        assert torch.equal(packed(inputs), plain(inputs)), num_tokens
    alone, together = inputs[:, :4], inputs[:, :64]
    assert torch.equal(packed(alone), packed(together)[:, :4])


def test_packed_linear__tied_weight__stays_for_its_other_user() -> None:
    embedding, head, other = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False), nn.Linear(8, 8)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head, other).bfloat16()
    assert pack_linears(model) == 2
    assert not embedding.weight.isnan().any()
    assert other.weight.isnan().all() and other.weight.untyped_storage().nbytes() == 2


def test_packed_linear__fp32__is_left() -> None:
    assert pack_linears(nn.Sequential(nn.Linear(4, 4))) == 0
