"""Examples that share a row are learnt from as if each were alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.errors import PlanError
from forge.model.isolation import isolation_problem
from forge.objective import causal_lm
from forge.objective.base import IGNORED, ObjectiveModule
from forge.objective.causal_lm import CausalLm
from tests.objective.test_cross_entropy import VOCAB, tiny_model

SEQ_LEN = 24


def random_examples() -> list[list[dict[str, np.ndarray[Any, Any]]]]:
    """Three rows of several examples; a few targets of each are masked, as in a prompt."""
    rng = np.random.default_rng(3)
    rows = []
    for lengths in ([7, 9, 8], [1, 20], [5, 4, 3]):
        row = []
        for length in lengths:
            ids = rng.integers(0, VOCAB, size=length + 1)
            targets = ids[1:].copy()
            targets[: length // 3] = IGNORED
            row.append({"tokens": ids[:-1], "targets": targets})
        rows.append(row)
    return rows


def packed(rows: list[list[dict[str, np.ndarray[Any, Any]]]]) -> dict[str, np.ndarray[Any, Any]]:
    arrays = {
        name: np.zeros((len(rows), SEQ_LEN), dtype=np.int64) for name in ("tokens", "position_ids", "segment_ids")
    }
    arrays["targets"] = np.full((len(rows), SEQ_LEN), IGNORED)
    for i, row in enumerate(rows):
        at = 0
        for number, example in enumerate(row, start=1):
            end = at + len(example["tokens"])
            arrays["tokens"][i, at:end], arrays["targets"][i, at:end] = example["tokens"], example["targets"]
            arrays["position_ids"][i, at:end] = np.arange(end - at)
            arrays["segment_ids"][i, at:end] = number
            at = end
    return arrays


def alone(example: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: values[None] for name, values in example.items()}


def module_of(architecture: str, *, attention: str, chunked: bool, **keys: object) -> ObjectiveModule:
    model = tiny_model(architecture, **keys)
    model.set_attn_implementation(attention)
    objective = CausalLm()
    if chunked:
        objective.use_chunks(model)
    return ObjectiveModule(model, objective=objective)


def loss_and_gradients(module: ObjectiveModule, batches: list[dict[str, Any]]) -> tuple[float, dict[str, Tensor]]:
    module = copy.deepcopy(module)
    if module.objective._is_chunked:  # type: ignore[attr-defined]
        module.objective.use_chunks(module.model)  # type: ignore[attr-defined]
    total = sum(module(module.objective.batch(rows)) for rows in batches)
    assert isinstance(total, Tensor)
    total.backward()
    return total.item(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("mistral", {"sliding_window": 4, "num_key_value_heads": 1}),
        ("qwen2", {"num_key_value_heads": 1}),
    ],
)
def test_loss__packed_rows__equals_the_sum_over_each_example_alone(
    architecture: str, keys: dict[str, object], attention: str, chunked: bool
) -> None:
    module = module_of(architecture, attention=attention, chunked=chunked, **keys)
    rows = random_examples()
    together, gradients = loss_and_gradients(module, [packed(rows)])
    apart, expected = loss_and_gradients(module, [alone(example) for row in rows for example in row])
    assert together == pytest.approx(apart, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_logits__packed_rows__equal_those_of_each_example_alone(architecture: str, attention: str) -> None:
    model = tiny_model(architecture)
    model.set_attn_implementation(attention)
    rows = random_examples()
    arrays = packed(rows)
    with torch.no_grad():
        ids, positions = torch.from_numpy(arrays["tokens"]), torch.from_numpy(arrays["position_ids"])
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        for i, row in enumerate(rows):
            for number, example in enumerate(row, start=1):
                expected = model(input_ids=torch.from_numpy(example["tokens"][None])).logits[0]
                inside = torch.from_numpy(arrays["segment_ids"][i] == number)
                torch.testing.assert_close(together[i][inside], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunked", [True, False])
def test_loss__rows_joined_for_flash_attention__is_the_same(monkeypatch: pytest.MonkeyPatch, chunked: bool) -> None:
    module = module_of("llama", attention="sdpa", chunked=chunked)
    rows = module.objective.batch(packed(random_examples()))
    expected = module(rows)
    monkeypatch.setattr(causal_lm, "is_flash", lambda model: True)
    torch.testing.assert_close(module(rows), expected)


def test_batch__one_example_per_row__needs_no_mask() -> None:
    rows = packed([[example] for row in random_examples() for example in row])
    assert set(CausalLm().batch(rows)) == {"tokens", "targets", "segment_ids"}  # no position_ids
    module = module_of("llama", attention="sdpa", chunked=True)
    padded, _ = loss_and_gradients(module, [rows])
    apart, _ = loss_and_gradients(module, [alone(example) for row in random_examples() for example in row])
    assert padded == pytest.approx(apart, rel=1e-5)


class NoPositions(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.zeros(*input_ids.shape, VOCAB)


class OwnMask(PreTrainedModel):
    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return input_ids + position_ids


@pytest.mark.parametrize(
    ("model", "reason"),
    [(NoPositions(), "takes no position_ids"), (OwnMask(), "does not separate examples by position_ids")],
)
def test_loss__a_model_that_cannot_separate_examples__is_refused(model: nn.Module, reason: str) -> None:
    module = ObjectiveModule(model, objective=CausalLm())
    with pytest.raises(PlanError, match=rf"{type(model).__name__} {reason}.*use data\.packing: none"):
        module(module.objective.batch(packed(random_examples())))
    assert isolation_problem(model) == f"{type(model).__name__} {reason}"


def test_derived__perplexity__is_exp_of_the_loss_and_infinite_on_overflow() -> None:
    assert CausalLm().derived({"loss": 1.0})["perplexity"] == pytest.approx(2.718281828)
    assert CausalLm().derived({"loss": 1e4})["perplexity"] == float("inf")
