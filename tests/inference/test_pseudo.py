"""Pseudo-log-likelihoods are those of a loop over the tokens, at any order and beyond the model's length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from forge.data.tokenizer import train_tokenizer
from forge.errors import ArgumentError
from forge.inference.loaded import LoadedModel, load
from forge.inference.masked import fill_masks, masked_ids
from forge.inference.pseudo import pseudo_log_likelihoods
from tests.inference.conftest import TEXTS, write_model

POSITIONS = 24


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300, special_tokens=("[CLS]", "[SEP]", "[MASK]", "[PAD]"))
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
    )
    return load(write_model(tmp_path_factory.mktemp("bert"), BertForMaskedLM(config), tokenizer), device="cpu")


def plain(loaded: LoadedModel, ids: list[int], *, mask_id: int) -> float:
    total = 0.0
    for position, token in enumerate(ids):
        if 0 < position < len(ids) - 1:
            masked = torch.tensor([ids])
            masked[0, position] = mask_id
            total += loaded.model(input_ids=masked).logits[0, position].log_softmax(dim=-1)[token].item()
    return total


def test_pseudo_log_likelihoods__texts__are_those_of_a_loop(bert: LoadedModel) -> None:
    texts = ["def train", "the old town", "a"]
    found = pseudo_log_likelihoods(bert, texts)
    mask_id = bert.tokenizer.token_to_id("[MASK]")
    for text, score in zip(texts, found, strict=True):
        ids = bert.tokenizer.encode(text).ids
        assert score.num_tokens == len(ids) - 2, "without [CLS] and [SEP]"
        assert score.total == pytest.approx(plain(bert, ids, mask_id=mask_id), abs=1e-4)
    assert found == pseudo_log_likelihoods(bert, texts[::-1])[::-1], "bit for bit"


def test_pseudo_log_likelihoods__long_text__is_scored_in_parts(bert: LoadedModel) -> None:
    text = " ".join(TEXTS)
    (score,) = pseudo_log_likelihoods(bert, [text])
    assert score.num_tokens == len(bert.tokenizer.encode(text, add_special_tokens=False).ids) > POSITIONS
    assert score.num_bytes == len(text)


def test_load__positions_counted_from_the_padding_token__are_fewer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300, special_tokens=("[CLS]", "[SEP]", "[MASK]", "[PAD]"))
    pad = 4
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=POSITIONS, pad_token_id=pad, **sizes
    )
    roberta = load(write_model(tmp_path, RobertaForMaskedLM(config), tokenizer), device="cpu")
    assert roberta.tokenizer.token_to_id("[PAD]") == pad and roberta.max_positions == POSITIONS - pad - 1
    (score,) = pseudo_log_likelihoods(roberta, [" ".join(TEXTS)])
    assert score.num_tokens > POSITIONS, "in parts for which there are positions"


def test_pseudo_log_likelihoods__empty_text_and_other_models(bert: LoadedModel, llama: LoadedModel) -> None:
    assert pseudo_log_likelihoods(bert, [""])[0].num_tokens == 0
    with pytest.raises(ArgumentError, match="is a causal-lm model"):
        pseudo_log_likelihoods(llama, ["a"])


@pytest.mark.parametrize("text", ["def [MASK]", "the [MASK] town [MASK] runs"])
def test_fill_masks__text_with_masks__has_the_likeliest_tokens_of_transformers(
    bert: LoadedModel, text: str
) -> None:
    ids = masked_ids(bert, text)
    mask_id = bert.tokenizer.token_to_id("[MASK]")
    assert ids.count(mask_id) == text.count("[MASK]")
    (found,) = fill_masks(bert, [ids], num_candidates=3)
    positions = [at for at, token in enumerate(ids) if token == mask_id]
    with torch.inference_mode():
        shares = bert.model(input_ids=torch.tensor([ids])).logits[0, positions].softmax(dim=-1)
    for mask, expected in zip(found, shares, strict=True):
        best = expected.topk(3)
        assert [one.token_id for one in mask] == best.indices.tolist()
        assert [one.probability for one in mask] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert all(one.token for one in mask)
    others = [masked_ids(bert, other) for other in ("[MASK]", "a [MASK] b", "a [MASK] " * 2)]
    assert fill_masks(bert, [*others, ids], num_candidates=3)[-1] == found, "bit for bit in another batch"


def test_fill_masks__what_cannot_be_filled__says_why(bert: LoadedModel, llama: LoadedModel) -> None:
    with pytest.raises(ValueError, match=r"has no \[MASK\]; write it where"):
        masked_ids(bert, "the old town")
    with pytest.raises(ValueError, match=r"has \d+ tokens, and the model reads 24"):
        masked_ids(bert, "town " * 30 + "[MASK]")
    with pytest.raises(ArgumentError, match="top_k is 0; for a mask"):
        fill_masks(bert, [masked_ids(bert, "[MASK]")], num_candidates=0)
    with pytest.raises(ArgumentError, match="is a causal-lm model"):
        masked_ids(llama, "[MASK]")
