"""Records that cannot be used: all are named and counted, or left out, counted and listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forge.config.data import DataSpec
from forge.data import bad_records, look
from forge.data.bad_records import BadRecords
from forge.data.look import look_at_corpus
from forge.data.prepare import open_rows, prepare, prepare_sample
from forge.data.sources.base import Record
from forge.data.sources.build import SampleSize
from forge.errors import DataError

TEXT = "the cat sat on a mat and saw one dog run past. " * 20
GOOD = {"a.jsonl": "", "a.csv": "id,text\n", "a.json": "["}
BAD_LINES = {
    "a.jsonl": ['{"text": ', "[1]", '{"other": 1}', '{"text": 3}', '{"text": "\\ud800"}'],
    "a.csv": ["1,2,3", "1"],
    "a.json": ['{"text": 3}', "7", '{"other": 1}'],
}


def write_corpus(folder: Path, name: str, *, bad: list[str]) -> Path:
    """Write good records with a bad one after each."""
    good = {"a.csv": f'1,"{TEXT}"'}.get(name, json.dumps({"text": TEXT}))
    lines = [line for one in bad for line in (good, one)] + [good]
    end = {"a.json": "]"}.get(name, "")
    path = folder / name
    path.write_text(GOOD[name] + (",\n" if name == "a.json" else "\n").join(lines) + end + "\n")
    return path


def spec_of(path: Path, **changes: Any) -> DataSpec:
    settings: dict[str, Any] = {"tokenizer": {"vocab_size": 300}, "seq_len": 16, "held_out": 0.0}
    return DataSpec.model_validate({"files": (str(path),), **settings, **changes})


@pytest.mark.parametrize("packing", ["concatenate", "examples"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_skip__bad_records_of_each_kind__are_left_out_and_listed(tmp_path: Path, name: str, packing: str) -> None:
    path = write_corpus(tmp_path, name, bad=BAD_LINES[name])
    (tmp_path / "good").mkdir()
    only_good = write_corpus(tmp_path / "good", name, bad=[])
    corpus = prepare(spec_of(path, on_bad_record="skip", packing=packing), cache_dir=tmp_path / "cache")
    expected = prepare(spec_of(only_good, packing=packing), cache_dir=tmp_path / "cache")
    num_good = len(BAD_LINES[name]) + 1
    assert corpus.num_documents == num_good and expected.num_documents == 1
    assert corpus.num_text_bytes == num_good * expected.num_text_bytes
    assert corpus.num_skipped_records == len(BAD_LINES[name]) == len(corpus.skipped_records)
    for number, listed in enumerate(corpus.skipped_records):
        line = 2 * number + (3 if name == "a.csv" else 2)
        assert listed.startswith(f"{path}:{line}: "), listed
    assert open_rows(corpus)[0].num_rows == corpus.num_train_sequences
    again = prepare(spec_of(path, on_bad_record="skip", packing=packing), cache_dir=tmp_path / "cache")
    assert again == corpus, "the cache remembers what was left out"


@pytest.mark.parametrize("packing", ["concatenate", "examples"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_fail__bad_records_of_each_kind__are_all_counted(tmp_path: Path, name: str, packing: str) -> None:
    path = write_corpus(tmp_path, name, bad=BAD_LINES[name] * 3)
    tokenizer = {"from_pretrained": prepared_tokenizer(tmp_path)} if packing == "examples" else {}
    with pytest.raises(DataError) as caught:
        prepare(spec_of(path, packing=packing, tokenizer=tokenizer), cache_dir=tmp_path / "cache")
    count = 3 * len(BAD_LINES[name])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{count} records cannot be used; data.on_bad_record: skip leaves them out:"
    assert lines[1].startswith(f"  {path}:") and lines[-1] == f"  and {count - 5} more"


def prepared_tokenizer(folder: Path) -> str:
    (folder / "text.txt").write_text(TEXT)
    return f"{prepare(spec_of(folder / 'text.txt'), cache_dir=folder / 'cache').folder}/tokenizer"


def test_fail__one_bad_record__is_named_alone(tmp_path: Path) -> None:
    path = write_corpus(tmp_path, "a.jsonl", bad=["[1]"])
    with pytest.raises(DataError, match=rf"^{path}:2: a line must be a JSON object, this one is a list$"):
        prepare(spec_of(path), cache_dir=tmp_path / "cache")


def test_skip__nothing_is_left__says_how_many_were_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[1]\n[2]\n")
    with pytest.raises(DataError, match=r"no text.*"):
        prepare(spec_of(tmp_path / "a.jsonl", on_bad_record="skip"), cache_dir=tmp_path / "cache")
    spec = spec_of(tmp_path / "a.jsonl", on_bad_record="skip", packing="examples")
    with pytest.raises(DataError, match=r"no training example \(2 records: 2 records that cannot be used, .*:1: "):
        prepare(spec, cache_dir=tmp_path / "cache")


def test_look__bad_record_in_the_sample__is_left_to_the_preparation_of_a_small_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_corpus(tmp_path, "a.jsonl", bad=["[1]"])
    assert look_at_corpus(spec_of(path)).num_sampled == 2
    monkeypatch.setattr(look, "_COUNTED_BYTES", 0)
    assert look_at_corpus(spec_of(path, on_bad_record="skip")).num_sampled == 2
    with pytest.raises(DataError, match=f"{path}:2: "):
        look_at_corpus(spec_of(path))
    sampled = SampleSize(num_records=9, num_chars=10_000, num_parts=1)
    path = write_corpus(tmp_path, "a.jsonl", bad=["[1]", "[2]"])
    (tmp_path / "sample").mkdir()
    with pytest.raises(DataError, match=r"^at least 2 records cannot be used"):
        prepare_sample(spec_of(path), size=sampled, folder=tmp_path / "sample")


def test_skip__conversations__are_left_out_with_their_reason(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 40}]
    lines = [{"messages": turns}, {"messages": turns[:1]}, {"prompt": "a", "completion": ""}, {"messages": turns}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    spec = spec_of(
        path,
        format="chat",
        chat={"template": str(tmp_path / "template.jinja")},
        on_bad_record="skip",
        tokenizer={"from_pretrained": prepared_tokenizer(tmp_path)},
    )
    corpus = prepare(spec, cache_dir=tmp_path / "cache")
    assert (corpus.num_documents, corpus.num_skipped_records) == (2, 2)
    assert [line.partition(": ")[2][:40] for line in corpus.skipped_records] == [
        "the conversation has no turn of the assi",
        "message 2 is an empty turn of the assist",
    ]


def test_bad_records__after_the_first__reads_on_for_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_records, "_READ_ON", 3)
    good = Record(name="a", location="a", fields={})
    bad = BadRecords(action="fail")
    read = bad.usable([good] * 9 + [Record(name="b", location="b", fields={}, problem="b: why")] + [good] * 9)
    assert [next(read) for _ in range(11)] == [good] * 11
    with pytest.raises(DataError, match=r"^b: why$"):
        list(read)
