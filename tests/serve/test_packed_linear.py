"""Packed linear layers compute the bits of `nn.Linear`, and do not hold weights twice."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

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
    assert len(pack_linears(packed)) == 1
    for num_tokens in (1, 4, 8, 33, 200):
        inputs = torch.randn(1, num_tokens, shape[0]).bfloat16()
        assert torch.equal(packed(inputs), plain(inputs)), num_tokens
    alone, together = inputs[:, :4], inputs[:, :64]
    assert torch.equal(packed(alone), packed(together)[:, :4])


def test_packed_linear__tied_weight__stays_for_its_other_user() -> None:
    embedding, head, other = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False), nn.Linear(8, 8)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head, other).bfloat16()
    assert len(pack_linears(model)) == 2
    assert not embedding.weight.isnan().any()
    assert other.weight.isnan().all() and other.weight.untyped_storage().nbytes() == 2


def test_packed_linear__fp32__is_left() -> None:
    assert not pack_linears(nn.Sequential(nn.Linear(4, 4)))


class Attention(nn.Module):
    """Three layers that read the same tensor, and one that does not."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(96, size) for size in (width, 64, 64))
        self.o_proj = nn.Linear(96, 64)

    def forward(self, inputs: Tensor) -> list[Tensor]:
        return [layer(inputs) for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj)]


@pytest.mark.parametrize(("width", "num_products"), [(192, 2), (100, 4)])
@torch.inference_mode()
def test_packed_linear__siblings_of_one_input__are_one_product_of_the_same_bits(
    width: int, num_products: int
) -> None:
    torch.manual_seed(0)
    plain = Attention(width=width).bfloat16()
    packed = deepcopy(plain)
    assert len(pack_linears(packed)) == num_products
    for num_tokens in (1, 4, 33):
        inputs = torch.randn(1, num_tokens, 96).bfloat16()
        assert all(map(torch.equal, packed(inputs), plain(inputs))), num_tokens
    other = torch.randn(1, 33, 96).bfloat16()
    assert torch.equal(packed.k_proj(other), plain.k_proj(other)), "alone, and before the first layer"
    assert torch.equal(packed.q_proj(inputs), plain.q_proj(inputs)), "another tensor"
    assert torch.equal(packed.q_proj(inputs), plain.q_proj(inputs)), "the same layer again"
