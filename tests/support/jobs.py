"""Small jobs, corpora and plans for tests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from forge.config.job import JobSpec
from forge.data.cache_index import CacheIndex, write_index
from forge.data.store import StreamWriter
from forge.plan.inputs import CorpusInfo, HardwareInfo, ModelInfo
from forge.plan.plan import Plan, make_plan

VOCAB = 128
SEQ_LEN = 16
CPU = HardwareInfo(device="cpu", name="test", memory_bytes=None, peak_flops=None)


def tiny_job(**changes: Any) -> JobSpec:
    """A job that trains in a second; `changes` are dotted keys with `__` for the dot."""
    body: dict[str, Any] = {
        "name": "tiny",
        "model": {
            "architecture": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        "data": {"source": "python-stdlib", "seq_len": SEQ_LEN, "tokenizer": {"vocab_size": 300}},
        "training": {
            "total_steps": 6,
            "global_batch_size": 12,
            "optimizer": {"lr": 1e-2},
            "schedule": {"warmup": 2},
            "zero": {"stage": 1},
        },
        "resources": {"workers": "1..4", "gpu": "none"},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        target = body
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    if "from_pretrained" in body["model"] and body["data"]["tokenizer"] == {"vocab_size": 300}:
        del body["data"]["tokenizer"]  # that of the pretrained model
    return JobSpec.model_validate(body)


def synthetic_corpus(folder: Path, *, num_tokens: int = 4000, num_held_out: int = 400) -> CorpusInfo:
    """Token shards with something to learn: each token follows from the one before, most of the time."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    streams = {}
    for name, count in (("train", num_tokens), ("held_out", num_held_out)):
        tokens = np.empty(count, dtype="<u2")
        tokens[0] = 1
        jumps = rng.random(count) < 0.2
        for i in range(1, count):
            tokens[i] = rng.integers(VOCAB) if jumps[i] else (tokens[i - 1] * 5 + 3) % VOCAB
        writer = StreamWriter(folder, name=name, vocab_size=VOCAB, shard_tokens=1500)
        writer.append(tokens.tobytes())
        streams[name] = writer.close()
    index = CacheIndex(
        digest="synthetic",
        dtype="<u2",
        vocab_size=VOCAB,
        eot_id=0,
        num_documents=1,
        num_text_bytes=num_tokens,
        unigram_perplexity=float(VOCAB),
        train=streams["train"],
        held_out=streams["held_out"],
        tokenizer=(),
    )
    write_index(folder, index=index)
    return CorpusInfo(
        folder=str(folder),
        digest="synthetic",
        vocab_size=VOCAB,
        eot_id=0,
        seq_len=SEQ_LEN,
        num_documents=1,
        num_text_bytes=num_tokens,
        num_train_tokens=num_tokens,
        num_held_out_tokens=num_held_out,
        num_train_sequences=(num_tokens - 1) // SEQ_LEN,
        num_held_out_sequences=(num_held_out - 1) // SEQ_LEN,
        unigram_perplexity=float(VOCAB),
    )


def tiny_facts(**changes: Any) -> ModelInfo:
    """Facts of the tiny job's model."""
    body: dict[str, Any] = {
        "architecture": "llama",
        "class_name": "LlamaForCausalLM",
        "num_parameters": 28_832,
        "num_trainable_parameters": 28_832,
        "num_matmul_parameters": 24_576,
        "largest_module_parameters": 4_096,
        "num_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "attention_width": 32,
        "vocab_size": VOCAB,
        "max_seq_len": SEQ_LEN,
        "has_linear_head": True,
        "isolation_problem": None,
    }
    return ModelInfo(**(body | changes))


UNPREPARED = CorpusInfo(
    folder="/nowhere", digest="none", vocab_size=VOCAB, eot_id=0, seq_len=SEQ_LEN, num_documents=1,
    num_text_bytes=1, num_train_tokens=1, num_held_out_tokens=0, num_train_sequences=1, num_held_out_sequences=0,
    unigram_perplexity=math.nan,
)  # fmt: skip
"""The corpus of plans that no test trains."""


def tiny_plan(corpus: CorpusInfo = UNPREPARED, **changes: Any) -> Plan:
    """The plan of a tiny job on a corpus."""
    return make_plan(tiny_job(**changes), model=tiny_facts(), corpus=corpus, hardware=CPU)
