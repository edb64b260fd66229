"""Errors about records of another format name the format that reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forge.config.data import DataSpec
from forge.data.conversations import conversation_of
from forge.data.format_hint import format_hint
from forge.data.preference_pairs import pair_of
from forge.data.prepare import prepare
from forge.data.sources.base import Record
from forge.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
PREFERENCE = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (CHAT, "chat"),
        ({"conversations": [], "id": 1}, "chat"),
        ({"instruction": "a", "input": "", "output": "b"}, "chat"),
        (PREFERENCE, "preference"),
        ({"text": "a", "label": 1}, "labelled"),
        ({"tokens": ["a"], "tags": ["O"]}, "labelled"),
        ({"source": "a", "target": "b"}, "pair"),
    ],
)
def test_format_hint__fields_of_a_format__names_it(record: dict[str, Any], name: str) -> None:
    assert format_hint(record, given="text") == f"; data.format: {name} reads such records"
    assert format_hint(record, given=name) == ""


def test_format_hint__unknown_fields__is_empty() -> None:
    assert format_hint({"content": "a"}, given="text") == ""


@pytest.mark.parametrize(("suffix", "records"), [("jsonl", [CHAT, CHAT]), ("json", [CHAT])])
def test_prepare__conversations_as_text__names_the_format(
    tmp_path: Path, suffix: str, records: list[dict[str, Any]]
) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text("".join(f"{json.dumps(one)}\n" for one in records))
    with pytest.raises(DataError, match=r"no key 'text'.*data\.format: chat reads such records") as caught:
        prepare(DataSpec(files=[str(path)], seq_len=8), cache_dir=tmp_path / "cache")
    assert "jq" not in str(caught.value)


def test_prepare__chat_without_tokenizer__asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(CHAT))
    spec = DataSpec(files=[str(tmp_path / "a.jsonl")], format="chat", seq_len=8)
    with pytest.raises(DataError, match=r"data\.format: chat needs a tokenizer"):
        prepare(spec, cache_dir=tmp_path / "cache")


def test_records__of_the_other_format__name_it() -> None:
    with pytest.raises(DataError, match=r"no conversation.*data\.format: preference reads such records"):
        conversation_of(Record(name="a", location="a:1", fields=PREFERENCE))
    with pytest.raises(DataError, match=r"no 'chosen'.*data\.format: chat reads such records"):
        pair_of(Record(name="a", location="a:1", fields=CHAT))
