"""The held-out records of a source are those whose examples a run does not train on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from forge.config.data import DataSpec
from forge.data import prepare_streams
from forge.data.cache_index import CacheIndex, read_index
from forge.data.example_store import ExampleRows
from forge.data.held_out import held_out_records
from forge.data.prepare import open_rows, prepare
from forge.data.rows import StreamRows
from forge.errors import DataError

TEXTS = [f"document {i} says {i * i} things. " * (i % 5 + 1) for i in range(120)]
TEXTS += TEXTS[:5]  # copies are on one side


def index_of(tmp_path: Path, **settings: Any) -> tuple[DataSpec, CacheIndex, Any]:
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": "ab"[len(text) % 2]}) + "\n" for text in TEXTS))
    given = {"tokenizer": {"vocab_size": 300}, "seq_len": 64, "held_out": 0.2, "files": (str(path),)}
    spec = DataSpec.model_validate(given | settings)
    facts = prepare(spec, cache_dir=tmp_path / "cache")
    return spec, read_index(Path(facts.folder)), open_rows(facts)[1]


def texts_in(held_out: Any, folder: Path) -> list[str]:
    tokenizer = Tokenizer.from_file(str(next(folder.glob("cache/data/*/tokenizer/tokenizer.json"))))
    if isinstance(held_out, StreamRows):
        ids = held_out.stream.read(np.array([0]), held_out.stream.num_tokens - 1)[0]
        return [
            tokenizer.decode(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == 0) + 1) if len(part)
        ]
    assert isinstance(held_out, ExampleRows)
    stored = held_out.numbers_between(0, held_out.num_stored)
    return [tokenizer.decode(held_out.example(number)["tokens"].tolist()) for number in stored]


@pytest.mark.parametrize("is_large", [False, True])
def test_held_out_records__of_a_text__are_those_of_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    if is_large:
        monkeypatch.setattr(prepare_streams, "SMALL_CORPUS_CHARS", 100)
    spec, index, held_out = index_of(tmp_path)
    found = [str(record.fields["text"]) for record in held_out_records(spec, index=index)]
    assert found == texts_in(held_out, tmp_path) and 10 < len(found) < 50


def test_held_out_records__of_labelled_records__are_those_of_the_examples(tmp_path: Path) -> None:
    spec, index, held_out = index_of(tmp_path, format="labelled", packing="none", labels={"kind": "single"})
    found = [str(record.fields["text"]) for record in held_out_records(spec, index=index)]
    assert [text.strip() for text in found] == [text.strip() for text in texts_in(held_out, tmp_path)]
    assert 10 < len(found) < 50


def test_held_out_records__unknown_or_none__are_refused(tmp_path: Path) -> None:
    spec, index, _ = index_of(tmp_path)
    with pytest.raises(DataError, match="do not say which records are held out"):
        list(held_out_records(spec, index=replace(index, held_out_below=None)))
    with pytest.raises(DataError, match=r"data\.held_out is 0"):
        list(held_out_records(spec.model_copy(update={"held_out": 0.0}), index=index))
