"""The divergence from a teacher, against torch's own and by its properties."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from forge.errors import RunError
from forge.objective.base import IGNORED
from forge.objective.distillation import TEACHER_LOG_PROBS, TEACHER_TOKENS, Distillation
from forge.objective.divergence import forward_divergence
from tests.support.objectives import context_of

SIZES: dict[str, Any] = {
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


def small(*, seed: int, hidden_size: int = 32, vocab_size: int = 300) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", hidden_size=hidden_size, vocab_size=vocab_size, **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)  # distributions that differ from each other
    return model


def objective_of(folder: Path, teacher: Any, **settings: Any) -> Distillation:
    context = context_of(folder, objective="distillation", distillation={"teacher": "unused", **settings})
    held = None if teacher is None else teacher.eval()
    return Distillation(context=replace(context, teacher=held, vocab_size=300))


def rows_of(*lengths: int, seq_len: int = 20) -> dict[str, np.ndarray]:
    """One row of a stream or, with lengths, of examples; every fifth target carries no loss."""
    tokens = np.random.default_rng(1).integers(5, 300, size=(1, seq_len + 1))
    targets = tokens[:, 1:].copy()
    targets[:, ::5] = IGNORED
    rows = {"tokens": tokens[:, :-1].copy(), "targets": targets}
    if lengths:
        segment = np.zeros((1, seq_len), dtype=np.int64)
        segment[0, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        positions = np.zeros_like(segment)
        positions[0, : sum(lengths)] = np.concatenate([np.arange(length) for length in lengths])
        rows |= {
            "segment_ids": segment,
            "position_ids": positions,
            "targets": np.where(segment > 0, targets, IGNORED),
        }
    return rows


def reference_loss(
    student: Any, teacher: Any, rows: dict[str, np.ndarray], *, temperature: float, weight: float
) -> Tensor:
    """Forward KL as torch and trl's GKD (beta 0) have it, mixed with the cross entropy; summed."""
    ids, targets = torch.from_numpy(rows["tokens"]), torch.from_numpy(rows["targets"])
    kept = targets != IGNORED
    own, taught = student(input_ids=ids).logits[kept], teacher(input_ids=ids).logits[kept][:, :300]
    log_q, log_p = F.log_softmax(own / temperature, dim=-1), F.log_softmax(taught / temperature, dim=-1)
    apart = F.kl_div(log_q, log_p.detach(), log_target=True, reduction="sum") * temperature**2
    return weight * apart + (1 - weight) * F.cross_entropy(own, targets[kept], reduction="sum")


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.5), (2.5, 0.8), (0.7, 1.0)])
def test_loss__any_temperature__has_the_value_and_gradient_of_plain_torch(
    tmp_path: Path, temperature: float, weight: float
) -> None:
    student, teacher = small(seed=0), small(seed=1, hidden_size=64, vocab_size=320)  # with unused rows
    objective = objective_of(tmp_path, teacher, temperature=temperature, weight=weight)
    rows = rows_of()
    expected = reference_loss(student, teacher, rows, temperature=temperature, weight=weight)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    found = objective.loss(student, objective.batch(rows))
    found.sum.backward()
    assert float(found.sum.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert found.weight == (rows["targets"] != IGNORED).sum()
    for name, gradient in gradients.items():
        torch.testing.assert_close(student.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def stored_outputs(teacher: Any, rows: dict[str, np.ndarray], *, temperature: float, top_k: int) -> dict[str, Any]:
    """What `forge.train.stored_outputs` stores of rows, by plain torch."""
    with torch.no_grad():
        logits = teacher(input_ids=torch.from_numpy(rows["tokens"])).logits[..., :300]
    top, tokens = F.log_softmax(logits.float() / temperature, dim=-1).topk(top_k, dim=-1)
    return {**rows, TEACHER_TOKENS: tokens.numpy(), TEACHER_LOG_PROBS: top.numpy()}


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (7, 2.0), (300, 0.8)])
def test_loss__stored_outputs__have_the_value_and_gradient_of_the_restricted_divergence_of_plain_torch(
    tmp_path: Path, top_k: int, temperature: float
) -> None:
    student, teacher = small(seed=0), small(seed=1, hidden_size=64, vocab_size=320)
    settings = {"temperature": temperature, "top_k": top_k, "weight": 0.7}
    live = objective_of(tmp_path, teacher, **settings)
    stored = objective_of(tmp_path, None, teacher_logits="stored", **settings)
    rows = rows_of()
    batches = {
        live: live.batch(rows),
        stored: stored.batch(stored_outputs(teacher, rows, temperature=temperature, top_k=top_k)),
    }
    found, gradients = [], []
    for objective, batch in batches.items():
        student.zero_grad()
        loss = objective.loss(student, batch)
        loss.sum.backward()
        found.append(loss)
        gradients.append({name: parameter.grad.clone() for name, parameter in student.named_parameters()})
    targets = torch.from_numpy(rows["targets"])
    kept = targets != IGNORED
    with torch.no_grad():
        q = F.softmax(student(input_ids=torch.from_numpy(rows["tokens"])).logits[kept] / temperature, dim=-1)
        p = F.softmax(
            teacher(input_ids=torch.from_numpy(rows["tokens"])).logits[kept][:, :300] / temperature, dim=-1
        )
    where = p.topk(top_k).indices
    expected = (p.gather(1, where) * (p.gather(1, where) / q.gather(1, where)).log()).sum(dim=1)
    if top_k < 300:
        rest_p, rest_q = (1 - each.gather(1, where).sum(dim=1) for each in (p, q))
        expected += rest_p * (rest_p / rest_q).log()
    divergence = temperature**2 * float(expected.sum())
    assert float(found[1].metrics["divergence"].sum) == pytest.approx(divergence, rel=1e-4)
    assert float(found[1].sum.detach()) == pytest.approx(float(found[0].sum.detach()), rel=1e-5)
    assert float(found[1].metrics["agreement"].sum) == float(found[0].metrics["agreement"].sum)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_batch__data_without_the_stored_outputs__is_named(tmp_path: Path) -> None:
    objective = objective_of(tmp_path, None, teacher_logits="stored", top_k=3)
    with pytest.raises(RunError, match="no outputs of the teacher; prepare them again"):
        objective.batch(rows_of())
    rows = {name: values * 0 + (name == "targets") * IGNORED for name, values in rows_of().items()}
    filler = stored_outputs(small(seed=1), rows, temperature=1.0, top_k=3)
    student = small(seed=0)
    found = objective.loss(student, objective.batch(filler))
    found.sum.backward()
    assert (float(found.sum.detach()), found.weight) == (0, 0)


def test_loss__examples_of_a_row__equal_each_alone(tmp_path: Path) -> None:
    student, teacher = small(seed=0), small(seed=1)
    objective = objective_of(tmp_path, teacher, temperature=2.0)
    rows = rows_of(9, 7)
    with torch.no_grad():
        whole = objective.loss(student, objective.batch(rows))
        alone = 0.0
        for start, stop in ((0, 9), (9, 16)):
            part = {name: rows[name][:, start:stop].copy() for name in ("tokens", "targets")}
            alone += float(objective.loss(student, objective.batch(part)).sum)
    assert float(whole.sum) == pytest.approx(alone, rel=1e-5)


def test_loss__student_equal_to_its_teacher__has_no_divergence(tmp_path: Path) -> None:
    model = small(seed=0)
    with torch.no_grad():
        found = objective_of(tmp_path, model).loss(model, objective_of(tmp_path, model).batch(rows_of()))
    assert float(found.metrics["divergence"].sum) == pytest.approx(0.0, abs=1e-4)
    assert found.metrics["agreement"].sum == found.weight


def test_loss__row_that_fills_up__is_zero_but_runs_the_model(tmp_path: Path) -> None:
    student, teacher = small(seed=0), small(seed=1)
    objective = objective_of(tmp_path, teacher)
    rows = {"tokens": np.zeros((2, 8), dtype=np.int64), "targets": np.full((2, 8), IGNORED)}
    found = objective.loss(student, objective.batch(rows))
    found.sum.backward()
    assert (found.weight, float(found.sum.detach())) == (0, 0.0)
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_forward_divergence__top_k__is_that_of_the_tokens_and_their_rest() -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(5, 12, generator=draw), torch.randn(5, 12, generator=draw) * 2
    whole = forward_divergence(student, teacher, temperature=2.0, top_k=None)
    torch.testing.assert_close(forward_divergence(student, teacher, temperature=2.0, top_k=12), whole)
    found = forward_divergence(student, teacher, temperature=2.0, top_k=3)
    p, q = (F.softmax(logits / 2, dim=1) for logits in (teacher, student))
    for row in range(5):
        top = p[row].topk(3).indices
        events = [torch.cat([each[row][top], 1 - each[row][top].sum(dim=0, keepdim=True)]) for each in (p, q)]
        expected = 4 * (events[0] * (events[0] / events[1]).log()).sum()
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-4)
    assert (found <= whole + 1e-6).all()
