"""The data sets of `make fixtures` have the fields that the formats read, and the sizes that their origins have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge.data.conversations import conversation_of
from forge.data.sources.base import Record
from forge.data.tokenizer import load_tokenizer
from tests.support.fixtures import require_fixture


def records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


@pytest.mark.parametrize(
    ("fixture", "file", "fields", "least"),
    [
        ("debian", "sections.jsonl", {"text", "label"}, 50_000),
        ("debian", "summaries.jsonl", {"source", "target"}, 50_000),
        ("debian", "en-de.jsonl", {"source", "target"}, 10_000),
        ("debian", "en-fr.jsonl", {"source", "target"}, 15_000),
        ("functions", "functions.jsonl", {"source", "target"}, 4_000),
        ("preferences", "preferences.jsonl", {"prompt", "chosen", "rejected"}, 150),
    ],
)
def test_records__each_data_set__have_its_fields_and_no_empty_text(
    fixture: str, file: str, fields: set[str], least: int
) -> None:
    count = 0
    for record in records(require_fixture(fixture) / file):
        assert record.keys() == fields and all(value.strip() for value in record.values())
        count += 1
    assert count >= least


def test_sections__are_the_58_of_the_archive() -> None:
    labels = {record["label"] for record in records(require_fixture("debian") / "sections.jsonl")}
    assert len(labels) == 58 and {"games", "python", "science"} <= labels


def test_chat__every_record__is_a_conversation() -> None:
    for fields in records(require_fixture("chat") / "english.jsonl"):
        assert len(conversation_of(Record(name="", location="", fields=fields)).messages) >= 2


def test_minilm__its_tokenizer__is_read() -> None:
    assert load_tokenizer(str(require_fixture("minilm"))).vocab_size == 30_522
