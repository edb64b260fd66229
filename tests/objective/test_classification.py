"""Losses and metrics of classifiers against those of transformers, torch and scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, r2_score
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from forge.config.training import TrainingSpec
from forge.data.label_bits import BITS
from forge.objective.base import IGNORED, ObjectiveContext, derived_metrics
from forge.objective.classification import Classification
from forge.plan.inputs import LabelsInfo
from forge.train.metric_sums import MetricSums

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 90,
    "max_position_embeddings": 40, "pad_token_id": 3,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 90, "pad_token_id": 3}
NAMES = ("a", "b", "c", "d", "e")
LENGTHS = (9, 4, 7, 1)
PROBLEMS = {"single": "single_label_classification", "multi": "multi_label_classification"}


def small(architecture: str, *, kind: str) -> Any:
    torch.manual_seed(0)
    auto: Any = AutoModelForTokenClassification if kind == "token" else AutoModelForSequenceClassification
    sizes = GPT2 if architecture == "gpt2" else SIZES
    labels = {"num_labels": 1 if kind == "regression" else len(NAMES), "problem_type": PROBLEMS.get(kind)}
    config = AutoConfig.for_model(architecture, **sizes, **labels)
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # logits that differ between labels
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def objective_of(kind: str, **spec: Any) -> Classification:
    training = TrainingSpec.model_validate(
        {"total_steps": 1, "objective": "classification", "classification": {"kind": kind, **spec}}
    )
    names = () if kind == "regression" else NAMES
    counts = (6, 3, 1, 2, 0)[: len(names)]
    labels = LabelsInfo(names=names, train_counts=counts, held_out_counts=counts, num_train=12)
    return Classification(context=ObjectiveContext(training=training, tokenizer=Path(), labels=labels))


def rows_of(kind: str, *lengths: int, seq_len: int = 24, seed: int = 1) -> dict[str, np.ndarray]:
    """One row with examples of these lengths, each with another goal."""
    draw = np.random.default_rng(seed)
    tokens, targets = np.zeros((1, seq_len), dtype=np.int64), np.full((1, seq_len), IGNORED)
    segment_ids = np.zeros((1, seq_len), dtype=np.int64)
    values = np.zeros((1, seq_len), dtype=np.float32)
    bits = np.zeros((1, seq_len, 1), dtype=np.int64)
    at = 0
    for number, length in enumerate(lengths, start=1):
        tokens[0, at : at + length] = draw.integers(4, 90, size=length)
        segment_ids[0, at : at + length] = number
        targets[0, at] = draw.integers(0, len(NAMES)) if kind != "regression" else 0
        if kind == "token":
            targets[0, at : at + length] = draw.integers(0, len(NAMES), size=length)
            targets[0, at + 1 : at + length : 3] = IGNORED
        values[0, at] = draw.normal()
        bits[0, at, 0] = draw.integers(0, 2 ** len(NAMES))
        at += length
    rows = {"tokens": tokens, "targets": targets, "segment_ids": segment_ids}
    rows["position_ids"] = np.zeros_like(tokens)
    rows |= {"values": values} if kind == "regression" else {}
    return rows | ({"label_bits": bits} if kind == "multi" else {})


def own_loss(model: Any, batch: Any, *, kind: str) -> Any:
    """What transformers computes of the same padded batch."""
    mask = batch.get("attention_mask", torch.ones_like(batch["tokens"]))
    tokens = batch["tokens"].masked_fill(mask == 0, model.config.pad_token_id)
    return model(input_ids=tokens, attention_mask=mask, labels=batch["goals"])


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert", "llama", "gpt2"])
@pytest.mark.parametrize("kind", ["single", "multi", "regression", "token"])
def test_loss__any_kind__is_transformers_own(architecture: str, kind: str) -> None:
    model, objective = small(architecture, kind=kind), objective_of(kind)
    batch = objective.batch(rows_of(kind, *LENGTHS))
    found, own = objective.loss(model, batch), own_loss(model, batch, kind=kind)
    count = int((batch["goals"] != IGNORED).sum()) if kind == "token" else len(LENGTHS)
    assert found.weight == count
    torch.testing.assert_close(found.sum / count, own.loss)


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("kind", ["single", "multi", "regression", "token"])
def test_loss__examples_of_a_row__equal_each_alone(architecture: str, kind: str) -> None:
    model, objective = small(architecture, kind=kind), objective_of(kind)
    rows = rows_of(kind, *LENGTHS)
    whole = objective.loss(model, objective.batch(rows))
    alone = 0.0
    for start, length in zip(np.cumsum([0, *LENGTHS[:-1]]), LENGTHS, strict=True):
        one = {name: array[:, start : start + length] for name, array in rows.items()}
        one["segment_ids"] = np.ones_like(one["tokens"])
        batch = objective.batch(one)
        assert "attention_mask" not in batch
        alone += float(objective.loss(model, batch).sum.detach())
    assert float(whole.sum.detach()) == pytest.approx(alone, rel=1e-5)


def test_loss__decoder__does_not_depend_on_the_token_that_pads(tmp_path: Path) -> None:
    objective, losses = objective_of("single"), []
    for pad_id in (3, 0, 88):
        model = small("llama", kind="single")
        model.config.pad_token_id = pad_id
        rows = rows_of("single", *LENGTHS)
        rows["tokens"][rows["tokens"] == pad_id] = 50 if pad_id == 88 else 0
        losses.append(float(objective.loss(model, objective.batch(rows)).sum.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_loss__pair__gives_the_types_of_its_tokens_where_the_model_has_any() -> None:
    rows = rows_of("single", 9)
    rows["part"] = np.where(np.arange(24) < 5, 1, 2)[None] * (rows["segment_ids"] > 0)
    objective = objective_of("single")
    batch = objective.batch(rows)
    types = torch.tensor([[0] * 5 + [1] * 4])
    bert = small("bert", kind="single")
    own = bert(input_ids=batch["tokens"], token_type_ids=types, labels=batch["goals"])
    torch.testing.assert_close(objective.loss(bert, batch).sum, own.loss)
    gpt2 = small("gpt2", kind="single")  # it would look the types up among its tokens
    own = gpt2(input_ids=batch["tokens"], labels=batch["goals"])
    torch.testing.assert_close(objective.loss(gpt2, batch).sum, own.loss)


@pytest.mark.parametrize("kind", ["single", "token"])
def test_loss__weights_of_the_labels__is_torch_s_weighted_mean(kind: str) -> None:
    model, weights = small("bert", kind=kind), [0.5, 1.0, 4.0, 2.0, 3.0]
    objective = objective_of(kind, class_weights=weights)
    batch = objective.batch(rows_of(kind, *LENGTHS))
    found, logits = objective.loss(model, batch), own_loss(model, batch, kind=kind).logits
    own = torch.nn.CrossEntropyLoss(weight=torch.tensor(weights))(logits.flatten(0, -2), batch["goals"].flatten())
    torch.testing.assert_close(found.sum / found.weight, own)
    assert objective.weight(batch) == pytest.approx(found.weight)


def test_loss__weights_of_several_labels__are_torch_s_pos_weight() -> None:
    model, weights = small("bert", kind="multi"), [0.5, 1.0, 4.0, 2.0, 3.0]
    objective = objective_of("multi", class_weights=weights)
    batch = objective.batch(rows_of("multi", *LENGTHS))
    found, logits = objective.loss(model, batch), own_loss(model, batch, kind="multi").logits
    own = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights))(logits, batch["goals"])
    torch.testing.assert_close(found.sum / found.weight, own)
    assert not hasattr(objective, "weight")


def test_loss__balanced_weights__are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    objective = objective_of("single", class_weights="balanced")
    labels = np.repeat(np.arange(5), (6, 3, 1, 2, 1))  # a label without examples counts as one that has one
    own = compute_class_weight("balanced", classes=np.arange(5), y=labels) * 12 / 13
    assert objective._weights is not None
    np.testing.assert_allclose(objective._weights.numpy(), own, rtol=1e-6)
    multi = objective_of("multi", class_weights="balanced")
    assert multi._weights is not None
    np.testing.assert_allclose(multi._weights.numpy(), [1, 3, 11, 5, 11])


@pytest.mark.parametrize("kind", ["single", "multi", "token"])
def test_metrics__summed_over_parts__are_those_of_scikit_learn(kind: str) -> None:
    model, objective = small("bert", kind=kind), objective_of(kind)
    batches = [objective.batch(rows_of(kind, *LENGTHS, seed=seed)) for seed in range(12)]
    means = measured(objective, model, batches)
    logits = [own_loss(model, batch, kind=kind).logits for batch in batches]
    if kind == "multi":
        predicted, actual = torch.cat(logits) > 0, torch.cat([batch["goals"] for batch in batches])
    else:
        actual = torch.cat([batch["goals"].flatten() for batch in batches])
        predicted = torch.cat([one.flatten(0, -2).argmax(-1) for one in logits])[actual != IGNORED]
        actual = actual[actual != IGNORED]
    assert means["accuracy"] == pytest.approx(accuracy_score(actual, predicted))
    assert means["f1"] == pytest.approx(f1_score(actual, predicted, average="macro", zero_division=0))


def test_metrics__numbers__are_the_squared_error_and_the_determination() -> None:
    model, objective = small("bert", kind="regression"), objective_of("regression")
    batches = [objective.batch(rows_of("regression", *LENGTHS, seed=seed)) for seed in range(3)]
    means = measured(objective, model, batches)
    actual = torch.cat([batch["goals"] for batch in batches])
    with torch.no_grad():
        predicted = torch.cat([own_loss(model, batch, kind="regression").logits.squeeze(-1) for batch in batches])
    assert means["mse"] == pytest.approx(float(((actual - predicted) ** 2).mean()), rel=1e-5)
    assert means["mse"] == pytest.approx(means["loss"], rel=1e-5)
    assert means["r2"] == pytest.approx(r2_score(actual, predicted), rel=1e-4)


@pytest.mark.parametrize("kind", ["single", "multi", "regression", "token"])
def test_batch__rows_that_fill_up__have_no_loss_and_no_counts(kind: str) -> None:
    model, objective = small("bert", kind=kind), objective_of(kind)
    rows = {name: np.zeros_like(array) for name, array in rows_of(kind, *LENGTHS).items()}
    rows["targets"] = np.full_like(rows["targets"], IGNORED)
    found = objective.loss(model, objective.batch(rows))
    assert (found.weight, float(found.sum.detach())) == (0, 0.0)
    assert all(not bool(counts.any()) for counts in found.counts.values())
    found.sum.backward()  # the model was run


def test_batch__many_labels__are_read_from_several_words() -> None:
    training = TrainingSpec.model_validate(
        {"total_steps": 1, "objective": "classification", "classification": {"kind": "multi"}}
    )
    names = tuple(map(str, range(100)))
    labels = LabelsInfo(names=names, train_counts=(1,) * 100, held_out_counts=(1,) * 100, num_train=9)
    objective = Classification(context=ObjectiveContext(training=training, tokenizer=Path(), labels=labels))
    rows = rows_of("multi", 3)
    bits = np.zeros((1, 24, 4), dtype=np.int64)
    for number in (0, 30, 31, 99):
        bits[0, 0, number // BITS] |= 1 << (number % BITS)
    goals = objective.batch(rows | {"label_bits": bits})["goals"]
    assert torch.nonzero(goals)[:, 1].tolist() == [0, 30, 31, 99]


def measured(objective: Classification, model: Any, batches: list[Any]) -> dict[str, float]:
    """Means over batches that are added up on three ranks."""
    ranks = [
        MetricSums(["accuracy"], device=torch.device("cpu"), count_sizes=objective.count_sizes) for _ in range(3)
    ]
    with torch.no_grad():
        for number, batch in enumerate(batches):
            loss = objective.loss(model, batch)
            ranks[number % 3].add({"loss": loss, **loss.metrics})
    ranks[0].values += ranks[1].values + ranks[2].values
    return derived_metrics(objective, ranks[0].means(), counts=ranks[0].counts())
