"""Pairs of texts: what becomes of records, and which of them cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, processors

from forge.config.data import DataSpec, PairSpec
from forge.data import look
from forge.data.example_store import ExampleRows
from forge.data.formats.base import Example, FormatContext
from forge.data.formats.pair import PairFormat
from forge.data.formats.registry import PART_NAMES
from forge.data.look import look_at_corpus
from forge.data.prepare import open_rows, prepare
from forge.data.rows import IGNORED
from forge.data.sources.base import Record
from forge.data.text_frame import text_frame
from forge.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from forge.data.view import ObjectiveView, view_corpus
from forge.errors import DataError
from tests.support.jobs import tiny_job

SEQ_LEN = 24
TOKENIZER = train_tokenizer(["an old house"], vocab_size=257)  # bytes


def format_of(tokenizer: TextTokenizer = TOKENIZER, *, seq_len: int = SEQ_LEN, **pair: Any) -> PairFormat:
    backend = Tokenizer.from_str(tokenizer.content)
    context = FormatContext(
        seq_len=seq_len,
        text_key="text",
        eot_id=tokenizer.eot_id,
        vocab_size=tokenizer.vocab_size,
        encode=lambda text: np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.int64),
        tokenizer=tokenizer,
        pair=PairSpec(**pair),
    )
    return PairFormat(context)


def example_of(fields: Any, *, form: PairFormat | None = None) -> Example:
    (example,) = (form or format_of()).examples(Record(name="a:1", location="a.jsonl:1", fields=fields))
    return example


def text_of(example: Example, part: int) -> str:
    ids = example.arrays["tokens"][example.arrays["part"] == part].tolist()
    return str(Tokenizer.from_str(TOKENIZER.content).decode(ids, skip_special_tokens=False))


def test_examples__a_pair__is_both_texts_each_with_its_end() -> None:
    example = example_of({"source": "an old house", "target": "old"})
    assert (text_of(example, 1), text_of(example, 2)) == ("an old house<|endoftext|>", "old<|endoftext|>")
    tokens, targets = example.arrays["tokens"], example.arrays["targets"]
    assert targets.tolist() == [IGNORED] * 13 + tokens[13:].tolist()
    assert example.weight == 4


def test_examples__keys_within_a_table_and_a_prefix__are_followed() -> None:
    form = format_of(source="translation.en", target="translation.de", prefix="to German: ")
    example = example_of({"id": 1, "translation": {"en": "a house", "de": "Haus"}}, form=form)
    assert (text_of(example, 1), text_of(example, 2)) == ("to German: a house<|endoftext|>", "Haus<|endoftext|>")
    whole = format_of(source="a.b", target="c")  # a name that has a dot itself
    assert text_of(example_of({"a.b": "x", "c": "y"}, form=whole), 1) == "x<|endoftext|>"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"source": "a"}, "no key 'target' (data.pair.target); the keys are: 'source'"),
        ({"source": "a", "target": 3}, "'target' must be a string, it is a number"),
        ({"source": "a", "target": None}, "'target' must be a string, it is null"),
        ({"source": "a", "target": ["b"]}, "'target' must be a string, it is a list"),
        ({"source": "a", "target": " \n"}, "'target' is empty"),
        ({"source": "", "target": "b"}, "'source' is empty"),
        ({"source": "a\ud800", "target": "b"}, "not valid Unicode: half a surrogate pair at character 1"),
        (
            {"source": "a" * 30, "target": "b"},
            "the pair has 33 tokens (source 31, target 2), more than data.seq_len",
        ),
        ({"source": "a", "target": "b" * 30}, "the pair has 33 tokens (source 2, target 31)"),
        ({"source": "a" * 10_000, "target": "b"}, "the source has 10,000 characters, more than 6,144"),
    ],
)
def test_examples__records_that_are_no_pairs__are_refused_by_name(fields: Any, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        example_of(fields)
    assert str(caught.value).startswith("a.jsonl:1: ") and problem in str(caught.value)


def test_examples__truncation_source__cuts_it_and_counts() -> None:
    form = format_of(truncation="source")
    example = example_of({"source": "a" * 30, "target": "bcd"}, form=form)
    assert text_of(example, 1) == "a" * 19 + "<|endoftext|>" and text_of(example, 2) == "bcd<|endoftext|>"
    assert len(example.arrays["tokens"]) == SEQ_LEN
    assert form.counts() == {"sources cut at seq_len": 1}
    with pytest.raises(DataError, match=r"raise data\.seq_len$"):
        example_of({"source": "a", "target": "b" * 30}, form=form)  # no source would be left


def test_text_frame__tokenizer_with_a_template__has_its_tokens(tmp_path: Path) -> None:
    bart = train_tokenizer(["a"], vocab_size=259, special_tokens=["<s>", "[PAD]"])
    backend = Tokenizer.from_str(bart.content)
    ids = [(name, backend.token_to_id(name)) for name in ("<s>", "<|endoftext|>")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A <|endoftext|>", special_tokens=ids)
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    config = {"eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="puts <s> around every text"):
        text_frame(load_tokenizer(str(tmp_path)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<s>"}))
    frame = text_frame(load_tokenizer(str(tmp_path)))
    assert (frame.before, frame.after) == ((1,), (0,))
    assert (text_frame(TOKENIZER).before, text_frame(TOKENIZER).after) == ((), (0,))


@pytest.fixture
def pairs(tmp_path: Path) -> Callable[..., DataSpec]:
    def pairs(*lines: str, **changes: Any) -> DataSpec:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(line + "\n" for line in lines))
        body = {
            "files": (str(path),),
            "format": "pair",
            "tokenizer": {"vocab_size": 300, "special_tokens": ["[PAD]"]},
        }
        return DataSpec(**body | {"seq_len": SEQ_LEN, "held_out": 0.2} | changes)

    return pairs


GOOD = [json.dumps({"source": f"number {n}", "target": f"no {n}"}) for n in range(40)]


def test_prepare__pairs__train_a_tokenizer_on_both_and_show_what_carries_loss(
    pairs: Callable[..., DataSpec], tmp_path: Path
) -> None:
    facts = prepare(pairs(*GOOD), cache_dir=tmp_path)
    tokenizer = load_tokenizer(f"{facts.folder}/tokenizer")
    backend = Tokenizer.from_str(tokenizer.content)
    assert backend.encode("number 3").ids[-1] == 0  # as transformers calls it
    assert facts.pad_id == 1 and facts.unigram_perplexity > 1
    train, _ = open_rows(facts)
    assert isinstance(train, ExampleRows) and {"part", "tokens", "targets"} <= set(train.read(np.array([0])))
    view = view_corpus(facts, seed=1, objective=ObjectiveView(predicts_tokens=True, part_names=PART_NAMES["pair"]))
    spans = [(span.text, span.has_loss, span.part) for span in view.examples[0].spans if span.kind == "text"]
    assert [(has_loss, part) for _, has_loss, part in spans] == [(False, "source"), (True, "target")]
    assert spans[0][0].startswith("number ") and spans[1][0].startswith("no ")
    assert view.num_targets == facts.num_train_tokens < view.num_tokens


def test_prepare__bad_pairs__are_named_with_their_lines_or_skipped(
    pairs: Callable[..., DataSpec], tmp_path: Path
) -> None:
    bad = ['{"source": "a"}', '{"source": "a", "target": ""}', "{", json.dumps({"source": "x" * 90, "target": "y"})]
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(TOKENIZER.content)
    loaded = {"from_pretrained": str(tokenizer)}
    with pytest.raises(DataError) as caught:
        prepare(pairs(*GOOD, *bad, tokenizer=loaded), cache_dir=tmp_path)
    message = str(caught.value)
    assert "4 records cannot be used" in message
    assert all(f"pairs.jsonl:{line}" in message for line in (41, 42, 43, 44))
    facts = prepare(pairs(*GOOD, *bad, tokenizer=loaded, on_bad_record="skip"), cache_dir=tmp_path)
    assert facts.num_skipped_records == 4 and facts.num_examples == 40


def test_look_at_corpus__pairs__are_checked_before_they_are_prepared(
    pairs: Callable[..., DataSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look, "_COUNTED_BYTES", 0)
    with pytest.raises(DataError, match=r"pairs.jsonl:2: no key 'target'"):
        look_at_corpus(pairs(GOOD[0], '{"source": "a"}'))
    spelled = look_at_corpus(pairs('{"source": "a [PAD]", "target": "[PAD]"}'), special_tokens=("[PAD]",))
    assert spelled.special_tokens == {"[PAD]": 2}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data__pair": {"prefix": "a"}}, "is only for format: pair, not text"),
        ({"training__spans": {"share": 0.2}}, "is only for objective: span-corruption, not causal-lm"),
        ({"training__objective": "seq2seq"}, "must be pair for training.objective: seq2seq"),
        ({"data__format": "pair", "data__pair": {"target": "source"}}, "is also the source"),
        ({"data__format": "pair", "training__objective": "causal-lm"}, "must be text or chat"),
        ({"training__objective": "span-corruption", "data__seq_len": 4096}, "has 205 spans with training.spans"),
        (
            {"training__objective": "span-corruption"},
            "must be at least 358: bytes, end of text, padding",
        ),
    ],
)
def test_job__keys_that_do_not_fit__are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        tiny_job(**changes)
