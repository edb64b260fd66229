"""Adapters with objectives beside the next token: trained at any world size, resized, and exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from forge.checkpoint.source import weights_digest
from forge.plan.plan import Plan, make_plan
from forge.serve.export import ExportRequest, export
from tests.support.examples import text_pair_corpus
from tests.support.jobs import CPU, VOCAB, synthetic_corpus, tiny_facts, tiny_job, tiny_plan
from tests.support.objectives import write_tokenizer
from tests.support.ranks import run_ranks
from tests.train import test_classification, test_seq2seq
from tests.train.test_distillation import with_outputs
from tests.train.test_frozen import newest
from tests.train.test_pretrained import save_first_weights

BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """How an objective is trained with adapters."""

    plan: Callable[[int], Plan]
    """By the ZeRO stage."""
    load: Callable[[Path], Any]
    """Loads a folder, as the class that the objective trains."""
    trained_whole: tuple[str, ...] = ()
    """What the names of the parameters begin with that are trained beside the adapters."""
    inputs: Mapping[str, Tensor]


def distillation(folder: Path, *, is_stored: bool) -> Case:
    save_first_weights(folder / "base", "fp32")
    torch.manual_seed(3)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=VOCAB, max_position_embeddings=32, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "teacher")
    corpus = synthetic_corpus(folder / "corpus-0")
    write_tokenizer(folder / "corpus-0" / "tokenizer")
    teacher = {"teacher": str(folder / "teacher"), "digest": weights_digest(str(folder / "teacher"))}
    settings: dict[str, Any] = {**teacher, "temperature": 2.0, "weight": 0.8, "top_k": 5}
    if is_stored:
        found = with_outputs(corpus, folder / "teacher")
        assert found is not None
        corpus, settings = found, settings | {"teacher_logits": "stored"}
    tokenizer = {"from_pretrained": str(folder / "corpus-0" / "tokenizer")}

    def plan(stage: int) -> Plan:
        return tiny_plan(
            corpus, model={"from_pretrained": str(folder / "base"), "lora": LORA}, training__precision="fp32",
            training__objective="distillation", training__distillation=settings, training__zero={"stage": stage},
            training__optimizer={"lr": 0.02}, training__total_steps=4, data__tokenizer=tokenizer,
        )  # fmt: skip

    return Case(
        plan=plan, load=AutoModelForCausalLM.from_pretrained, inputs={"input_ids": torch.arange(24).view(2, 12)}
    )


def contrastive(folder: Path) -> Case:
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", vocab_size=300, max_position_embeddings=32, **BERT)
    AutoModel.from_config(config).save_pretrained(folder / "base")
    corpus = text_pair_corpus(folder / "corpus")

    def plan(stage: int) -> Plan:
        return tiny_plan(
            corpus, model={"from_pretrained": str(folder / "base"), "lora": LORA}, data__format="embedding",
            data__packing="examples", training__objective="contrastive", training__precision="fp32",
            training__zero={"stage": stage}, training__optimizer={"lr": 0.02}, training__total_steps=4,
        )  # fmt: skip

    return Case(plan=plan, load=AutoModel.from_pretrained, inputs={"input_ids": torch.arange(24).view(2, 12)})


def classification(folder: Path) -> Case:
    base = test_classification.masked_lm(folder / "base") | {"lora": LORA | {"targets": ["query", "value"]}}

    def plan(stage: int) -> Plan:
        return test_classification.plan_of(
            folder, "single", base, stage=stage, training__optimizer={"lr": 0.02}, training__total_steps=4
        )

    def load(source: Path) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)

    inputs = {"input_ids": torch.arange(24).view(2, 12)}
    return Case(plan=plan, load=load, trained_whole=("classifier.", "bert.pooler."), inputs=inputs)


def seq2seq(folder: Path) -> Case:
    corpus = test_seq2seq.word_pairs(folder / "data")
    torch.manual_seed(0)
    keys = {**test_seq2seq.MODELS["t5"], "vocab_size": 400, "pad_token_id": corpus.pad_id}
    config = AutoConfig.for_model(keys.pop("architecture"), decoder_start_token_id=corpus.pad_id, **keys)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder / "base")

    def plan(stage: int) -> Plan:
        model = {"from_pretrained": str(folder / "base"), "lora": LORA | {"targets": ["q", "v", "wi"]}}
        job = tiny_job(
            model=model, training__objective="seq2seq", data__format="pair",
            data__seq_len=test_seq2seq.SEQ_LEN, training__precision="fp32", training__zero={"stage": stage},
            training__optimizer={"lr": 0.02}, training__total_steps=4,
        )  # fmt: skip
        facts = tiny_facts(vocab_size=400, max_seq_len=None, has_linear_head=False)
        return make_plan(job, model=facts, corpus=corpus, hardware=CPU)

    inputs = {"input_ids": torch.arange(24).view(2, 12), "decoder_input_ids": torch.arange(8).view(2, 4)}
    return Case(plan=plan, load=AutoModelForSeq2SeqLM.from_pretrained, inputs=inputs)


CASES: dict[str, Callable[[Path], Case]] = {
    "distillation": lambda folder: distillation(folder, is_stored=False),
    "distillation, stored": lambda folder: distillation(folder, is_stored=True),
    "contrastive": contrastive,
    "classification": classification,
    "seq2seq": seq2seq,
}


@torch.no_grad()
def outputs_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    found = model.eval()(**inputs)
    first: Tensor = found.logits if "logits" in found else found.last_hidden_state
    return first


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_train__adapters_with_any_objective__are_resized_and_exported_merged_and_for_peft(
    tmp_path: Path, name: str
) -> None:
    case = CASES[name](tmp_path)
    alone = run_ranks(case.plan(0), tmp_path / "alone", world_size=1)
    assert len(alone.losses) == 4
    first = run_ranks(case.plan(3), tmp_path / "run", world_size=2, stop_after=2)
    rest = run_ranks(case.plan(1), tmp_path / "run", world_size=3)
    assert first.losses + rest.losses == pytest.approx(alone.losses, rel=1e-4)

    checkpoint = newest(tmp_path / "run")
    held = {parameter for parameter, facts in checkpoint.shape.parameters.items() if facts.kind == "master"}
    others = {parameter for parameter in held if ".lora_" not in parameter}
    assert len(held) > len(others) and all(
        case.trained_whole and one.startswith(case.trained_whole) for one in others
    )

    url = str(tmp_path / "run")
    export(ExportRequest(url=url, to=str(tmp_path / "merged"), dtype="fp32"))
    export(ExportRequest(url=url, to=str(tmp_path / "peft"), dtype="fp32", adapters=True))
    merged = outputs_of(case.load(tmp_path / "merged"), case.inputs)
    before = outputs_of(case.load(tmp_path / "base"), case.inputs)
    adapted = PeftModel.from_pretrained(case.load(tmp_path / "base"), str(tmp_path / "peft"))
    assert (merged - before).abs().max() > 1e-3
    torch.testing.assert_close(outputs_of(adapted, case.inputs), merged, rtol=1e-4, atol=2e-5)
