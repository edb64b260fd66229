"""The losses of routers with heads for which transformers adds none, and with encoder-decoders, against those that
transformers computes of each unpadded text."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from forge.config.model import ModelSpec
from forge.errors import ModelError
from forge.model.families.base import DataShape
from forge.model.families.transformers_family import TransformersFamily
from forge.objective.base import IGNORED
from forge.objective.contrastive import Contrastive
from forge.objective.registry import AutoClass
from forge.objective.reward import Reward
from forge.objective.seq2seq import Seq2Seq
from tests.objective.test_classification import LENGTHS, NAMES, PROBLEMS, objective_of
from tests.objective.test_classification import rows_of as labelled_rows
from tests.objective.test_contrastive import examples_of, in_micro_batches
from tests.objective.test_contrastive import rows_of as text_rows
from tests.objective.test_seq2seq import EOT, PAD, VOCAB
from tests.objective.test_seq2seq import pairs as seq2seq_pairs
from tests.objective.test_seq2seq import rows_of as seq2seq_rows
from tests.support.objectives import context_of
from tests.support.pairs import PAIRS
from tests.support.pairs import rows_of as pair_rows

COEFFICIENT = 0.7
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 1},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 1,
                  "head_dim": 16},
}  # fmt: skip
SWITCH: dict[str, Any] = {
    "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
    "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "dropout_rate": 0.0,
    "router_jitter_noise": 0.0,
}  # fmt: skip


def experts(auto: Any, architecture: str = "mixtral", *, coefficient: float = COEFFICIENT, **keys: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        **{**SIZES, **EXPERTS[architecture], "vocab_size": 320, "pad_token_id": 3, **keys},
        output_router_logits=True,
        router_aux_loss_coef=coefficient,
    )
    return auto.from_config(config).eval()


def auxiliary(model: Any, *texts: list[int]) -> Tensor:
    """That of transformers' causal language model with the same weights, of unpadded texts each by itself, whose
    tokens are taken together."""
    causal = AutoModelForCausalLM.from_config(model.config).eval()
    causal.model = model.base_model
    logits = [causal(input_ids=torch.tensor([text])).router_logits for text in texts]
    layers = tuple(torch.cat(layer) for layer in zip(*logits, strict=True))
    function: Any = vars(__import__(type(model).__module__, fromlist=["_"]))["load_balancing_loss_func"]
    if len(texts) == 1:
        torch.testing.assert_close(
            causal(input_ids=torch.tensor([texts[0]])).aux_loss,
            function(layers, causal.num_experts, causal.num_experts_per_tok),
        )
    found: Tensor = function(layers, causal.num_experts, causal.num_experts_per_tok)
    return found


def require_added(found: Any, plain: Any, *, models: tuple[Any, Any], expected: Tensor) -> None:
    """Check that the loss and every gradient of the first model has what is expected more than the second's."""
    value = float(expected.detach())
    assert float(found.metrics["router_aux_loss"].sum) == pytest.approx(value, rel=1e-4)
    assert float((found.sum - plain.sum).detach()) == pytest.approx(COEFFICIENT * value, rel=1e-3)
    (found.sum - plain.sum - COEFFICIENT * expected).backward()
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, -theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def texts_of(rows: dict[str, np.ndarray]) -> list[list[int]]:
    ends = np.cumsum([0, *LENGTHS]).tolist()
    return [rows["tokens"][0, start:stop].tolist() for start, stop in pairwise(ends)]


@pytest.mark.parametrize(
    ("kind", "architecture", "settings"),
    [
        ("single", "mixtral", {"class_weights": "balanced"}),
        ("single", "qwen3_moe", {}),
        ("multi", "mixtral", {}),
        ("regression", "mixtral", {}),
        ("token", "mixtral", {}),
    ],
)
def test_classification__packed_texts__add_the_auxiliary_loss_of_each_times_its_weight(
    kind: str, architecture: str, settings: dict[str, Any]
) -> None:
    auto: Any = AutoModelForTokenClassification if kind == "token" else AutoModelForSequenceClassification
    labels = {"num_labels": 1 if kind == "regression" else len(NAMES), "problem_type": PROBLEMS.get(kind)}
    model = experts(auto, architecture, **labels)
    without = experts(auto, architecture, coefficient=0.0, **labels)
    objective = objective_of(kind, **settings)
    rows = labelled_rows(kind, *LENGTHS)
    batch = objective.batch(rows)
    found, plain = objective.loss(model, batch), objective.loss(without, batch)
    weights = [1.0] * len(LENGTHS)
    if kind == "token":
        weights = (batch["goals"] != IGNORED).sum(dim=1).tolist()
    elif settings:
        weights = [objective.weight({"goals": goal[None]}) for goal in batch["goals"]]  # type: ignore[attr-defined]
        assert len(set(weights)) > 1
    each = [weight * auxiliary(model, text) for text, weight in zip(texts_of(rows), weights, strict=True)]
    require_added(found, plain, models=(model, without), expected=torch.stack(each).sum())
    assert float(found.weight) == pytest.approx(sum(weights))


def test_reward__pairs__add_the_auxiliary_loss_of_both_texts_together(tmp_path: Path) -> None:
    auto: Any = AutoModelForSequenceClassification
    model, without = (experts(auto, coefficient=one, num_labels=1) for one in (COEFFICIENT, 0.0))
    objective = Reward(context=context_of(tmp_path, objective="reward"))
    batch = objective.batch(pair_rows(*PAIRS, num_filler=1))
    found, plain = objective.loss(model, batch), objective.loss(without, batch)
    each = [auxiliary(model, *(prompt + answer for prompt, answer in pair)) for pair in PAIRS]
    require_added(found, plain, models=(model, without), expected=torch.stack(each).sum())
    filler = objective.loss(model, objective.batch(pair_rows(num_filler=2)))
    assert float(filler.sum.detach()) == float(filler.metrics["router_aux_loss"].sum) == 0


@pytest.mark.parametrize("size", [1, 3])
def test_contrastive__any_micro_batches__add_the_auxiliary_loss_of_the_texts_of_each_query(
    tmp_path: Path, size: int
) -> None:
    model, without = (experts(AutoModel, coefficient=one) for one in (COEFFICIENT, 0.0))
    objective = Contrastive(context=context_of(tmp_path, objective="contrastive"))
    examples = examples_of(5, num_negatives=1)
    rows = [examples[0:2], [], examples[2:5]]
    micro_batches = [text_rows(*rows[start : start + size]) for start in range(0, 3, size)]
    totals = [in_micro_batches(objective, one, micro_batches) for one in (without, model)]
    with torch.no_grad():
        expected = sum(float(auxiliary(model, *texts)) for texts in examples)
        results = [objective.first_pass(model, objective.batch(rows)) for rows in micro_batches]
    assert totals[1][0] - totals[0][0] == pytest.approx(COEFFICIENT * expected, rel=1e-3)
    gates = [one.layers[0].mlp.gate.weight.grad for one in (without, model)]
    assert not torch.allclose(*gates, rtol=1e-2)
    held_out = objective.held_out(results, positions=[np.arange(size) + size * i for i in range(len(results))])
    assert float(held_out["loss"].sum) == pytest.approx(totals[1][0], rel=1e-4)
    assert float(held_out["router_aux_loss"].sum) == pytest.approx(expected, rel=1e-4)


def switch(**keys: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "switch_transformers",
        **{**SWITCH, "vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOT, "decoder_start_token_id": PAD},
        **{"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT, "router_z_loss_coef": 0.3, **keys},
    )
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def test_seq2seq__packed_pairs__have_the_loss_of_switch_transformers_of_each_unpadded_pair() -> None:
    model, objective = switch(), Seq2Seq()
    found = objective.loss(model, objective.batch(seq2seq_rows([0, 1], [2, 3])))
    found.sum.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sums = dict.fromkeys(("loss", "router_aux_loss", "router_z_loss"), 0.0)
    for source, target in seq2seq_pairs():
        labels = torch.from_numpy(target)[None]
        own = model(input_ids=torch.from_numpy(source)[None], labels=labels, output_router_logits=True)
        (len(target) * own.loss).backward()
        sums["loss"] += len(target) * float(own.loss.detach())
        sums["router_aux_loss"] += len(target) * float((own.encoder_aux_loss + own.decoder_aux_loss).detach())
        sums["router_z_loss"] += len(target) * float((own.encoder_z_loss + own.decoder_z_loss).detach())
    assert float(found.sum.detach()) == pytest.approx(sums["loss"], rel=1e-5)
    for name in ("router_aux_loss", "router_z_loss"):
        assert float(found.metrics[name].sum) == pytest.approx(sums[name], rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)
    means = {name: value / float(found.weight) for name, value in sums.items()}
    entropy = means["loss"] - COEFFICIENT * means["router_aux_loss"] - 0.3 * means["router_z_loss"]
    assert objective.derived(means)["perplexity"] == pytest.approx(np.exp(entropy), rel=1e-4)


def inspect(architecture: str, auto_class: AutoClass, **keys: Any) -> tuple[str, ...]:
    data = DataShape(
        vocab_size=VOCAB, seq_len=16, eot_id=0, pad_id=1, auto_class=auto_class, num_labels=1,
        problem_type="regression",
    )  # fmt: skip
    spec = ModelSpec.model_validate({"architecture": architecture, **keys})
    return tuple(TransformersFamily().inspect(spec, data).notes)


@pytest.mark.parametrize(
    ("architecture", "auto_class", "keys"),
    [
        ("mixtral", "AutoModelForSequenceClassification", SIZES | EXPERTS["mixtral"]),
        ("mixtral", "AutoModel", SIZES | EXPERTS["mixtral"]),
        ("switch_transformers", "AutoModelForSeq2SeqLM", SWITCH),
    ],
)
def test_inspect__experts_with_any_head__may_have_an_auxiliary_loss(
    architecture: str, auto_class: AutoClass, keys: dict[str, Any]
) -> None:
    without = "no auxiliary loss for the routers of the experts; model.output_router_logits: true adds it"
    assert without in inspect(architecture, auto_class, **keys)
    assert without not in inspect(architecture, auto_class, **keys, output_router_logits=True)


def test_inspect__experts_that_share_a_limit_among_rows__are_refused() -> None:
    keys = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_experts": 4}
    rates = {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    with pytest.raises(ModelError, match="limited number of tokens of a whole batch") as caught:
        inspect("nllb-moe", "AutoModelForSeq2SeqLM", **keys, **heads, **rates)
    assert caught.value.key == "architecture"
