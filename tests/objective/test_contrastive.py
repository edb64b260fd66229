"""In-batch negatives against the formula on the whole batch, computed in one piece by plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel

from forge.errors import RunError
from forge.objective.base import Arrays
from forge.objective.contrastive import Contrastive, pool
from tests.support.objectives import context_of

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320,
    "max_position_embeddings": 64,
}  # fmt: skip
BERT = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

Examples = list[list[list[int]]]
"""Examples of texts of token ids."""


def small(architecture: str = "bert") -> Any:
    torch.manual_seed(0)
    keys = BERT if architecture == "bert" else {**SIZES, "num_key_value_heads": 2}
    return AutoModel.from_config(AutoConfig.for_model(architecture, **keys))


def examples_of(count: int, *, num_negatives: int = 0) -> Examples:
    draw = np.random.default_rng(3)
    return [
        [draw.integers(5, 300, size=int(draw.integers(2, 7))).tolist() for _ in range(2 + num_negatives)]
        for _ in range(count)
    ]


def rows_of(*rows: Examples, seq_len: int = 48) -> dict[str, np.ndarray]:
    """Pack examples: each argument is a row."""
    names = ("tokens", "segment_ids", "part")
    arrays = {name: np.zeros((len(rows), seq_len), dtype=np.int64) for name in names}
    for number, examples in enumerate(rows):
        at = 0
        for segment, texts in enumerate(examples, start=1):
            for part, ids in enumerate(texts, start=1):
                for name, value in zip(names, (ids, segment, part), strict=True):
                    arrays[name][number, at : at + len(ids)] = value
                at += len(ids)
    arrays["targets"] = np.where(arrays["segment_ids"] > 0, arrays["tokens"], -100)
    return arrays


def whole_batch_loss(
    model: Any,
    examples: Examples,
    *,
    pooling: str = "mean",
    similarity: str = "cosine",
    temperature: float = 0.05,
    symmetric: bool = False,
) -> Tensor:
    """MultipleNegativesRankingLoss of sentence-transformers, summed; each text is embedded alone, unpadded."""

    def embed(ids: list[int]) -> Tensor:
        hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        return {"mean": hidden.mean(dim=0), "cls": hidden[0], "last_token": hidden[-1]}[pooling]

    queries = torch.stack([embed(texts[0]) for texts in examples])
    width = len(examples[0])
    passages = torch.stack([embed(texts[part]) for part in range(1, width) for texts in examples])
    if similarity == "cosine":
        queries, passages = F.normalize(queries, dim=1), F.normalize(passages, dim=1)
    scores = queries @ passages.T / temperature
    labels = torch.arange(len(examples))
    loss = F.cross_entropy(scores, labels, reduction="sum")
    if not symmetric:
        return loss
    return (loss + F.cross_entropy(scores[:, : len(examples)].T, labels, reduction="sum")) / 2


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_micro_batches(objective: Contrastive, model: Any, micro_batches: list[Arrays]) -> tuple[float, float]:
    """Run a step as the engine does. Returns: loss and weight."""
    batches = [objective.batch(rows) for rows in micro_batches]
    if len(batches) > 1:
        with torch.no_grad():
            further = objective.second_inputs([objective.first_pass(model, batch) for batch in batches])
        batches = [{**batch, **more} for batch, more in zip(batches, further, strict=True)]
    total = weight = 0.0
    for batch in batches:
        found = objective.loss(model, batch)
        found.sum.backward()
        total, weight = total + float(found.sum.detach()), weight + float(found.weight)
    return total, weight


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
@pytest.mark.parametrize(
    ("num_negatives", "settings"),
    [
        (0, {}),
        (2, {}),
        (1, {"symmetric": True}),
        (0, {"pooling": "cls", "similarity": "dot", "temperature": 5.0}),
    ],
)
def test_loss__any_micro_batches__is_that_of_the_whole_batch(
    tmp_path: Path, micro_batch_size: int, num_negatives: int, settings: dict[str, Any]
) -> None:
    model = small()
    objective = Contrastive(context=context_of(tmp_path, objective="contrastive", contrastive=settings))
    examples = examples_of(7, num_negatives=num_negatives)
    rows = [examples[0:2], examples[2:3], examples[3:5], [], examples[5:6], examples[6:7]]
    reference = whole_batch_loss(model, examples, **settings)
    expected = gradients(model, reference)
    model.zero_grad()
    size = micro_batch_size
    total, weight = in_micro_batches(
        objective, model, [rows_of(*rows[start : start + size]) for start in range(0, len(rows), size)]
    )
    assert (total, weight) == (pytest.approx(float(reference.detach()), rel=1e-5), 7)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5)


def test_loss__decoder_and_last_token__is_that_of_the_whole_batch(tmp_path: Path) -> None:
    model, examples = small("llama"), examples_of(4)
    settings = {"pooling": "last_token"}
    objective = Contrastive(context=context_of(tmp_path, objective="contrastive", contrastive=settings))
    with torch.no_grad():
        reference = whole_batch_loss(model, examples, pooling="last_token")
    total, _ = in_micro_batches(objective, model, [rows_of(examples[:3]), rows_of(examples[3:])])
    assert total == pytest.approx(float(reference), rel=1e-5)


def test_loss__text_equal_to_the_positive__is_no_negative(tmp_path: Path) -> None:
    model = small()
    objective = Contrastive(context=context_of(tmp_path, objective="contrastive"))
    first, second, third = examples_of(3)
    second[1] = list(first[1])
    total, _ = in_micro_batches(objective, model, [rows_of([first], [second], [third])])
    passages = {"first": [first[1], third[1]], "third": [third[1], first[1], first[1]]}
    expected = [
        loss_of_query(model, query, among=passages[of])
        for query, of in ((first[0], "first"), (second[0], "first"), (third[0], "third"))
    ]
    assert total == pytest.approx(sum(expected), rel=1e-5)


@torch.no_grad()
def loss_of_query(model: Any, query: list[int], *, among: list[list[int]]) -> float:
    embed = [
        F.normalize(model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(dim=0), dim=0)
        for ids in (query, *among)
    ]
    scores = torch.stack([embed[0] @ other * 20 for other in embed[1:]])
    return float(torch.logsumexp(scores, dim=0) - scores[0])


def test_metrics__collapsed_embeddings__count_as_missed(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    objective = Contrastive(
        context=context_of(tmp_path, objective="contrastive", contrastive={"similarity": "dot"})
    )
    found = objective.loss(model, objective.batch(rows_of(examples_of(4))))
    assert (float(found.metrics["accuracy"].sum), float(found.metrics["mrr"].sum)) == (0.0, 1.0)


def test_held_out__any_micro_batches__compares_within_the_rows_of_a_step(tmp_path: Path) -> None:
    model, examples = small().eval(), examples_of(5)
    objective = Contrastive(context=context_of(tmp_path, objective="contrastive", global_batch_size=2))
    rows = [[example] for example in examples]
    found = []
    with torch.no_grad():
        for size in (1, 3):
            starts = range(0, len(rows), size)
            results = [
                objective.first_pass(model, objective.batch(rows_of(*rows[at : at + size]))) for at in starts
            ]
            positions = [np.arange(at, min(at + size, len(rows)), dtype=np.int64) for at in starts]
            found.append({k: float(v.sum) for k, v in objective.held_out(results, positions=positions).items()})
        groups = [examples[0:2], examples[2:4], examples[4:5]]
        expected = sum(float(whole_batch_loss(model, group)) for group in groups)
        of_parts = objective.held_out(results, positions=positions, parts=["a", "b"])
        second = objective.held_out(results[1:], positions=positions[1:])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert len(results) == 2 and set(of_parts) == {"loss", "accuracy", "mrr", "loss/a", "loss/b"}
    assert float(of_parts["loss/a"].sum + of_parts["loss/b"].sum) == pytest.approx(found[0]["loss"], rel=1e-6)
    assert (of_parts["loss/a"].weight, of_parts["loss/b"].weight) == (3, 2)
    assert float(of_parts["loss/b"].sum) > float(second["loss"].sum)  # the first part's texts are negatives too


def test_batch__rows_that_fill_up__have_no_loss_but_run_the_model(tmp_path: Path) -> None:
    model = small()
    objective = Contrastive(context=context_of(tmp_path, objective="contrastive"))
    found = objective.loss(model, objective.batch(rows_of([], [])))
    found.sum.backward()
    assert (found.weight, float(found.sum)) == (0, 0.0)
    with pytest.raises(RunError, match=r"data\.format: embedding"):
        objective.batch({"tokens": np.ones((1, 4), dtype=np.int64)})


def test_pool__padded_sequence__ignores_padding() -> None:
    hidden = torch.tensor([[[1.0], [3.0], [9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    found = {kind: pool(hidden, mask=mask, pooling=kind).item() for kind in ("mean", "cls", "last_token")}
    assert found == {"mean": 2.0, "cls": 1.0, "last_token": 3.0}
