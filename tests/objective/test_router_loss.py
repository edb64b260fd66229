"""The auxiliary loss of experts: that of transformers, in both ways of the cross entropy, on any split."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from forge.config.model import ModelSpec
from forge.errors import ModelError
from forge.model.families.base import DataShape
from forge.model.families.transformers_family import TransformersFamily
from forge.objective.base import IGNORED, ObjectiveModule
from forge.objective.build import build_objective
from forge.objective.causal_lm import CausalLm
from forge.objective.pairs import REFERENCE_LOG_PROBS
from tests.objective.test_cross_entropy import VOCAB, batch, tiny_model
from tests.support.objectives import context_of
from tests.support.pairs import PAIRS
from tests.support.pairs import rows_of as pair_rows

EXPERTS: dict[str, dict[str, object]] = {
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 1},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 1,
                  "head_dim": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1},
}  # fmt: skip
CUT = [("mixtral", True), ("mixtral", False), ("qwen3_moe", True), ("olmoe", True), ("granitemoe", False)]


def experts(architecture: str = "mixtral", *, coefficient: float = 0.7, **keys: object) -> PreTrainedModel:
    return tiny_model(
        architecture,
        **(EXPERTS[architecture] | {"output_router_logits": True, "router_aux_loss_coef": coefficient} | keys),
    )


def module_of(model: PreTrainedModel, *, is_chunked: bool) -> ObjectiveModule:
    objective = CausalLm()
    if is_chunked:
        objective.use_chunks(model)
    return ObjectiveModule(model, objective=objective)


def rows_of(arrays: dict[str, Tensor], *indices: int) -> dict[str, Tensor]:
    return {name: values[list(indices)] for name, values in arrays.items()}


def gradients_of(module: ObjectiveModule) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("architecture", "is_chunked"), CUT)
def test_loss__one_row__is_that_of_transformers_times_the_targets(architecture: str, is_chunked: bool) -> None:
    model = experts(architecture)
    row = rows_of(batch(), 1)
    num_targets = int((row["targets"] != IGNORED).sum())
    theirs = model(input_ids=row["tokens"], labels=row["targets"], shift_labels=row["targets"])
    theirs.loss.backward()
    expected = {f"model.{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    module = module_of(model, is_chunked=is_chunked)
    ours = module(row)
    (ours / num_targets).backward()
    assert ours.item() / num_targets == pytest.approx(theirs.loss.item(), rel=1e-5)
    found = gradients_of(module)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    metric = module.result["loss"].metrics["router_aux_loss"]
    assert float(metric.sum / metric.weight) == pytest.approx(theirs.aux_loss.item(), rel=1e-5)


@pytest.mark.parametrize("is_chunked", [True, False])
def test_loss__rows_together_or_one_by_one__is_the_same(is_chunked: bool) -> None:
    module = module_of(experts(), is_chunked=is_chunked)
    whole = module(batch())
    whole.backward()
    together = {name: gradient.clone() for name, gradient in gradients_of(module).items()}
    module.zero_grad()
    parts = [module(rows_of(batch(), index)) for index in range(3)]
    torch.stack(parts).sum().backward()
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-5)
    for name, gradient in gradients_of(module).items():
        torch.testing.assert_close(gradient, together[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("is_chunked", [True, False])
def test_loss__coefficient__is_the_factor_of_the_metric(is_chunked: bool) -> None:
    losses, metrics = [], []
    for coefficient in (0.0, 1.0):
        module = module_of(experts(coefficient=coefficient), is_chunked=is_chunked)
        losses.append(module(batch()).item())
        metrics.append(module.result["router_aux_loss"])
    weight = float(metrics[0].weight)
    assert float(metrics[0].sum) == pytest.approx(float(metrics[1].sum))
    assert (losses[1] - losses[0]) / weight == pytest.approx(float(metrics[0].sum) / weight, rel=1e-3)
    assert float(metrics[0].sum) / weight > 1  # about the number of experts for each token, not divided by tokens


def test_loss__padding__does_not_count_as_tokens() -> None:
    module = module_of(experts(), is_chunked=True)
    row = rows_of(batch(), 1)
    alone = module(row)
    padded = {
        "tokens": torch.nn.functional.pad(row["tokens"], (0, 5)),
        "targets": torch.nn.functional.pad(row["targets"], (0, 5), value=IGNORED),
        "segment_ids": torch.nn.functional.pad(torch.ones_like(row["tokens"]), (0, 5)),
    }
    assert module(padded).item() == pytest.approx(alone.item(), rel=1e-5)


def test_batch__padded_rows__say_where_the_padding_is() -> None:
    rows: dict[str, Any] = {name: values.numpy() for name, values in batch().items()}
    full = torch.ones_like(batch()["tokens"]).numpy()
    assert "segment_ids" not in CausalLm().batch(rows | {"segment_ids": full, "position_ids": full})
    part = full.copy()
    part[:, -2:] = 0
    assert CausalLm().batch(rows | {"segment_ids": part, "position_ids": full})["segment_ids"].sum() == 3 * 14


def test_derived__perplexity__is_of_the_cross_entropy_alone() -> None:
    plain, mixed = (module_of(experts(coefficient=factor), is_chunked=True) for factor in (0.0, 0.7))
    perplexities = []
    for module in (plain, mixed):
        module(batch())
        means = {name: float(value.sum.detach() / value.weight) for name, value in module.result.items()}
        perplexities.append(module.objective.derived(means)["perplexity"])  # type: ignore[attr-defined]
    assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-4)
    assert perplexities[0] == pytest.approx(math.exp(math.log(VOCAB)), rel=0.3)


def test_loss__experts_without_router_logits__has_no_auxiliary_loss() -> None:
    module = module_of(experts(output_router_logits=False), is_chunked=True)
    module(batch())
    assert set(module.result) == {"loss"}


PAIR_SETTINGS: dict[str, dict[str, object]] = {"dpo": {"reference": "stored"}, "orpo": {"beta": 0.4}}


@pytest.mark.parametrize("name", PAIR_SETTINGS)
@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("is_chunked", [True, False])
def test_pairs__any_layout__add_the_auxiliary_loss_of_transformers_for_each_pair(
    tmp_path: Path, name: str, is_packed: bool, is_chunked: bool
) -> None:
    """trl adds `coefficient * aux_loss` of a batch with both texts of its pairs; here of every pair by itself."""
    losses, gradients = [], []
    for coefficient in (0.0, 0.7):
        model = experts(coefficient=coefficient, vocab_size=100)
        context = context_of(tmp_path, objective=name, **{name: PAIR_SETTINGS[name]})
        objective: Any = build_objective(name, context=replace(context, keeps_examples_apart=is_packed))
        if is_chunked:
            objective.use_chunks(model)
        rows = pair_rows(*PAIRS)
        rows[REFERENCE_LOG_PROBS] = np.zeros(rows["tokens"].shape, dtype=np.float32)
        found = objective.loss(model, objective.batch(rows))
        model.zero_grad()
        found.sum.backward()
        losses.append(found)
        gradients.append(model.model.layers[0].mlp.gate.weight.grad.clone())
        filler = objective.batch(
            {name: values * 0 + (name == "targets") * IGNORED for name, values in rows.items()}
        )
        assert float(objective.loss(model, filler).sum.detach()) == 0
    expected = sum(plain_auxiliary(experts(vocab_size=100), pair) for pair in PAIRS)
    reported = losses[1].metrics["router_aux_loss"]
    assert float(reported.sum) == pytest.approx(expected, rel=1e-4) and reported.weight == 3
    assert float((losses[1].sum - losses[0].sum).detach()) == pytest.approx(0.7 * expected, rel=1e-4)
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-2)


def test_distillation__experts__adds_the_auxiliary_loss_of_transformers(tmp_path: Path) -> None:
    row = rows_of(batch(), 1)
    num_targets = int((row["targets"] != IGNORED).sum())
    found = []
    for coefficient in (0.0, 0.7):
        context = context_of(tmp_path, objective="distillation", distillation={"teacher": "unused"})
        objective = build_objective("distillation", context=replace(context, teacher=tiny_model()))
        model = experts(coefficient=coefficient)
        loss = objective.loss(model, objective.batch({name: values.numpy() for name, values in row.items()}))
        loss.sum.backward()
        gradient = model.model.layers[0].mlp.gate.weight.grad
        found.append((float(loss.sum.detach()), float(loss.metrics["router_aux_loss"].sum), gradient))
    expected = num_targets * float(experts()(input_ids=row["tokens"]).aux_loss.detach())
    assert found[1][1] == pytest.approx(expected, rel=1e-4)
    assert found[1][0] - found[0][0] == pytest.approx(0.7 * expected, rel=1e-4)
    assert not torch.allclose(found[0][2], found[1][2], rtol=1e-2)


def plain_auxiliary(model: PreTrainedModel, pair: Any) -> float:
    """Of one padded batch with both texts of a pair, as transformers and trl run it."""
    texts = [prompt + answer[:-1] for prompt, answer in pair]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    with torch.no_grad():
        return float(model(input_ids=ids, attention_mask=mask).aux_loss)


def ask(**keys: object) -> tuple[str, ...]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    spec = ModelSpec.model_validate({"architecture": "mixtral", **sizes, **EXPERTS["mixtral"], **keys})
    return tuple(TransformersFamily().inspect(spec, DataShape(vocab_size=VOCAB, seq_len=16, eot_id=0)).notes)


def test_inspect__coefficient_without_router_logits__is_said() -> None:
    assert ask(router_aux_loss_coef=0.5) == (
        "model.router_aux_loss_coef has no effect without model.output_router_logits: true",
    )
    assert ask(router_aux_loss_coef=0.5, output_router_logits=True) == ()
    assert ask() == ("no auxiliary loss for the routers of the experts; model.output_router_logits: true adds it",)


def test_inspect__auxiliary_loss_that_is_not_known__is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func")
    monkeypatch.setattr("forge.model.families.transformers_family.probe_forward", lambda *_, **__: _Fine())
    with pytest.raises(ModelError, match="transformers has no auxiliary loss for MixtralForCausalLM") as caught:
        ask(output_router_logits=True)
    assert caught.value.key == "output_router_logits"


class _Fine:
    problem, looks_ahead = None, False
