"""Reward models: the loss and gradient of single unpadded sequences through transformers' classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification

from forge.objective.build import build_objective
from tests.objective.test_preference import SIZES, gradients
from tests.support.objectives import context_of
from tests.support.pairs import PAIRS, rows_of


def classifier(architecture: str = "llama") -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SIZES, num_labels=1, pad_token_id=99)
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("center", [0.0, 0.2])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_reward__pairs_in_a_row__is_the_loss_of_whole_unpadded_sequences(
    tmp_path: Path, architecture: str, center: float
) -> None:
    model = classifier(architecture)
    total = torch.zeros(())
    for (prompt, chosen), (_, rejected) in PAIRS:
        scores = [model(torch.tensor([prompt + answer])).logits[0, 0] for answer in (chosen, rejected)]
        total = total - F.logsigmoid(scores[0] - scores[1]) + center * (scores[0] + scores[1]) ** 2
    wanted = gradients(model, total)
    context = context_of(tmp_path, objective="reward", reward={"center_coefficient": center})
    objective = build_objective("reward", context=context)
    found = objective.loss(model, objective.batch(rows_of(*PAIRS, num_filler=1)))
    assert found.weight == 3 and {*found.metrics, "router_aux_loss"} == set(objective.metric_directions)
    torch.testing.assert_close(found.sum, total, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model, found.sum).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)


def test_reward__rows_without_a_pair__is_zero_and_the_model_runs(tmp_path: Path) -> None:
    model = classifier()
    objective = build_objective("reward", context=context_of(tmp_path, objective="reward"))
    found = objective.loss(model, objective.batch(rows_of(num_filler=2)))
    assert (float(found.sum.detach()), found.weight) == (0, 0)
    found.sum.backward()
    assert model.score.weight.grad is not None and not model.score.weight.grad.any()
