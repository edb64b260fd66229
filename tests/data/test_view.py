"""What the plan says about the data: numbers, and the choice of examples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.config.data import DataSpec
from forge.data import prepare_examples
from forge.data.cache_index import read_index
from forge.data.example_store import ExampleRows
from forge.data.formats.base import Example, FormatContext
from forge.data.formats.text import TextFormat
from forge.data.lengths import lengths_of
from forge.data.prepare import open_rows, prepare, prepare_sample
from forge.data.sources.base import Record
from forge.data.sources.build import SampleSize, build_source
from forge.data.store import checksum
from forge.data.tokenizer import Encoder, TextTokenizer, load_tokenizer
from forge.data.view import ObjectiveView, Selection, view_corpus
from forge.errors import ArgumentError, DataError
from forge.plan.data_view import DataView
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import plan_from_json, plan_to_json
from tests.support.jobs import tiny_plan

SIZE = SampleSize(num_records=40, num_chars=1 << 20, num_parts=4)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path: Path = tmp_path_factory.mktemp("records") / "a.jsonl"
    words = ["alpha", "beta", "gamma", "delta"]
    texts = [" ".join(rng.choice(words, size=rng.integers(1, 40))) + f" {i}" for i in range(300)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def spec_of(path: Path, **changes: Any) -> DataSpec:
    body = {"files": (str(path),), "tokenizer": {"vocab_size": 300}, "seq_len": 32, "held_out": 0.1}
    return DataSpec(**body | changes)


def view_of(facts: CorpusInfo, **changes: Any) -> DataView:
    return view_corpus(facts, seed=1, objective=ObjectiveView(predicts_tokens=True), selection=Selection(**changes))


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=200))
def test_lengths_of__any_lengths__are_those_of_numpy(lengths: list[int]) -> None:
    found = lengths_of(Counter(lengths))
    assert found is not None
    quantiles = np.quantile(lengths, [0.5, 0.9, 0.99], method="inverted_cdf").tolist()
    assert [found.median, found.p90, found.p99] == quantiles
    assert (found.count, found.shortest, found.longest) == (len(lengths), min(lengths), max(lengths))
    assert found.mean == pytest.approx(np.mean(lengths))


def test_view__concatenated__has_the_lengths_of_documents_and_whole_sequences(
    records: Path, tmp_path: Path
) -> None:
    facts = prepare(spec_of(records), cache_dir=tmp_path)
    view = view_of(facts)
    encoder = Encoder(load_tokenizer(str(Path(facts.folder) / "tokenizer")))
    texts = [json.loads(line)["text"] for line in records.read_text().splitlines()]
    assert view.lengths == lengths_of(Counter(len(ids) // 2 + 1 for ids in encoder.encode(texts)))
    assert view.num_targets == view.num_tokens == facts.num_train_sequences * 32
    assert [example.num_targets for example in view.examples] == [32, 32, 32]


def test_view__document_in_pieces__counts_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words " * 120_000)
    facts = prepare(spec_of(tmp_path / "a.txt"), cache_dir=tmp_path / "cache")
    lengths = read_index(Path(facts.folder)).lengths
    assert lengths is not None
    assert (lengths.count, lengths.longest) == (1, facts.num_train_tokens + facts.num_held_out_tokens)


def test_view__examples__agrees_with_what_is_stored(records: Path, tmp_path: Path) -> None:
    facts = prepare(spec_of(records, packing="examples"), cache_dir=tmp_path)
    view = view_of(facts, count=1000)
    train, _ = open_rows(facts)
    assert isinstance(train, ExampleRows)
    rows = np.arange(train.num_rows)
    assert view.num_tokens == train.num_tokens(rows).sum()
    assert view.num_targets == train.num_targets(rows).sum()
    assert view.padding == pytest.approx(1 - view.num_tokens / (train.num_rows * 32))
    assert view.lengths is not None and view.lengths.count == facts.num_examples
    assert len(view.examples) == view.num_examples == len({example.index for example in view.examples})
    assert sum(example.num_tokens for example in view.examples) == view.num_tokens
    assert {example.split for example in view.examples} == {"train"}


@pytest.mark.parametrize("packing", ["examples", "none"])
def test_view__index__is_the_order_of_the_records(records: Path, tmp_path: Path, packing: str) -> None:
    facts = prepare(spec_of(records, packing=packing, seq_len=256, held_out=0.3), cache_dir=tmp_path)
    texts = [json.loads(line)["text"] for line in records.read_text().splitlines()]
    view = view_of(facts, index=17, count=20, max_chars=10_000)
    assert [example.index for example in view.examples] == list(range(17, 37))
    for example in view.examples:
        assert "".join(span.text for span in example.spans if span.kind == "text") == texts[example.index]
    assert {example.split for example in view.examples} == {"train", "held_out"}
    held_out = next(example.index for example in view.examples if example.split == "held_out")
    assert view_of(facts, index=held_out, count=1, split="held_out").examples[0].index == held_out
    with pytest.raises(ArgumentError, match="is in the split held_out, not in train"):
        view_of(facts, index=held_out, split="train")
    with pytest.raises(ArgumentError, match=r"no number 300 among the examples; .* from 0 to 299"):
        view_of(facts, index=300)


def test_view__index_of_concatenated_documents__is_the_sequence(records: Path, tmp_path: Path) -> None:
    facts = prepare(spec_of(records), cache_dir=tmp_path)
    for split, rows in zip(("train", "held_out"), open_rows(facts), strict=True):
        shown = view_of(facts, index=1, count=1, split=split, max_chars=10_000).examples[0]
        tokens = rows.read(np.array([1]))
        whole = [*tokens["tokens"][0].tolist(), int(tokens["targets"][0, -1])]
        tokenizer = SpanText(Path(facts.folder))
        assert "".join(span.text for span in shown.spans) == tokenizer.decode(whole)
    with pytest.raises(ArgumentError, match="among the train sequences"):
        view_of(facts, index=10**6)


class SpanText:
    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


class Labelled:
    """A format with a label, a part and a vector for each position."""

    def __init__(self, context: FormatContext) -> None:
        self._context = context

    def examples(self, record: Record) -> Iterator[Example]:
        ids = self._context.encode(record.fields["text"])[:20]
        targets = np.full(len(ids), -100)
        targets[0] = 2
        arrays = {
            "tokens": ids,
            "targets": targets,
            "part": np.arange(len(ids)) // 10,
            "score": np.full(len(ids), 0.5),
            "box": np.arange(len(ids) * 4).reshape(-1, 4),
        }
        yield Example(arrays=arrays, weight=1.0)

    def counts(self) -> Mapping[str, int]:
        return {"texts cut at 20": 7}


def test_view__format_with_parts_labels_and_vectors__shows_all_of_them(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_examples, "build_format", lambda _, *, context: Labelled(context))
    facts = prepare(spec_of(records, packing="examples"), cache_dir=tmp_path)
    view = view_corpus(
        facts, seed=1, objective=ObjectiveView(predicts_tokens=False), selection=Selection(count=300)
    )
    assert view.notes == {"texts cut at 20": 7}
    for example in view.examples:
        assert example.spans[0].target == "2" and example.num_targets == 1
        assert {span.part for span in example.spans} <= {"0", "1"}
        assert example.arrays == {"score": "0.5 at every position", "box": "0, 1, 2, 3, 4, 5, 6, 7, …"}


def test_view__old_cache__has_no_lengths(records: Path, tmp_path: Path) -> None:
    facts = prepare(spec_of(records), cache_dir=tmp_path)
    path = Path(facts.folder) / "index.json"
    body = json.loads(path.read_text())
    del body["lengths"], body["format"], body["blake2b"]
    sum_ = checksum(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    path.write_text(json.dumps({"format": 1, "blake2b": sum_, **body}))
    assert view_of(facts).lengths is None


def test_prepare_sample__reads_a_few_records_of_some_files(tmp_path: Path) -> None:
    for file in range(9):
        lines = (json.dumps({"text": f"file {file} record {i} " + "word " * 20}) for i in range(500))
        (tmp_path / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    spec = spec_of(tmp_path / "*.jsonl", packing="examples", seq_len=64)
    found = [record.fields["text"] for record in build_source(spec, sample=SIZE).records()]
    assert len(found) == 40 and len({text.split()[1] for text in found}) == 4
    folder = tmp_path / "sample"
    folder.mkdir()
    facts = prepare_sample(spec, size=SIZE, folder=folder)
    assert facts is not None and (facts.num_documents, facts.num_examples) == (40, 40)


def test_prepare_sample__huge_records__are_bounded_by_characters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "word " * 10_000}) + "\n" for _ in range(40)))
    size = replace(SIZE, num_chars=100_000)
    assert len(list(build_source(spec_of(tmp_path / "a.jsonl"), sample=size).records())) == 2


def test_prepare_sample__bad_record__is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 7}\n' * 3)
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        prepare_sample(spec_of(tmp_path / "a.jsonl", packing="examples"), size=SIZE, folder=tmp_path)


def test_prepare_sample__less_than_a_sequence__has_no_facts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a few words"}\n' * 3)
    spec = spec_of(tmp_path / "a.jsonl", seq_len=4096)
    assert prepare_sample(spec, size=SIZE, folder=tmp_path) is None


def test_plan__with_a_view__is_read_back(records: Path, tmp_path: Path) -> None:
    view = view_of(prepare(spec_of(records), cache_dir=tmp_path))
    plan = replace(tiny_plan(), view=view)
    assert plan_from_json(plan_to_json(plan)) == plan
    assert "view" not in json.loads(plan_to_json(tiny_plan()))


def test_view__reads_only_what_it_shows(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = prepare(spec_of(records, packing="examples"), cache_dir=tmp_path)
    read: list[int] = []
    monkeypatch.setattr(TextFormat, "examples", lambda *_: pytest.fail("formatted again"))
    monkeypatch.setattr(TextTokenizer, "__init__", lambda *_, **__: pytest.fail("tokenized again"))
    example = ExampleRows.example
    monkeypatch.setattr(ExampleRows, "example", lambda self, number: read.append(number) or example(self, number))
    monkeypatch.setattr(ExampleRows, "read", lambda *_: pytest.fail("read rows"))
    view_of(facts)
    assert len(read) == 3
