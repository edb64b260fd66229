"""Classifiers trained by real ranks: losses do not depend on the machines, and the export answers alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from forge.config.job import JobSpec
from forge.data.example_store import ExampleRows
from forge.data.prepare import open_rows, prepare
from forge.events import StepMetrics
from forge.objective.class_weights import weights_of
from forge.plan.plan import Plan, make_plan
from forge.serve.export import ExportRequest, export
from tests.support.jobs import CPU, tiny_facts, tiny_job
from tests.support.ranks import run_ranks

WORDS = ("fox", "dog", "jug", "box", "liquor", "quick", "lazy", "brown", "five", "dozen")
KEYS = {"multi": "labels", "token": "tags"}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300,
    "max_position_embeddings": 32,
}  # fmt: skip
BERT = {"architecture": "bert", **{name: SIZES[name] for name in list(SIZES)[:4]}}
GPT2 = {"architecture": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}


def records(kind: str) -> list[dict[str, Any]]:
    """Texts whose first word decides."""
    draw = np.random.default_rng(0)
    found = []
    for number in range(120):
        words = [WORDS[i] for i in draw.integers(0, len(WORDS), size=int(draw.integers(2, 7)))]
        first = WORDS.index(words[0])
        label: Any = {"single": "abc"[first % 3], "regression": first / 10}.get(kind)
        label = ["xyz"[i] for i in range(3) if first >> i & 1] if kind == "multi" else label
        label = ["no" if "o" in word else "yes" for word in words] if kind == "token" else label
        pair = {"text_pair": "over the box"} if kind == "single" and number % 3 else {}
        found.append({"text": " ".join(words), KEYS.get(kind, "label"): label, **pair})
    return found


def job_of(folder: Path, kind: str, model: dict[str, Any], **changes: Any) -> JobSpec:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records(kind)))
    data: dict[str, Any] = {"files": str(path), "format": "labelled", "seq_len": 24, "held_out": 0.2}
    data["tokenizer"] = {"vocab_size": 300}  # that of pretrained weights takes its place
    changes = {"training__classification": {"kind": kind}} | changes
    return tiny_job(
        model=model, data=data, training__objective="classification", training__precision="fp32",
        **({"training__optimizer": {"lr": 3e-3}} | changes),
    )  # fmt: skip


def plan_of(folder: Path, kind: str, model: dict[str, Any], *, stage: int = 1, **changes: Any) -> Plan:
    job = job_of(folder, kind, model, training__zero={"stage": stage}, **changes)
    corpus = prepare(job.data, cache_dir=folder / "cache")
    facts = replace(tiny_facts(), vocab_size=corpus.vocab_size, has_linear_head=False, max_seq_len=None)
    return make_plan(job, model=facts, corpus=corpus, hardware=CPU)


def masked_lm(folder: Path) -> dict[str, Any]:
    """A small BERT without a classifier, with dropout, and the tokenizer of the records."""
    tokenizer = Path(plan_of(folder / "first", "single", BERT).corpus.folder) / "tokenizer"
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SIZES)).save_pretrained(folder)
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return {"from_pretrained": str(folder)}


@pytest.mark.slow
def test_train__any_world_size_and_stage__losses_are_equal_and_the_export_answers_alike(tmp_path: Path) -> None:
    base, balanced = masked_lm(tmp_path / "base"), {"kind": "single", "class_weights": "balanced"}

    def plan(stage: int) -> Plan:
        return plan_of(tmp_path, "single", base, stage=stage, training__classification=balanced)

    alone = run_ranks(plan(0), tmp_path / "alone", world_size=1)
    assert len(alone.losses) == 6
    for stage, world_size in ((1, 2), (3, 3)):
        found = run_ranks(plan(stage), tmp_path / f"{stage}", world_size=world_size)
        assert found.losses == pytest.approx(alone.losses, rel=1e-4), (stage, world_size)
        assert found.steps[-1].extra == pytest.approx(alone.steps[-1].extra, rel=1e-4)
    first = run_ranks(plan(2), tmp_path / "run", world_size=2, stop_after=3)
    rest = run_ranks(plan(3), tmp_path / "run", world_size=1)
    assert first.losses + rest.losses == pytest.approx(alone.losses, rel=1e-4)
    require_same_answers(plan(0), tmp_path / "alone", to=tmp_path / "out", last=alone.steps[-1])


def require_same_answers(plan: Plan, run: Path, *, to: Path, last: StepMetrics) -> None:
    """The exported folder, used as transformers says, gives the loss and the accuracy that training measured."""
    tokenizer_folder = str(Path(plan.corpus.folder) / "tokenizer")
    export(ExportRequest(url=str(run), to=str(to), dtype="fp32", tokenizer=tokenizer_folder))
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(to), AutoTokenizer.from_pretrained(to)
    assert plan.corpus.labels is not None
    assert tuple(model.config.id2label.values()) == plan.corpus.labels.names
    _, held_out = open_rows(plan.corpus)
    assert isinstance(held_out, ExampleRows)
    chosen = [records("single")[i] for i in held_out.example_numbers(np.arange(held_out.num_examples))]
    weights = weights_of(plan.job.training.classification, plan.corpus.labels)
    weight = None if weights is None else torch.tensor(weights)
    right, total, terms = 0, 0.0, 0.0
    for has_pair in (True, False):
        some = [record for record in chosen if ("text_pair" in record) is has_pair]
        texts = [[record["text"] for record in some]]
        texts += [[record["text_pair"] for record in some]] if has_pair else []
        encoded = tokenizer(*texts, padding=True, return_tensors="pt")
        assert "token_type_ids" in encoded
        with torch.no_grad():
            logits = model.eval()(**encoded).logits
        goals = torch.tensor([model.config.label2id[record["label"]] for record in some])
        right += int((logits.argmax(-1) == goals).sum())
        total += float(F.cross_entropy(logits, goals, weight=weight, reduction="sum"))
        terms += len(goals) if weight is None else float(weight[goals].sum())
    assert last.held_out_loss == pytest.approx(total / terms, rel=1e-5)
    assert last.extra["eval/accuracy"] == pytest.approx(right / len(chosen))
    assert 0 < last.extra["eval/f1"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "model"),
    [("multi", GPT2), ("token", BERT), ("regression", GPT2), ("single", GPT2)],
    ids=["multi-gpt2", "token-bert", "regression-gpt2", "single-gpt2"],
)
def test_train__every_kind__losses_and_metrics_do_not_depend_on_the_workers(
    tmp_path: Path, kind: str, model: dict[str, Any]
) -> None:
    alone = run_ranks(plan_of(tmp_path, kind, model, stage=0), tmp_path / "alone", world_size=1)
    assert alone.losses[-1] < alone.losses[0]
    for stage, world_size in ((0, 3), (1, 2), (2, 3), (3, 2)):
        found = run_ranks(plan_of(tmp_path, kind, model, stage=stage), tmp_path / f"{stage}", world_size=world_size)
        assert found.losses == pytest.approx(alone.losses, rel=1e-4), (stage, world_size)
        assert found.steps[-1].extra == pytest.approx(alone.steps[-1].extra, rel=1e-3, abs=1e-6)
    first = run_ranks(plan_of(tmp_path, kind, model, stage=1), tmp_path / "run", world_size=3, stop_after=2)
    rest = run_ranks(plan_of(tmp_path, kind, model, stage=3), tmp_path / "run", world_size=2)
    assert first.losses + rest.losses == pytest.approx(alone.losses, rel=1e-4)
    expected = {"regression": {"mse", "r2"}}.get(kind, {"accuracy", "f1"})
    assert {name for name in expected if f"eval/{name}" in alone.steps[-1].extra} == expected


@pytest.mark.slow
def test_train__lora__learns_the_new_head_and_the_merged_export_answers_alike(tmp_path: Path) -> None:
    base = masked_lm(tmp_path / "base") | {"lora": {"rank": 4, "targets": ["query", "value"]}}
    alone = run_ranks(plan_of(tmp_path, "single", base, stage=0), tmp_path / "alone", world_size=1)
    found = run_ranks(plan_of(tmp_path, "single", base, stage=3), tmp_path / "run", world_size=2)
    assert found.losses == pytest.approx(alone.losses, rel=1e-4)
    plan = plan_of(tmp_path, "single", base)
    require_same_answers(plan, tmp_path / "run", to=tmp_path / "out", last=found.steps[-1])


@pytest.mark.slow
def test_train__decoder_with_pretrained_weights__has_a_new_head(tmp_path: Path) -> None:
    tokenizer = Path(plan_of(tmp_path / "first", "single", GPT2).corpus.folder) / "tokenizer"
    torch.manual_seed(0)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(base)
    for path in tokenizer.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    model = {"from_pretrained": str(base)}
    alone = run_ranks(plan_of(tmp_path, "single", model, stage=0), tmp_path / "alone", world_size=1)
    found = run_ranks(plan_of(tmp_path, "single", model, stage=3), tmp_path / "run", world_size=3)
    assert found.losses == pytest.approx(alone.losses, rel=1e-4)
