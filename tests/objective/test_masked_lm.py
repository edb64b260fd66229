"""Masked-token prediction against transformers' own loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from forge.model.position_wise import has_positionwise_head
from forge.objective.base import IGNORED, ObjectiveContext
from forge.objective.masked_lm import MaskedLm
from tests.support.objectives import context_of

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def small(architecture: str, **keys: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model(architecture, **(SIZES | keys))).eval()


def rows_of(*lengths: int, seq_len: int = 24) -> dict[str, np.ndarray]:
    """One row with examples of these lengths; 0: whole rows of a stream."""
    draw = np.random.default_rng(1)
    tokens = draw.integers(60, 300, size=(1, seq_len))
    rows = {"tokens": tokens, "targets": tokens.copy(), "row_seeds": np.array([7], dtype=np.uint64)}
    if lengths:
        segment_ids = np.zeros((1, seq_len), dtype=np.int64)
        segment_ids[0, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        rows["segment_ids"] = segment_ids
        rows["targets"] = np.where(segment_ids > 0, tokens, IGNORED)
    return rows


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize("lengths", [(), (9, 5, 7)])
def test_loss__any_rows__is_transformers_own(tmp_path: Path, architecture: str, lengths: tuple[int, ...]) -> None:
    keys = {"pad_token_id": 1} if architecture == "roberta" else {"pad_token_id": 0}
    model = small(architecture, **keys)
    context = context_of(tmp_path, objective="masked-lm")
    for is_selecting in (True, False):
        objective = MaskedLm(
            context=ObjectiveContext(
                training=context.training, tokenizer=context.tokenizer, has_positionwise_head=is_selecting
            )
        )
        batch = objective.batch(rows_of(*lengths))
        found = objective.loss(model, batch)
        own = model(input_ids=batch["tokens"], attention_mask=batch.get("attention_mask"), labels=batch["targets"])
        count = int((batch["targets"] != IGNORED).sum())
        assert found.weight == objective.weight(batch) == count > 0
        torch.testing.assert_close(found.sum / count, own.loss)
        hits = (own.logits.argmax(-1) == batch["targets"]).sum()
        assert found.metrics["accuracy"].sum == hits


def test_loss__examples_of_a_row__equal_each_alone(tmp_path: Path) -> None:
    model, objective = small("bert"), MaskedLm(context=context_of(tmp_path, objective="masked-lm"))
    packed = objective.batch(rows_of(9, 5, 7))
    whole = objective.loss(model, packed)
    alone = 0.0
    for tokens, targets, mask in zip(packed["tokens"], packed["targets"], packed["attention_mask"], strict=True):
        length = int(mask.sum())
        batch = {"tokens": tokens[None, :length], "targets": targets[None, :length]}
        alone += float(objective.loss(model, batch).sum)
    assert float(whole.sum) == pytest.approx(alone, rel=1e-5)


def test_batch__rows_that_fill_up__have_no_loss(tmp_path: Path) -> None:
    model, objective = small("bert"), MaskedLm(context=context_of(tmp_path, objective="masked-lm"))
    rows = rows_of(9, 5)
    for name in ("tokens", "segment_ids"):
        rows[name] = np.zeros_like(rows[name])
    rows["targets"] = np.full_like(rows["targets"], IGNORED)
    for chosen in (rows, {name: rows[name] for name in ("tokens", "targets", "row_seeds")}):
        batch = objective.batch(chosen)
        found = objective.loss(model, batch)
        assert (found.weight, float(found.sum), objective.weight(batch)) == (0, 0.0, 0.0)
        found.sum.backward()  # the model was run


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("bert", True), ("roberta", True), ("distilbert", True), ("albert", True), ("electra", True), ("fnet", True)],
)
def test_has_positionwise_head__known_encoders__is_found(architecture: str, expected: bool) -> None:
    config = AutoConfig.for_model(architecture)
    assert has_positionwise_head(config, seq_len=64, auto_class="AutoModelForMaskedLM") is expected
