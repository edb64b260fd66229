"""A vocabulary larger than the pretrained embedding: added rows are the mean of those there, at any world size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from forge.config.model import ModelSpec
from forge.errors import ModelError, PlanError
from forge.model.families.base import DataShape
from forge.model.families.transformers_family import TransformersFamily
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import make_plan
from tests.support.jobs import CPU, SEQ_LEN, VOCAB, tiny_facts, tiny_job, tiny_plan
from tests.support.ranks import run_ranks

OLD = 100


def save_base(folder: Path, *, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=OLD, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=SEQ_LEN, tie_word_embeddings=tied,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return model


def save_resized(model: Any, folder: Path) -> None:
    """Resize with transformers, then set the new rows to the mean of the old ones."""
    model.resize_token_embeddings(VOCAB, mean_resizing=False)
    with torch.no_grad():
        for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
            module.weight[OLD:] = module.weight[:OLD].double().mean(dim=0).float()
    model.save_pretrained(folder)


@pytest.mark.parametrize(("stage", "world_size", "tied"), [(0, 1, True), (1, 3, False), (3, 2, False)])
def test_train__embedding_is_enlarged__has_the_losses_of_weights_that_were_resized_before(
    corpus: CorpusInfo, tmp_path: Path, stage: int, world_size: int, tied: bool
) -> None:
    save_resized(save_base(tmp_path / "base", tied=tied), tmp_path / "resized")
    changes: dict[str, Any] = {
        "training__zero": {"stage": stage},
        "training__precision": "fp32",
        "training__total_steps": 2,
    }
    losses = []
    for name, keys in (("base", {"resize_embeddings": True}), ("resized", {})):
        plan = tiny_plan(corpus, model={"from_pretrained": str(tmp_path / name), **keys}, **changes)
        losses.append(run_ranks(plan, tmp_path / f"run-{name}", world_size=world_size).losses)
    assert losses[0] == losses[1]


def inspected(folder: Path, vocab_size: int = VOCAB, **keys: Any) -> Any:
    spec = ModelSpec(from_pretrained=str(folder), **keys)
    return TransformersFamily().inspect(spec, DataShape(vocab_size=vocab_size, seq_len=SEQ_LEN, eot_id=0))


def test_inspect__resize_embeddings__says_what_grows(tmp_path: Path) -> None:
    save_base(tmp_path)
    found = inspected(tmp_path, resize_embeddings=True)
    assert found.vocab_size == VOCAB
    assert any(
        "enlarged to 128 rows" in note and "lm_head.weight" in note and "mean of the existing" in note
        for note in found.notes
    )


def test_inspect__tokenizer_fits_the_embedding__nothing_grows(tmp_path: Path) -> None:
    save_base(tmp_path)
    found = inspected(tmp_path, vocab_size=OLD - 5, resize_embeddings=True)
    assert (found.vocab_size, found.notes) == (OLD, ())


def test_inspect__vocab_size_is_set_beside_it__is_the_number_of_rows(tmp_path: Path) -> None:
    save_base(tmp_path)
    spec = ModelSpec.model_validate(
        {"from_pretrained": str(tmp_path), "resize_embeddings": True, "vocab_size": 160}
    )
    found = TransformersFamily().inspect(spec, DataShape(vocab_size=101, seq_len=SEQ_LEN, eot_id=0))
    assert found.vocab_size == 160


def test_make_plan__vocabulary_is_larger_than_the_embedding__is_refused_and_says_the_key(tmp_path: Path) -> None:
    job = tiny_job(model={"from_pretrained": str(tmp_path)})
    corpus = tiny_plan().corpus
    with pytest.raises(PlanError, match=r"28 tokens would have none; set model.resize_embeddings: true") as caught:
        make_plan(job, model=tiny_facts(vocab_size=OLD), corpus=corpus, hardware=CPU)
    assert caught.value.job_key == "model.from_pretrained"


@pytest.mark.parametrize("keys", [{"freeze": ["model.embed_tokens"]}, {"lora": {"rank": 4}}])
def test_inspect__added_rows_would_not_be_trained__is_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    save_base(tmp_path)
    with pytest.raises(ModelError, match="rows that must be trained"):
        inspected(tmp_path, resize_embeddings=True, **keys)


def test_job__resize_embeddings_of_a_new_model__is_refused() -> None:
    with pytest.raises(ValueError, match="is for pretrained weights"):
        tiny_job(model__resize_embeddings=True)
