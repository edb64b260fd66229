from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from forge.config.data import DataSpec
from forge.data import look
from forge.data.look import look_at_corpus
from forge.errors import DataError
from forge.plan.inputs import CorpusFiles


def looked(*patterns: object, special_tokens: tuple[str, ...] = (), **settings: Any) -> CorpusFiles:
    return look_at_corpus(DataSpec(files=tuple(map(str, patterns)), **settings), special_tokens=special_tokens)


def test_look__patterns__have_files_kinds_sizes_and_what_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / ".hidden").write_text("x")
    for i in range(9):
        (tmp_path / f"empty{i}").touch()
    found = looked(tmp_path / "*.txt", tmp_path / "*")
    first, second = found.patterns
    assert (first.num_files, first.size_bytes, first.kinds) == (1, 9, {"text": 1})
    assert first.examples == (str(tmp_path / "a.txt"),)
    assert second.kinds == {"JSON lines": 1}
    assert {one.reason: (one.count, len(one.examples)) for one in second.skipped} == {
        "a file that an earlier pattern names": (1, 1),
        "a hidden file": (1, 1),
        "an empty file": (9, 5),
    }
    assert (found.num_files, found.num_sampled) == (2, 2)


def test_look__sample__parses_every_kind_and_counts_special_tokens(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text("<|user|> hello <|user|>")
    (tmp_path / "z.jsonl").write_text('{"text": "<|end|>"}\n' * 100)
    found = looked(tmp_path / "*", special_tokens=("<|user|>", "<|end|>", "<|other|>"))
    assert found.num_sampled == 15 + 50
    assert found.special_tokens == {"<|user|>": 30, "<|end|>": 50}


@pytest.mark.parametrize("content", ['{"body": 1}\n', "no json\n", '{"text": 7}\n'])
def test_look__a_sample_that_cannot_be_parsed__is_refused(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look, "_COUNTED_BYTES", 0)
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text("text")
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"a\.jsonl:1: "):
        looked(tmp_path / "*")


def test_look__own_format__needs_no_text_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": 1}\n')
    found = looked(tmp_path / "*", packing="none", format="my_data:Reviews")
    assert found.num_sampled == 1


def test_look__very_many_files__opens_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "MAX_OPENED", 4)
    monkeypatch.setattr(look, "MAX_OPENED_REMOTE", 2)
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("text")
    assert looked(tmp_path / "*").patterns[0].kinds == {"not opened yet": 6, "text": 4}
    store = fsspec.filesystem("memory")
    store.pipe({f"/many/{i}.txt": b"text" for i in range(10)})
    try:
        (found,) = looked("memory://many/*").patterns
        assert (found.kinds, found.size_bytes) == ({"not opened yet": 8, "text": 2}, 40)
    finally:
        store.rm("/many", recursive=True)


def test_look__standard_library__is_counted() -> None:
    found = look_at_corpus(DataSpec(source="python-stdlib"))
    assert found.patterns[0].pattern == "python-stdlib"
    assert found.num_files > 400 and found.size_bytes > 5e6


def test_look__names_that_are_not_unicode__become_printable(tmp_path: Path) -> None:
    name = b"\xff\x1b[2J.txt"
    Path(str(tmp_path).encode().decode() + "/" + name.decode(errors="surrogateescape")).write_text("text")
    found = looked(tmp_path / "*")
    json.dumps(found.patterns[0].examples, ensure_ascii=False).encode()
    assert "\x1b" not in found.patterns[0].examples[0]
