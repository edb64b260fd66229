"""Exported embedding models give the vectors of the run, in transformers and in sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from forge.config.job import JobSpec
from forge.data.prepare import prepare
from forge.data.tokenizer import train_tokenizer
from forge.inference.checkpoint_model import load_model
from forge.objective.contrastive import pool
from forge.plan.plan import Plan, make_plan
from forge.runs.checkpoints import embedding_of
from forge.serve.export import ExportRequest, export
from tests.support.jobs import CPU, tiny_facts, tiny_job
from tests.support.ranks import run_ranks
from tests.train.test_frozen import newest

TEXTS = ["a red apple", "the sea", "an old stone bridge over a river", "x"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "encoder": ("bert", ("[CLS]", "[SEP]", "[PAD]"), {"pooling": "mean"}),
    "decoder": ("llama", (), {"pooling": "last_token", "similarity": "dot", "temperature": 1.0}),
}


def trained(folder: Path, case: str) -> Plan:
    """Train on a few pairs with a tokenizer of their words. Returns: the plan; checkpoints are in `folder/run`."""
    architecture, special_tokens, settings = CASES[case]
    pairs = [{"query": text, "positive": f"{text} {text}"} for text in TEXTS * 10]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    tokenizer = train_tokenizer(iter(TEXTS), vocab_size=300, special_tokens=special_tokens)
    (folder / "tokenizer.json").write_text(tokenizer.content)
    (folder / "tokenizer_config.json").write_text(tokenizer.config)
    job: JobSpec = tiny_job(
        model={"architecture": architecture, **SIZES},
        data={
            "files": str(folder / "pairs.jsonl"), "format": "embedding", "seq_len": 128, "held_out": 0.1,
            "embedding": {"query_prefix": "query: "}, "tokenizer": {"from_pretrained": str(folder)},
        },
        training__objective="contrastive", training__contrastive=settings, training__total_steps=2,
        training__precision="fp32",
    )  # fmt: skip
    corpus = prepare(job.data, cache_dir=folder / "cache")
    facts = tiny_facts(vocab_size=corpus.vocab_size, max_seq_len=128, has_linear_head=False)
    plan = make_plan(job, model=facts, corpus=corpus, hardware=CPU)
    run_ranks(plan, folder / "run", world_size=1)
    return plan


@torch.no_grad()
def embedded(model: Any, tokenizer: Any, spec: Any) -> Tensor:
    """The embedding of each text by itself, unpadded."""
    found = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        hidden = model(input_ids=ids).last_hidden_state
        found.append(pool(hidden, mask=torch.ones_like(ids), pooling=spec.pooling)[0])
    vectors = torch.stack(found)
    return F.normalize(vectors, dim=1) if spec.similarity == "cosine" else vectors


@pytest.mark.parametrize("case", ["encoder", pytest.param("decoder", marks=pytest.mark.slow)])
def test_export__embedding_model__gives_the_vectors_of_the_run(tmp_path: Path, case: str) -> None:
    plan = trained(tmp_path, case)
    spec = plan.job.training.contrastive
    folder = tmp_path / "exported"
    request = ExportRequest(
        url=str(tmp_path / "run"), to=str(folder), dtype="fp32", tokenizer=str(tmp_path),
        embedding=embedding_of(plan.job),
    )  # fmt: skip
    done = export(request)
    assert (done.auto_class, done.is_embedding) == ("AutoModel", True)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ours = embedded(load_model(plan, newest(tmp_path / "run")), tokenizer, spec)
    theirs = embedded(AutoModel.from_pretrained(folder).eval(), tokenizer, spec)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)

    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(folder), device="cpu")
    vectors = torch.from_numpy(model.encode(TEXTS))  # in one batch, padded
    torch.testing.assert_close(vectors, ours, rtol=0, atol=1e-5)
    assert (model.max_seq_length, model.prompts["query"]) == (128, "query: ")
    assert model.similarity_fn_name == spec.similarity
