"""Which attention the ranks agree on, and FlashAttention's varlen interface under packed examples.

The packages run on GPUs only. Here flash-attn's functions are computed by torch, so that everything of forge and of
transformers around them is real.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, modeling_flash_attention_utils, modeling_utils

from forge.errors import RunError
from forge.events import AttentionChosen
from forge.objective.base import ObjectiveModule
from forge.objective.causal_lm import CausalLm, is_flash
from forge.plan.speed import AttentionChoice
from forge.train import attention
from forge.train.attention import agree_on_attention
from tests.objective.test_causal_lm import packed, random_examples
from tests.objective.test_cross_entropy import VOCAB
from tests.support.ranks import RecordingReporter

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def agree(*names: str, device: torch.device = CPU) -> tuple[str | None, list[Any]]:
    reporter = RecordingReporter(None)
    choice = AttentionChoice(names=names, reason="")
    found = agree_on_attention(choice, head_size=64, device=device, reporter=reporter)
    return found, reporter.recording.events


@pytest.mark.usefixtures("alone")
def test_agree__flash_not_installed__the_next_with_an_event() -> None:
    name, events = agree("flash_attention_3", "flash_attention_2", "sdpa", device=GPU)
    assert name == "sdpa"
    reason = "not flash_attention_3: the package flash-attn-3 is not installed; "
    reason += "not flash_attention_2: the package flash-attn is not installed"
    assert events == [AttentionChosen(name="sdpa", reason=reason)]


def test_agree__nothing_to_choose__no_event() -> None:
    assert agree() == (None, [])


@pytest.mark.usefixtures("alone")
def test_agree__only_candidate_cannot_run__refused_with_the_reason() -> None:
    with pytest.raises(RunError, match="not flash_attention_2: needs a GPU; use auto"):
        agree("flash_attention_2")
    assert agree("sdpa") == ("sdpa", [])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "does not run on GPUs of compute capability 7.5"), ((8, 0), "flash-attn does not run here: ")],
)
def test_agree__package_installed__tried_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str
) -> None:
    package = replace(attention._PACKAGES["flash_attention_2"], is_installed=lambda: True)
    monkeypatch.setitem(attention._PACKAGES, "flash_attention_2", package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    _, events = agree("flash_attention_2", "sdpa", device=GPU)
    assert reason in events[0].reason


def flash_attn_func(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, **_: Any) -> Tensor:
    """Shapes: [B, T, H, D]."""
    rows = [one.transpose(1, 2) for one in (query, key, value)]
    return F.scaled_dot_product_attention(*rows, is_causal=causal, enable_gqa=True).transpose(1, 2)


def flash_attn_varlen_func(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens_q: Tensor, causal: bool = False, **_: Any
) -> Tensor:
    """Shapes: [T, H, D]."""
    parts = [
        flash_attn_func(*(one[None, start:stop] for one in (query, key, value)), causal=causal)[0]
        for start, stop in pairwise(cu_seqlens_q.tolist())
    ]
    calls.append(len(parts))
    return torch.cat(parts)


calls: list[int] = []


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have transformers find a package flash-attn."""
    module: Any = types.ModuleType("flash_attn")
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    module.flash_attn_with_kvcache = None
    padding: Any = types.ModuleType("flash_attn.bert_padding")
    padding.pad_input = padding.unpad_input = None
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    found = {"general_availability_check": lambda: True, "pkg_availability_check": lambda: True}
    matrix = modeling_flash_attention_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX
    monkeypatch.setitem(matrix, 2, matrix[2] | found)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(modeling_utils.PreTrainedModel, "_flash_attn_import_error", lambda *_, **__: None)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn"):
        monkeypatch.setattr(modeling_flash_attention_utils, name, None)


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("is_chunked", [True, False])
def test_flash__packed_rows__loss_and_gradients_of_sdpa(is_chunked: bool) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": VOCAB}
    config = AutoConfig.for_model("llama", num_attention_heads=4, num_key_value_heads=2, **sizes)
    found = {}
    for name in ("sdpa", "flash_attention_2"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
        assert is_flash(model) == (name != "sdpa")
        objective = CausalLm()
        if is_chunked:
            objective.use_chunks(model)
        module = ObjectiveModule(model, objective=objective)
        loss = module(objective.batch(packed(random_examples())))
        loss.backward()
        found[name] = [loss.detach(), *(one.grad for one in module.parameters() if one.grad is not None)]
    assert calls
    assert max(calls) > 1  # examples were kept apart by their lengths
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
