"""Labelled records: which tokens and targets they become, which labels there are, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from forge.config.classification import LabelsSpec
from forge.config.data import DataSpec
from forge.data.cache_index import read_index
from forge.data.formats.base import Example, FormatContext
from forge.data.formats.labelled import LabelledFormat
from forge.data.labels import label_settings
from forge.data.prepare import open_rows, prepare
from forge.data.rows import IGNORED
from forge.data.sources.base import Record
from forge.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from forge.data.view import ObjectiveView, view_corpus
from forge.errors import DataError
from forge.plan.inputs import CorpusInfo
from forge.report.data_view import corpus_facts

TEXTS = ("Ada wrote the first program in London.", "The quick brown fox jumps over the lazy dog; nothing else.")


def byte_level(folder: Path, **changes: Any) -> TextTokenizer:
    """With BERT's template."""
    return train_tokenizer(TEXTS * 20, vocab_size=330, special_tokens=("[PAD]", "[CLS]", "[SEP]"))


def plain(folder: Path) -> TextTokenizer:
    """Of a decoder, without a template."""
    return train_tokenizer(TEXTS * 20, vocab_size=330)


def word_piece(folder: Path) -> TextTokenizer:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz.;", "the", "fox", "quick"]
    vocabulary += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] + ["##ick", "##rote"]
    tokens = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]", "sep_token": "[SEP]"}))
    return load_tokenizer(str(folder))


def record_of(number: int = 1, **fields: Any) -> Record:
    return Record(name=f"a.jsonl:{number}", location=f"/data/a.jsonl:{number}", fields=fields)


def format_of(
    tokenizer: TextTokenizer, records: Sequence[Record], *, seq_len: int = 64, **labels: Any
) -> LabelledFormat:
    return LabelledFormat(
        FormatContext(
            seq_len=seq_len, text_key="text", eot_id=tokenizer.eot_id, vocab_size=tokenizer.vocab_size,
            encode=lambda text: np.array([], dtype=np.int64), tokenizer=tokenizer,
            labels=label_settings(LabelsSpec.model_validate(labels), records, is_sample=False),
        )
    )  # fmt: skip


def examples_of(tokenizer: TextTokenizer, *records: Record, **settings: Any) -> list[Example]:
    labelled = format_of(tokenizer, records, **settings)
    return [example for record in records for example in labelled.examples(record)]


@pytest.mark.parametrize("make", [byte_level, plain, word_piece])
@pytest.mark.parametrize("pair", [None, "the lazy fox"])
def test_examples__a_text_or_a_pair__are_encoded_as_transformers_does(tmp_path: Path, make: Any, pair: Any) -> None:
    tokenizer = make(tmp_path)
    records = [record_of(text="The quick fox.", text_pair=pair, label=label) for label in ("b", "a")]
    found = examples_of(tokenizer, *records)
    own = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.content), model_input_names=["input_ids", "token_type_ids"]
    )
    encoded = own("The quick fox.", pair)
    assert found[0].arrays["tokens"].tolist() == encoded["input_ids"]
    at = len(encoded["input_ids"]) - 1 if make is plain else 0
    assert [example.arrays["targets"][at] for example in found] == [1, 0]
    assert all((np.delete(example.arrays["targets"], at) == IGNORED).all() for example in found)
    assert all(example.weight == 1 for example in found)
    assert ("part" in found[0].arrays) is (pair is not None)
    if pair is not None:
        assert (found[0].arrays["part"] - 1).tolist() == encoded["token_type_ids"]


def test_examples__long_texts__are_cut_as_transformers_does_and_counted(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    text, pair = "the quick brown fox " * 20, "the lazy dog " * 9
    records = [record_of(text=text, text_pair=pair, label="a"), record_of(text="fox", text_pair="dog", label="b")]
    labelled = format_of(tokenizer, records, seq_len=32)
    found = [example for record in records for example in labelled.examples(record)]
    own = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.content))
    expected = own(text, pair, truncation="longest_first", max_length=32)["input_ids"]
    assert found[0].arrays["tokens"].tolist() == expected
    assert labelled.counts()["texts cut at data.seq_len"] == 1


def test_examples__a_huge_text__takes_no_longer_than_its_beginning(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    records = [record_of(text="fox " * 10**7, label="a"), record_of(text="fox", label="b")]
    labelled = format_of(tokenizer, records, seq_len=32)
    assert len(next(labelled.examples(records[0])).arrays["tokens"]) == 32
    assert labelled.counts()["texts cut at data.seq_len"] == 1


def test_examples__names_of_special_tokens__are_ordinary_text(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    (example, _) = examples_of(tokenizer, record_of(text="a [SEP] b", label=0), record_of(text="c", label=1))
    sep = Tokenizer.from_str(tokenizer.content).token_to_id("[SEP]")
    assert np.flatnonzero(example.arrays["tokens"] == sep).tolist() == [len(example.arrays["tokens"]) - 1]


def test_examples__several_labels__are_bits(tmp_path: Path) -> None:
    names = [f"label {number:03}" for number in range(70)]
    records = [record_of(text="a", labels=names), record_of(text="b", labels=[names[69], names[0], names[0]])]
    records.append(record_of(text="c", labels=[]))
    found = examples_of(plain(tmp_path), *records, kind="multi")
    assert [example.arrays["targets"][-1] for example in found] == [70, 2, 0]
    assert [example.weight for example in found] == [1, 1, 1]
    assert found[1].arrays["label_bits"].tolist() == [[1, 0, 1 << 7]]
    assert found[2].arrays["label_bits"].tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(("value", "number"), [(3, 3.0), (-0.5, -0.5), ("1e2", 100.0)])
def test_examples__numbers__are_values(tmp_path: Path, value: Any, number: float) -> None:
    (example,) = examples_of(plain(tmp_path), record_of(text="fox", label=value), kind="regression")
    assert (example.arrays["values"][-1], example.arrays["targets"][-1]) == (number, 0)


@pytest.mark.parametrize("make", [byte_level, plain, word_piece])
def test_examples__words__carry_their_label_at_the_first_token(tmp_path: Path, make: Any) -> None:
    tokenizer = make(tmp_path)
    words, tags = ["Ada", "wrote", "(in", "London)."], ["PER", "O", None, "LOC"]
    listed = record_of(tokens=words, tags=tags)
    written = record_of(text="  Ada wrote\n(in  London).", tags=tags)
    first, second = examples_of(tokenizer, listed, written, kind="token")
    assert first.arrays["tokens"].tolist() == second.arrays["tokens"].tolist()
    assert first.weight == 3
    targets, ids = first.arrays["targets"], first.arrays["tokens"]
    at = np.flatnonzero(targets != IGNORED)
    assert targets[at].tolist() == [2, 1, 0]
    own = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.content))
    encoded = own(" ".join(words), return_offsets_mapping=True)
    assert encoded["input_ids"] == ids.tolist()
    starts = [encoded["offset_mapping"][i][0] for i in at]
    assert [" ".join(words)[start : start + 3].strip() for start in starts] == ["Ada", "wro", "Lon"] or make in (
        byte_level,
        plain,
    )
    assert [word for word, start in zip((0, 4, 14), starts, strict=True) if start not in (word, word - 1)] == []


def test_examples__words_that_are_cut__are_counted(tmp_path: Path) -> None:
    records = [
        record_of(tokens=["fox"] * 40, tags=["O"] * 40),
        record_of(tokens=["dog", "\u200b"], tags=["N", "N"]),
    ]
    labelled = format_of(word_piece(tmp_path), records, kind="token", seq_len=12)
    found = [example for record in records for example in labelled.examples(record)]
    assert found[0].weight == 10
    assert labelled.counts()["labels of words lost by the cut"] == 30
    assert labelled.counts()["labels of words without a token"] == 1


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 9, 2], ("2", "9", "10")),
        ([True, False], ("false", "true")),
        ([1.0, 2, "x"], ("1", "2", "x")),
        (["ä", "z", "Z"], ("Z", "z", "ä")),
    ],
)
def test_label_settings__labels_of_the_records__have_a_fixed_order(labels: list[Any], names: tuple[str]) -> None:
    records = [record_of(text="x", label=label) for label in labels]
    assert label_settings(LabelsSpec(), records, is_sample=False).names == names
    assert label_settings(LabelsSpec(), records[::-1], is_sample=False).names == names


def test_label_settings__too_many_labels__are_refused_with_the_record() -> None:
    records = [record_of(number, text="x", label=f"row {number}") for number in range(1, 2000)]
    with pytest.raises(DataError, match=r"/data/a\.jsonl:1001: 'label' has more than 1,000 different values"):
        label_settings(LabelsSpec(), records, is_sample=False)


def test_label_settings__one_label__is_refused_unless_in_a_sample() -> None:
    records = [record_of(text="x", label="a")] * 3
    with pytest.raises(DataError, match="every record has the label 'a'"):
        label_settings(LabelsSpec(), records, is_sample=False)
    assert label_settings(LabelsSpec(), records, is_sample=True).names == ("a",)


@pytest.mark.parametrize(
    ("kind", "fields", "problem"),
    [
        (
            "single",
            {"text": "x", "label": "goood"},
            r"'goood' is none of the labels \(did you mean 'good'\?\): bad, good",
        ),
        (
            "single",
            {"text": "x", "labl": "good"},
            r"no key 'label' \(data\.labels\.label_key\) \(did you mean 'labl'\?\)",
        ),
        ("single", {"text": "x", "label": None}, r"'label' must be a label, it is null"),
        ("single", {"text": "x", "label": {}}, r"'label' must be a label, it is an object"),
        ("single", {"text": "x", "label": ["good"]}, r"'label' is a list; several labels need .*kind: multi"),
        ("single", {"text": "x", "label": " "}, r"'label' is an empty label"),
        ("single", {"text": "x", "label": 1.5}, r"'label' must be a label, it is a number"),
        ("single", {"text": " \n", "label": "good"}, r"'text' is empty"),
        ("single", {"text": 3, "label": "good"}, r"'text' must be a string, it is a number"),
        ("single", {"text": "x", "text_pair": "", "label": "good"}, r"'text_pair' is empty"),
        ("single", {"text": "x", "text_pair": 3, "label": "good"}, r"'text_pair' must be a string"),
        ("single", {"text": "x\ud800", "label": "good"}, r"not valid Unicode"),
        ("single", {"text": "\u200b", "label": "good"}, r"'text' is empty"),
        ("single", {"text": "\x01", "label": "good"}, r"finds no token in the text"),
        ("multi", {"text": "x", "labels": "good"}, r"'labels' must be a list, it is a string"),
        ("multi", {"text": "x", "labels": ["good", "odd"]}, r"'odd' is none of the labels"),
        ("multi", {"text": "x", "labels": ["good", None]}, r"'labels\[1\]' must be a label, it is null"),
        ("token", {"tokens": ["a", "b"], "tags": ["good"]}, r"2 words, but 1 labels in 'tags'"),
        ("token", {"tokens": [], "tags": []}, r"'tokens' must be a list of words, it is an empty list"),
        ("token", {"tokens": ["a", ""], "tags": ["good", "bad"]}, r"'tokens\[1\]' must be a word, it is empty"),
        ("token", {"tokens": ["a", 2], "tags": ["good", "bad"]}, r"'tokens\[1\]' must be a word, it is a number"),
        ("token", {"tokens": "ab", "tags": ["good"]}, r"'tokens' must be a list of words, it is a string"),
        ("regression", {"text": "x", "label": "much"}, r"'label' must be a number, it is 'much'"),
        ("regression", {"text": "x", "label": True}, r"'label' must be a number, it is True"),
        ("regression", {"text": "x", "label": None}, r"'label' must be a number, it is null"),
        ("regression", {"text": "x", "label": "nan"}, r"'label' is nan, which is no float32"),
        ("regression", {"text": "x", "label": 1e39}, r"'label' is 1e\+39, which is no float32"),
        ("regression", {"text": "x", "label": 10**400}, r"'label' must be a number"),
    ],
)
def test_examples__unusable_record__is_named(
    tmp_path: Path, kind: str, fields: dict[str, Any], problem: str
) -> None:
    names = {} if kind == "regression" else {"names": ["bad", "good"]}
    labelled = format_of(word_piece(tmp_path), [record_of(**fields)], kind=kind, **names)
    with pytest.raises(DataError, match=problem) as caught:
        list(labelled.examples(record_of(**fields)))
    assert str(caught.value).startswith("/data/a.jsonl:1: ")


def test_init__sequences_too_short_for_the_template__are_refused(tmp_path: Path) -> None:
    records = [record_of(text="a", text_pair="b", label=label) for label in "ab"]
    with pytest.raises(DataError, match="template of the tokenizer adds 3 tokens"):
        format_of(byte_level(tmp_path), records, seq_len=4)


def prepared(folder: Path, lines: list[dict[str, Any]], **data: Any) -> CorpusInfo:
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    body = {
        "files": str(folder / "a.jsonl"), "format": "labelled", "seq_len": 32, "held_out": 0.2,
        "tokenizer": {"vocab_size": 300, "special_tokens": ["[PAD]", "[CLS]", "[SEP]"]},
    } | data  # fmt: skip
    return prepare(DataSpec.model_validate(body), cache_dir=folder / "cache")


def test_prepare__labels__are_counted_on_both_sides_and_part_of_the_digest(tmp_path: Path) -> None:
    lines = [{"text": f"text {number}", "label": "abc"[number % 3]} for number in range(60)]
    facts = prepared(tmp_path, lines)
    labels = facts.labels
    assert labels is not None and labels.names == ("a", "b", "c")
    assert [sum(pair) for pair in zip(labels.train_counts, labels.held_out_counts, strict=True)] == [20, 20, 20]
    assert labels.num_train == sum(labels.train_counts) and 0 < labels.baseline < 0.8
    rows, _ = open_rows(facts)
    arrays = rows.read(np.arange(rows.num_rows))
    chosen = arrays["targets"][arrays["targets"] != IGNORED]
    assert np.bincount(chosen).tolist() == list(labels.train_counts)
    assert facts.pad_id == 1
    other = prepared(tmp_path, lines, labels={"names": ["c", "b", "a"]})
    assert other.digest != facts.digest
    assert other.labels is not None and other.labels.train_counts == labels.train_counts[::-1]
    assert any("3: a, b, c; most frequent: " in text for _, text in corpus_facts(facts))


@pytest.mark.parametrize(
    ("kind", "key", "values", "shown"),
    [
        ("single", "label", ["good", "bad"], {"good", "bad"}),
        ("multi", "labels", [["x", "y"], []], {"x, y", "no label"}),
        ("regression", "label", [1.5, -2], {"1.5", "-2"}),
        ("token", "tags", [["N", "V"], ["V", "N"]], {"N", "V"}),
    ],
)
def test_view__labelled_examples__show_the_names(
    tmp_path: Path, kind: str, key: str, values: list[Any], shown: set[str]
) -> None:
    lines = [{"text": f"fox {number}", key: values[number % 2]} for number in range(20)]
    facts = prepared(tmp_path, lines, labels={"kind": kind})
    view = view_corpus(facts, seed=1, objective=ObjectiveView(predicts_tokens=False))
    targets = {span.target for example in view.examples for span in example.spans if span.has_loss}
    assert targets <= shown and targets
    assert all(not example.arrays for example in view.examples)
    if kind == "multi":
        assert read_index(Path(facts.folder)).labels is not None
        assert facts.labels is not None
        assert sum(facts.labels.train_counts) + sum(facts.labels.held_out_counts) == 20


def test_prepare__bad_records__are_all_counted_with_file_and_line(tmp_path: Path) -> None:
    lines = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(30)]
    lines[4]["label"], lines[9] = "c", {"text": "x"}
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, lines, labels={"names": ["a", "b"]})
    assert "2 records cannot be used" in str(caught.value)
    assert "a.jsonl:5: 'label': 'c' is none of the labels" in str(caught.value)
    assert "a.jsonl:10: no key 'label'" in str(caught.value)
    facts = prepared(tmp_path, lines, labels={"names": ["a", "b"]}, on_bad_record="skip")
    assert facts.num_skipped_records == 2
