"""Encoder-decoders on real ranks: the losses do not depend on the machines, with dropout too."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from forge.checkpoint.best import open_verified
from forge.checkpoint.storage import open_storage
from forge.config.data import DataSpec
from forge.data.prepare import prepare
from forge.inference.answer import Answerer
from forge.inference.answer_request import AnswerConfig
from forge.inference.checkpoint_model import load_model
from forge.objective.registry import OBJECTIVES
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan, make_plan, plan_to_json
from forge.serve.export import ExportRequest, export
from tests.support.jobs import CPU, synthetic_corpus, tiny_facts, tiny_job
from tests.support.objectives import write_tokenizer
from tests.support.ranks import run_ranks

SEQ_LEN = 24
BERT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 400}
MODELS: dict[str, Any] = {
    "t5": {"architecture": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
    "transformer-2017": {
        "architecture": "transformer-2017",
        "d_model": 32,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 2,
    },
    "encoder-decoder": {
        "architecture": "encoder-decoder",
        "encoder": {"architecture": "bert", **BERT, "num_hidden_layers": 1},
        "decoder": {"architecture": "bert", **BERT, "num_hidden_layers": 2},
    },
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> CorpusInfo:
    return word_pairs(tmp_path_factory.mktemp("pairs"))


def word_pairs(folder: Path) -> CorpusInfo:
    """Words and the same in another order; several pairs share a row."""
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    words = ["ab", "cd", "ef", "gh"]
    texts = [list(draw.choice(words, size=draw.integers(1, 4))) for _ in range(200)]
    records = ({"source": " ".join(text), "target": " ".join(text[::-1])} for text in texts)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    spec = DataSpec(
        files=(str(folder / "pairs.jsonl"),), format="pair", seq_len=SEQ_LEN, held_out=0.1,
        tokenizer={"vocab_size": 270, "special_tokens": ["[PAD]"]},
    )  # fmt: skip
    return prepare(spec, cache_dir=folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> CorpusInfo:
    folder = tmp_path_factory.mktemp("texts")
    corpus = synthetic_corpus(folder)
    write_tokenizer(folder / "tokenizer", special_tokens=OBJECTIVES["span-corruption"].special_tokens)
    return replace(corpus, pad_id=1)


def plan_of(corpus: CorpusInfo, stage: int, *, architecture: str = "t5", **changes: Any) -> Plan:
    changes = {"training__objective": "seq2seq", "data__format": "pair", "data__seq_len": SEQ_LEN} | changes
    size = max(400, corpus.vocab_size)
    sized = {} if architecture == "encoder-decoder" else {"vocab_size": size}
    job = tiny_job(
        model=MODELS[architecture] | sized, training__precision="fp32",
        training__zero={"stage": stage}, **changes,
    )  # fmt: skip
    model = tiny_facts(vocab_size=size, max_seq_len=None, has_linear_head=False)
    return make_plan(job, model=model, corpus=corpus, hardware=CPU)


@pytest.mark.slow
def test_train__any_world_size_and_stage__losses_are_equal_and_a_resize_keeps_the_curve(
    pairs: CorpusInfo, tmp_path: Path
) -> None:
    alone = run_ranks(plan_of(pairs, 0), tmp_path / "alone", world_size=1)
    assert alone.losses[-1] < alone.losses[0] and len(alone.losses) == 6
    for stage, world_size in ((2, 2), (3, 3)):
        found = run_ranks(plan_of(pairs, stage), tmp_path / f"{stage}", world_size=world_size)
        assert found.losses == pytest.approx(alone.losses, rel=1e-4), (stage, world_size)
        assert found.steps[-1].held_out_loss == pytest.approx(alone.steps[-1].held_out_loss, rel=1e-4)
    first = run_ranks(plan_of(pairs, 1), tmp_path / "run", world_size=2, stop_after=3)
    rest = run_ranks(plan_of(pairs, 3), tmp_path / "run", world_size=1)
    assert first.losses + rest.losses == pytest.approx(alone.losses, rel=1e-4)
    assert 0 <= alone.steps[0].extra["train/accuracy"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["transformer-2017", "encoder-decoder"])
def test_train__other_architecture__is_the_same_on_two_ranks_exported_and_generating(
    pairs: CorpusInfo, tmp_path: Path, architecture: str
) -> None:
    plans = [plan_of(pairs, stage, architecture=architecture) for stage in (0, 3)]
    alone = run_ranks(plans[0], tmp_path / "alone", world_size=1)
    found = run_ranks(plans[1], tmp_path / "both" / "checkpoints", world_size=2)
    assert found.losses == pytest.approx(alone.losses, rel=1e-4)
    url = str(tmp_path / "both" / "checkpoints")
    exported = export(ExportRequest(url=url, to=str(tmp_path / "hf"), dtype="fp32"))
    assert exported.auto_class == "AutoModelForSeq2SeqLM"
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf")
    own = load_model(plans[1], open_verified(open_storage(url)))
    ids = torch.arange(2, 12)[None]
    outs = [model.eval()(input_ids=ids, decoder_input_ids=ids).logits for model in (loaded, own)]
    tolerance = 0.0 if architecture == "transformer-2017" else 1e-5  # transformers chooses fused attention
    torch.testing.assert_close(*outs, rtol=tolerance, atol=tolerance)
    (tmp_path / "both" / "plan.json").write_text(plan_to_json(plans[1], is_file=True))
    shutil.copytree(Path(pairs.folder) / "tokenizer", tmp_path / "both" / "tokenizer")
    config = AnswerConfig(source=str(tmp_path / "both"), sampling={"temperature": 0, "max_tokens": 4})
    [made] = Answerer(config)(["ab cd"])
    source = AutoTokenizer.from_pretrained(tmp_path / "both" / "tokenizer")("ab cd", return_tensors="pt")
    assert source["input_ids"][0, -1] == pairs.eot_id
    written = loaded.generate(source["input_ids"], max_new_tokens=4)[0, 1:].tolist()
    tokenizer = Tokenizer.from_file(str(tmp_path / "both" / "tokenizer" / "tokenizer.json"))
    assert made["text"] == tokenizer.decode(written, skip_special_tokens=True)


def test_train__span_corruption__draws_the_same_spans_at_every_world_size(
    texts: CorpusInfo, tmp_path: Path
) -> None:
    changes = {"training__objective": "span-corruption", "data__format": "text", "data__seq_len": 16}
    changes |= {"data__tokenizer": {"vocab_size": 400}}
    alone = run_ranks(plan_of(texts, 0, **changes), tmp_path / "alone", world_size=1)
    found = run_ranks(plan_of(texts, 2, **changes), tmp_path / "both", world_size=2)
    assert found.losses == pytest.approx(alone.losses, rel=1e-4)
    assert alone.losses[-1] < alone.losses[0]
