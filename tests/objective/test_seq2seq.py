"""The loss of encoder-decoders against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from forge.config.model import ModelSpec
from forge.errors import ModelError, RunError
from forge.model.families.base import DataShape
from forge.model.families.transformers_family import TransformersFamily
from forge.model.transformers_config import build_config
from forge.objective.base import IGNORED
from forge.objective.seq2seq import Seq2Seq

VOCAB, EOT, PAD = 120, 0, 1
SHAPE = DataShape(vocab_size=VOCAB, seq_len=32, eot_id=EOT, pad_id=PAD, auto_class="AutoModelForSeq2SeqLM")
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "dropout": 0.0,
}  # fmt: skip
KEYS = {"t5": T5, "bart": BART, "mbart": BART, "m2m_100": BART}


def small(architecture: str) -> Any:
    spec = ModelSpec.model_validate({"architecture": architecture, **KEYS[architecture]})
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(build_config(spec, SHAPE)).eval()


def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Sources and targets of several lengths; each ends with the end of text."""
    draw = np.random.default_rng(1)
    sizes = [(7, 4), (3, 9), (1, 2), (5, 1)]
    texts = [[draw.integers(2, VOCAB, size=length) for length in pair] for pair in sizes]
    return [(np.append(source, EOT), np.append(target, EOT)) for source, target in texts]


def rows_of(*groups: list[int], seq_len: int = 32) -> dict[str, np.ndarray]:
    """Rows, each with some of the pairs."""
    rows = {name: np.zeros((len(groups), seq_len), dtype=np.int64) for name in ("tokens", "part", "segment_ids")}
    rows["targets"] = np.full((len(groups), seq_len), IGNORED)
    for row, chosen in enumerate(groups):
        at = 0
        for number, index in enumerate(chosen, start=1):
            for part, ids in enumerate(pairs()[index], start=1):
                end = at + len(ids)
                rows["tokens"][row, at:end], rows["part"][row, at:end] = ids, part
                rows["segment_ids"][row, at:end] = number
                if part == 2:
                    rows["targets"][row, at:end] = ids
                at = end
    return rows


@pytest.mark.parametrize("architecture", KEYS)
def test_loss__packed_pairs__is_the_sum_of_transformers_own_of_each_unpadded_pair(architecture: str) -> None:
    model, objective = small(architecture), Seq2Seq()
    batch = objective.batch(rows_of([0, 1], [2, 3]))
    assert batch["sequence_rows"].tolist() == [0, 0, 1, 1]
    found = objective.loss(model, batch)
    expected = hits = 0.0
    for source, target in pairs():
        labels = torch.from_numpy(target)[None]
        own = model(input_ids=torch.from_numpy(source)[None], labels=labels)
        expected += float(own.loss.detach()) * len(target)
        hits += float((own.logits.argmax(dim=-1) == labels).sum())
    assert found.weight == sum(len(target) for _, target in pairs())
    assert found.sum.item() == pytest.approx(expected, rel=1e-5)
    assert float(found.metrics["accuracy"].sum) == hits


def test_loss__rows_that_only_fill_up__have_no_weight_and_run_the_model() -> None:
    model, objective = small("t5"), Seq2Seq()
    rows = rows_of([0], [])
    rows["targets"][:] = IGNORED
    found = objective.loss(model, objective.batch(rows))
    assert found.weight == 0 and float(found.sum.detach()) == 0
    found.sum.backward()
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)


def test_batch__examples_without_parts__are_refused() -> None:
    rows = rows_of([0])
    del rows["part"]
    with pytest.raises(RunError, match="'part'"):
        Seq2Seq().batch(rows)


def test_derived__perplexity__is_exp_of_the_loss() -> None:
    assert Seq2Seq().derived({"loss": 1.0})["perplexity"] == pytest.approx(np.e)
    assert Seq2Seq().derived({"loss": 1e4})["perplexity"] == float("inf")


def test_build_config__new_models__start_as_the_architecture_does() -> None:
    t5, bart, marian = (build_config(ModelSpec(architecture=name), SHAPE) for name in ("t5", "bart", "marian"))
    assert (t5.decoder_start_token_id, t5.pad_token_id, t5.eos_token_id) == (PAD, PAD, EOT)
    assert (bart.decoder_start_token_id, bart.forced_eos_token_id) == (EOT, EOT)
    assert marian.decoder_start_token_id == PAD


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        ({"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}, 222_903_552),
        ({"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "vocab_size": 32128}, 737_668_096),
    ],
)
def test_inspect__t5__counts_the_published_parameters(keys: dict[str, int], count: int) -> None:
    info = TransformersFamily().inspect(ModelSpec.model_validate({"architecture": "t5", **keys}), SHAPE)
    assert info.num_parameters == count
    assert info.num_layers == 2 * info.num_encoder_layers == 2 * keys["num_layers"]
    width, layers, inner = keys["d_model"], keys["num_layers"], keys["d_ff"]
    encoder = layers * (4 * width**2 + 2 * width * inner)
    decoder = layers * (6 * width**2 + 2 * width * inner) + width * keys["vocab_size"]  # queries and outputs
    of_sources = encoder + layers * 2 * width**2  # keys and values of cross attention
    relative = 2 * 32 * keys["num_heads"]  # tables that are looked up
    assert info.num_source_matmul_parameters == of_sources
    assert info.num_matmul_parameters == pytest.approx(of_sources + decoder, abs=relative)


def test_inspect__folder_without_a_first_token__is_refused(tmp_path: Path) -> None:
    AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **T5, vocab_size=VOCAB)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        TransformersFamily().inspect(ModelSpec(from_pretrained=str(tmp_path)), SHAPE)


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_inspect__adapters_on_an_encoder_decoder__are_counted_and_leave_the_rest(
    architecture: str, tmp_path: Path
) -> None:
    small(architecture).save_pretrained(tmp_path)
    spec = ModelSpec.model_validate(
        {"from_pretrained": str(tmp_path), "lora": {"rank": 2, "targets": "all-linear"}}
    )
    info = TransformersFamily().inspect(spec, SHAPE)
    assert 0 < info.num_trainable_parameters < info.num_parameters / 4
    assert 0 < info.num_frozen_source_matmul_parameters <= info.num_source_matmul_parameters
