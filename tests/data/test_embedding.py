"""Texts that belong together: what an example holds, and which records cannot be used."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from forge.config.embedding import EmbeddingSpec
from forge.data.formats import embedding
from forge.data.formats.base import Example, FormatContext
from forge.data.formats.embedding import EmbeddingFormat
from forge.data.sources.base import Record
from forge.data.tokenizer import TextTokenizer, train_tokenizer
from forge.errors import DataError
from tests.support.objectives import SPECIAL, TEXT


def tokenizer() -> TextTokenizer:
    """One that puts [CLS] and [SEP] around a text."""
    plain = train_tokenizer(TEXT, vocab_size=300, special_tokens=SPECIAL)
    built = Tokenizer.from_str(plain.content)
    ids = [(token, built.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    built.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return TextTokenizer(
        content=built.to_str(), config=plain.config, eot_token=plain.eot_token, eot_id=plain.eot_id, vocab_size=320
    )


TOKENIZER = tokenizer()
WHOLE = Tokenizer.from_str(TOKENIZER.content)


def format_of(*, seq_len: int = 64, **settings: Any) -> EmbeddingFormat:
    return EmbeddingFormat(
        FormatContext(
            seq_len=seq_len, text_key="text", eot_id=0, vocab_size=320, tokenizer=TOKENIZER,
            encode=lambda text: np.array(WHOLE.encode(text, add_special_tokens=False).ids),
            embedding=EmbeddingSpec(**settings),
        )
    )  # fmt: skip


def example_of(fields: dict[str, Any], **settings: Any) -> Example:
    (example,) = format_of(**settings).examples(Record(name="a:3", location="/d/a:3", fields=fields))
    return example


def texts_of(example: Example) -> list[str]:
    tokens, part = example.arrays["tokens"], example.arrays["part"]
    return [
        WHOLE.decode(tokens[part == number].tolist(), skip_special_tokens=False)
        for number in range(1, part.max() + 1)
    ]


def test_examples__triple__has_each_text_as_the_tokenizer_frames_it() -> None:
    fields = {"q": "lazy dog", "positive": "the quick", "negative": ["brown fox", "my box", "liquor"]}
    settings = {"query": "q", "query_prefix": "query: ", "max_negatives": 2}
    example = example_of(fields, **settings)
    expected = ["query: lazy dog", "the quick", "brown fox", "my box"]
    assert texts_of(example) == [f"[CLS]{text}[SEP]" for text in expected]
    assert example.weight == 1.0
    assert (example.arrays["targets"] == example.arrays["tokens"]).all()


def test_examples__name_of_a_special_token_in_a_text__is_ordinary_text() -> None:
    example = example_of({"query": "a [SEP] b", "positive": "c"})
    assert (example.arrays["tokens"] == WHOLE.token_to_id("[SEP]")).sum() == 2


def test_examples__texts_too_long__are_cut_longest_first_and_counted() -> None:
    built = format_of(seq_len=20)
    fields = {"query": "dog", "positive": "the quick brown fox " * 30, "negative": "lazy dog " * 30}
    (example,) = built.examples(Record(name="a", location="a", fields=fields))
    lengths = np.bincount(example.arrays["part"])[1:].tolist()
    query = len(WHOLE.encode("dog").ids)
    assert lengths == [query, (20 - query) // 2, 20 - query - (20 - query) // 2]
    assert all(text.startswith("[CLS]") and text.endswith("[SEP]") for text in texts_of(example))
    assert built.counts()["texts cut at seq_len"] == 2
    assert not built.counts()[embedding._UNREAD]
    list(built.examples(Record(name="a", location="a", fields={"query": "a", "positive": "b", "negatives": ["c"]})))
    assert built.counts()[embedding._UNREAD] == 1
    huge = {"query": "dog", "positive": "a b" * 3_000_000}
    (example,) = built.examples(Record(name="a", location="a", fields=huge))
    assert len(example.arrays["tokens"]) == 20


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"positive": "b"}, "no key 'query'"),
        ({"query": "a", "passage": "b"}, "no key 'positive'.*'query', 'passage'"),
        ({"query": " \n", "positive": "b"}, "'query' is empty"),
        ({"query": "a", "positive": 3}, "'positive' must be a string"),
        ({"query": "a", "positive": ["b"]}, "'positive' must be a string"),
        ({"query": "a", "positive": "b", "negative": {"c": 1}}, "'negative' must be a string or a list"),
        ({"query": "a", "positive": "b", "negative": ["c", None]}, r"negative\[1\] must be a string"),
        ({"query": "a", "positive": "b", "negative": ["c", ""]}, r"negative\[1\] is empty"),
        ({"query": "a", "positive": "b", "negative": ["c", "\ud800"]}, r"negative\[1\] is not valid Unicode"),
        ({"query": "\ud800", "positive": "b"}, "not valid Unicode"),
        ({"query": "a", "positive": "b", "negative": ["c"] * 8}, "10 texts do not fit into data.seq_len: 24"),
    ],
)
def test_examples__unusable_record__is_named_with_its_place(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=f"^/d/a:3.*{problem}"):
        example_of(fields, seq_len=24)
