"""Which linear layers compute in fp8: those of the repeated layers that the hardware accepts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from forge.model.fp8_layers import FoundFp8Layers, find_fp8_layers

LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def found_in(name: str, **sizes: Any) -> FoundFp8Layers:
    with torch.device("meta"):
        return find_fp8_layers(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=64, **sizes)))


def test_find__llama__products_of_layers_without_the_head() -> None:
    found = found_in("llama", **LLAMA)
    assert found.info.num_layers == len(found.names) == 14
    assert found.info.num_parameters == 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert found.info.left_out == {}
    assert all(name.startswith("model.layers.") for name in found.names)


@pytest.mark.parametrize(
    ("name", "sizes", "num_layers", "left_out"),
    [
        ("llama", LLAMA | {"intermediate_size": 72}, 8, {"of sizes that are no multiples of 16": 6}),
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2}, 0, {}),
        (
            "afmoe",
            LLAMA | {"num_experts": 16, "num_dense_layers": 0, "num_key_value_heads": 2, "head_dim": 16},
            16,
            {"that route to experts": 2},
        ),
        ("jetmoe", LLAMA | {"num_local_experts": 16, "kv_channels": 16}, 2, {"that route to experts": 4}),
    ],
)  # fmt: skip
def test_find__layers_that_cannot__are_counted_by_reason(
    name: str, sizes: dict[str, Any], num_layers: int, left_out: dict[str, int]
) -> None:
    found = found_in(name, **sizes)
    assert (found.info.num_layers, found.info.left_out) == (num_layers, left_out)


def test_find__class_of_the_user__lists_of_modules_but_not_frozen_or_other_classes() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Module()
    blocks = (nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 16), Own(16, 16)]) for _ in range(2))
    model.layers = nn.ModuleList(nn.Sequential(*block) for block in blocks)
    model.head = nn.Linear(16, 16)
    model.layers[0][1].weight.requires_grad = False  # type: ignore[index]
    found = find_fp8_layers(model)
    assert found.names == {"layers.0.0", "layers.1.0", "layers.1.1"}
    assert found.info.left_out == {"that are frozen": 1, "of the class Own": 2}
