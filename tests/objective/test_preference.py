"""Objectives on preference pairs: the same result however the pairs are laid out, and the published formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from forge.checkpoint.adapter_config import AdapterConfig
from forge.errors import RunError
from forge.model.adapters import add_adapters
from forge.objective.base import ObjectiveContext, ObjectiveModule
from forge.objective.build import build_objective
from forge.objective.pair_losses import PAIR_LOSSES, log_odds_ratio
from forge.objective.pairs import REFERENCE_LOG_PROBS
from tests.support.objectives import context_of
from tests.support.pairs import PAIRS, rows_of

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def llama(seed: int = 0, **keys: Any) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **(SIZES | keys))).eval()


def objective_of(folder: Path, name: str, *, is_packed: bool = True, reference: Any = None, **training: Any) -> Any:
    made = context_of(folder, objective=name, **training)
    context = ObjectiveContext(
        training=made.training, tokenizer=folder, keeps_examples_apart=is_packed, reference=reference
    )
    return build_objective(name, context=context)


def answer_log_probs(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Log-probabilities of an answer's tokens, of one unpadded sequence."""
    ids = torch.tensor([prompt + answer])
    found = model(input_ids=ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return found[torch.arange(len(answer)), torch.tensor(answer)]


def with_reference(rows: dict[str, Any], reference: Any) -> dict[str, Any]:
    """Add the log-probabilities of a reference model to rows of PAIRS."""
    values = np.zeros(rows["tokens"].shape, dtype=np.float32)
    at = 0
    for pair in PAIRS:
        for prompt, answer in pair:
            stop = at + len(prompt) + len(answer) - 1
            with torch.no_grad():
                values[0, stop - len(answer) : stop] = answer_log_probs(reference, prompt, answer).numpy()
            at = stop
    return {**rows, REFERENCE_LOG_PROBS: values}


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def plain_dpo(model: Any, reference: Any, *, beta: float) -> Tensor:
    """Summed over PAIRS, after Rafailov et al., equation 7."""
    total = torch.zeros(())
    for (prompt, chosen), (_, rejected) in PAIRS:
        with torch.no_grad():
            expected = answer_log_probs(reference, prompt, chosen).sum()
            expected -= answer_log_probs(reference, prompt, rejected).sum()
        found = answer_log_probs(model, prompt, chosen).sum() - answer_log_probs(model, prompt, rejected).sum()
        total = total - F.logsigmoid(beta * (found - expected))
    return total


@pytest.mark.parametrize(("is_packed", "is_chunked"), [(True, True), (True, False), (False, True), (False, False)])
def test_dpo__every_layout__is_the_loss_and_gradient_of_single_unpadded_sequences(
    tmp_path: Path, is_packed: bool, is_chunked: bool
) -> None:
    model, reference = llama(0), llama(1)
    expected = plain_dpo(model, reference, beta=0.3)
    wanted = gradients(model, expected)
    objective = objective_of(tmp_path, "dpo", is_packed=is_packed, dpo={"beta": 0.3})
    if is_chunked:
        objective.use_chunks(model)
    batch = objective.batch(with_reference(rows_of(*PAIRS), reference))
    found = objective.loss(model, batch)
    assert found.weight == 3 and ("sequence_rows" in batch) is not is_packed
    torch.testing.assert_close(found.sum, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model, found.sum).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)
    metrics = {name: float(one.sum) / 3 for name, one in found.metrics.items()}
    assert metrics["rewards_margin"] == pytest.approx(metrics["rewards_chosen"] - metrics["rewards_rejected"])
    assert metrics["accuracy"] in (0, 1 / 3, 2 / 3, 1) and set(metrics) == set(objective.metric_directions) - {
        "router_aux_loss"
    }


def test_dpo__reference_held_beside__is_the_loss_and_the_gradient_of_the_stored_one(tmp_path: Path) -> None:
    model, reference = llama(0), llama(1)
    stored = objective_of(tmp_path, "dpo", dpo={"beta": 0.3})
    expected = stored.loss(model, stored.batch(with_reference(rows_of(*PAIRS), reference)))
    wanted = gradients(model, expected.sum)
    for is_packed, is_chunked in ((True, True), (False, False)):
        settings = {"beta": 0.3, "reference": "live"}
        held = llama(1).requires_grad_(False)
        live = objective_of(tmp_path, "dpo", is_packed=is_packed, reference=held, dpo=settings)
        if is_chunked:
            live.use_chunks(model)
        batch = live.batch(rows_of(*PAIRS))
        found = live.loss(model, batch)
        assert "reference" not in batch and len(list(ObjectiveModule(model, objective=live).parameters())) == len(
            wanted
        )
        torch.testing.assert_close(found.sum, expected.sum, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients(model, found.sum).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)


def test_dpo__live_reference_of_adapters__is_the_loss_against_the_base_and_trains_only_the_adapters(
    tmp_path: Path,
) -> None:
    base, model = llama(0), llama(0)
    names = tuple(f"model.layers.{i}.self_attn.{kind}_proj" for i in (0, 1) for kind in "qv")
    config = AdapterConfig(
        rank=2, alpha=4, dropout=0, use_dora=False, use_rslora=False, modules=names, parameters=()
    )
    add_adapters(model, config)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    off = objective_of(tmp_path, "dpo", dpo={"reference": "live"})
    found = off.loss(model, off.batch(rows_of(*PAIRS)))
    beforehand = objective_of(tmp_path, "dpo")
    expected = beforehand.loss(model, beforehand.batch(with_reference(rows_of(*PAIRS), base)))
    assert abs(float(expected.sum) - 3 * math.log(2)) > 1e-3
    torch.testing.assert_close(found.sum, expected.sum, rtol=1e-5, atol=1e-6)
    found.sum.backward()
    assert all((p.grad is not None) is (".lora_" in name) for name, p in model.named_parameters())


def test_orpo__a_pair__is_the_cross_entropy_of_transformers_and_the_odds_ratio(tmp_path: Path) -> None:
    model = llama()
    objective = objective_of(tmp_path, "orpo", orpo={"beta": 0.4})
    objective.use_chunks(model)
    (prompt, chosen), (_, rejected) = PAIRS[0]
    ids = torch.tensor([prompt + chosen])
    labels = ids.clone()
    labels[0, : len(prompt)] = -100
    nll = llama()(input_ids=ids, labels=labels).loss
    odds = []
    for answer in (chosen, rejected):
        likelihood = answer_log_probs(llama(), prompt, answer).mean().exp()
        odds.append(likelihood / (1 - likelihood))
    expected = nll - 0.4 * F.logsigmoid((odds[0] / odds[1]).log())
    found = objective.loss(model, objective.batch(rows_of(PAIRS[0])))
    torch.testing.assert_close(found.sum, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.metrics["nll"].sum, nll, rtol=1e-4, atol=1e-5)


def test_log_odds_ratio__certain_and_unlikely_answers__is_finite_with_a_gradient() -> None:
    values = torch.tensor([0.0, -1e-9, -1e-3, -0.6931, -0.7, -50.0, -500.0], requires_grad=True)
    found = log_odds_ratio(values, values.detach().flip(0))
    found.sum().backward()
    assert found.isfinite().all() and values.grad is not None and values.grad.isfinite().all()


CLOSED_FORMS: Mapping[str, Any] = {
    "sigmoid": lambda c, r, b, s: -(1 - s) * math.log(sg(b * (c - r))) - s * math.log(sg(-b * (c - r))),
    "sigmoid_norm": lambda c, r, b, s: -math.log(sg(b * (c / 4 - r / 2))),
    "hinge": lambda c, r, b, s: max(0, 1 - b * (c - r)),
    "ipo": lambda c, r, b, s: (c / 4 - r / 2 - 1 / (2 * b)) ** 2,
    "robust": lambda c, r, b, s: (
        (-(1 - s) * math.log(sg(b * (c - r))) + s * math.log(sg(-b * (c - r)))) / (1 - 2 * s)
    ),
    "nca_pair": lambda c, r, b, s: -math.log(sg(b * c)) - (math.log(sg(-b * c)) + math.log(sg(-b * r))) / 2,
    "apo_zero": lambda c, r, b, s: 1 - sg(b * c) + sg(b * r),
    "apo_down": lambda c, r, b, s: sg(b * c) + 1 - sg(b * (c - r)),
}
"""Of the log ratios of an answer of 4 tokens and one of 2, β and label smoothing."""


def sg(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_dpo__each_loss_that_is_asked_for__is_the_one_computed(tmp_path: Path, name: str) -> None:
    model, reference = llama(0), llama(1)
    smoothing = 0.2 if name in ("sigmoid", "robust") else 0.0
    objective = objective_of(tmp_path, "dpo", dpo={"loss": name, "beta": 0.7, "label_smoothing": smoothing})
    rows = with_reference(rows_of(*PAIRS), reference)
    first = {key: values.copy() for key, values in rows.items()}
    length = sum(len(prompt + answer) - 1 for prompt, answer in PAIRS[0])
    for key, filler in (("targets", -100), ("segment_ids", 0), ("part", 0)):
        first[key][0, length:] = filler
    chosen, rejected = (
        float(answer_log_probs(model, *side).sum() - answer_log_probs(reference, *side).sum()) for side in PAIRS[0]
    )
    found = objective.loss(model, objective.batch(first))
    assert float(found.sum) == pytest.approx(CLOSED_FORMS[name](chosen, rejected, 0.7, smoothing), rel=1e-4)


def test_ipo__the_objective__has_the_loss_of_that_name(tmp_path: Path) -> None:
    rows = with_reference(rows_of(*PAIRS), llama(1))
    by_name = objective_of(tmp_path, "ipo")
    by_key = objective_of(tmp_path, "dpo", dpo={"loss": "ipo"})
    found, expected = (float(one.loss(llama(0), one.batch(rows)).sum) for one in (by_name, by_key))
    assert found == expected and found != pytest.approx(3 * math.log(2), rel=0.1)


@pytest.mark.parametrize("name", ["dpo", "orpo"])
@pytest.mark.parametrize("is_packed", [True, False])
def test_loss__rows_without_a_pair__is_zero_and_the_model_runs(tmp_path: Path, name: str, is_packed: bool) -> None:
    rows = rows_of(num_filler=1)
    rows[REFERENCE_LOG_PROBS] = np.zeros(rows["tokens"].shape, dtype=np.float32)
    for is_chunked in (True, False):
        model, objective = llama(), objective_of(tmp_path, name, is_packed=is_packed)
        if is_chunked:
            objective.use_chunks(model)
        found = objective.loss(model, objective.batch(rows))
        assert (float(found.sum), found.weight) == (0, 0)
        found.sum.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_batch__examples_that_are_no_pairs_or_lack_the_reference__are_named(tmp_path: Path) -> None:
    rows = rows_of(*PAIRS)
    objective = objective_of(tmp_path, "orpo")
    with pytest.raises(RunError, match=r"data\.format: preference"):
        objective.batch({name: values for name, values in rows.items() if name != "part"})
    swapped = rows | {"part": np.where(rows["part"] > 0, 3 - rows["part"], 0)}
    with pytest.raises(RunError, match="parts 1 and 2"):
        objective.batch(swapped)
    with pytest.raises(RunError, match="reference model; prepare them again"):
        objective_of(tmp_path, "dpo").batch(rows)
