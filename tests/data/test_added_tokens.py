"""Special tokens added to a loaded tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from forge.config.data import TokenizerSpec
from forge.data.added_tokens import open_tokenizer, with_added_tokens
from forge.data.tokenizer import Encoder, TextTokenizer, train_tokenizer
from forge.errors import DataError
from tests.support.jobs import tiny_job

NEW = ("<tool>", "</tool>")


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(["the cat sat on the mat and ran " * 20], vocab_size=300)


def test_with_added_tokens__new_and_known_names__new_ids_follow_the_largest(tokenizer: TextTokenizer) -> None:
    grown = with_added_tokens(tokenizer, (*NEW, tokenizer.eot_token))
    added = {token["content"]: token["id"] for token in json.loads(grown.content)["added_tokens"]}
    first = tokenizer.vocab_size
    assert added == {tokenizer.eot_token: tokenizer.eot_id, "<tool>": first, "</tool>": first + 1}
    assert (grown.vocab_size, grown.eot_id) == (first + 2, tokenizer.eot_id)
    assert with_added_tokens(grown, NEW).vocab_size == first + 2


def test_encode__text_spells_an_added_token__is_characters_unless_asked_for(tokenizer: TextTokenizer) -> None:
    grown = with_added_tokens(tokenizer, NEW)
    text = "the <tool>cat</tool>"
    plain = Encoder(grown).encode_word(text)
    parsed = Encoder(replace(grown, special_tokens="parse")).encode_word(text)
    assert plain == Encoder(tokenizer).encode_word(text)
    assert len(parsed) < len(plain)


def test_open_tokenizer__saved_and_loaded_by_transformers__has_the_same_ids(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer.content)
    (tmp_path / "tokenizer_config.json").write_text(tokenizer.config)
    grown = open_tokenizer(TokenizerSpec(from_pretrained=str(tmp_path), add_tokens=NEW))
    assert grown is not None
    (tmp_path / "tokenizer.json").write_text(grown.content)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.convert_tokens_to_ids(list(NEW)) == [tokenizer.vocab_size, tokenizer.vocab_size + 1]
    assert theirs.decode(theirs("<tool>cat").input_ids, skip_special_tokens=True) == "cat"


def test_with_added_tokens__ids_have_gaps__is_refused(tokenizer: TextTokenizer) -> None:
    body = json.loads(tokenizer.content)
    last = max(body["model"]["vocab"], key=body["model"]["vocab"].__getitem__)
    body["model"]["vocab"][last] += 50
    merges = [merge for merge in body["model"]["merges"] if "".join(merge) != last]
    body["model"]["merges"] = merges
    gapped = replace(tokenizer, content=json.dumps(body), vocab_size=tokenizer.vocab_size + 50)
    with pytest.raises(DataError, match="have gaps"):
        with_added_tokens(gapped, NEW)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__tokenizer": {"add_tokens": ["<a>"]}}, "a trained one has special_tokens"),
        ({"data__tokenizer": {"from_pretrained": "t", "add_tokens": ["<a>", "<a>"]}}, "must be different texts"),
        ({"data__tokenizer": {"from_pretrained": "t", "add_tokens": [" "]}}, "must be different texts"),
    ],
)
def test_job__tokens_that_cannot_be_added__are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_job(**changes)


def test_job__tokens_beside_pretrained_weights__stay_with_their_tokenizer() -> None:
    job = tiny_job(model={"from_pretrained": "base"}, data__tokenizer={"add_tokens": ["<a>"]})
    assert job.data.tokenizer == TokenizerSpec(from_pretrained="base", add_tokens=("<a>",))
