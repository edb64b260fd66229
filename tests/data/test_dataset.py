"""Data sets in the hub's layout: the same files for each split as in the library `datasets`, and none is run."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge.config.data import DataSpec
from forge.data.corpus import iter_documents
from forge.data.look import look_at_corpus
from forge.data.prepare import prepare
from forge.data.sources import dataset as module
from forge.data.sources.dataset import list_dataset
from forge.errors import DataError


def write(folder: Path, *names: str) -> None:
    """Files whose only record is their own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"text": [name]}), path)
        elif name.endswith((".jsonl", ".json")):
            path.write_text(json.dumps({"text": name}) + "\n")
        elif name.endswith(".csv"):
            path.write_text(f"text\n{name}\n")
        else:
            path.write_text(name)


def spec_of(folder: Path | str, **changes: Any) -> DataSpec:
    return DataSpec(dataset=str(folder), **changes)


def names(folder: Path | str, **changes: Any) -> list[str]:
    return [file.name for file in list_dataset(spec_of(folder, **changes)).files]


LAYOUTS = {
    "shards": [
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/validation-00000-of-00001.parquet",
        "data/my_split-00000-of-00001.parquet",
    ],
    "names": ["train.jsonl", "dev.jsonl", "test.jsonl", "README.md"],
    "names between words": ["my-train_1.csv", "my-val-2.csv", "trainable.csv"],
    "folders": ["train/a.jsonl", "train/deep/b.jsonl", "validation/c.jsonl", "eval/d.jsonl"],
    "folders below": ["data/training/a.parquet", "data/testing/b.parquet"],
    "one file": ["records.jsonl"],
    "no keywords": ["a/x.csv", "b/y.csv"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_list_dataset__layout__has_the_files_that_datasets_finds(tmp_path: Path, layout: str) -> None:
    data_files = pytest.importorskip("datasets.data_files")
    write(tmp_path, *LAYOUTS[layout])
    patterns = data_files.get_data_patterns(str(tmp_path))
    found = data_files.DataFilesDict.from_patterns(patterns, base_path=str(tmp_path))
    for split, files in found.items():
        expected = {str(Path(file).relative_to(tmp_path)) for file in files} - {"README.md"}
        assert set(names(tmp_path, split=str(split))) == expected
    known = set(map(str, found))
    for split in {"train", "validation", "test"} - known:
        with pytest.raises(DataError, match="has no split"):
            names(tmp_path, split=split)


@pytest.mark.parametrize(
    ("split", "file"), [("validation", "dev.jsonl"), ("dev", "dev.jsonl"), ("eval", "test.jsonl")]
)
def test_list_dataset__other_word_for_a_split__is_the_same(tmp_path: Path, split: str, file: str) -> None:
    write(tmp_path, *LAYOUTS["names"])
    assert names(tmp_path, split=split) == [file]


README = """\
---
license: mit
dataset_info:
- config_name: en
  features: [{name: text, dtype: string}]
configs:
- config_name: en
  data_files:
  - split: train
    path: en/part-*.jsonl
  - split: hard
    path:
    - en/hard.jsonl
    - extra/hard-*.jsonl
- config_name: de
  data_dir: de
  data_files: "*.jsonl"
# a comment
- config_name: all
  default: true
  data_files: {train: "**/*.jsonl"}
tags:
- a
---
# The data
configs: not these
"""


def test_list_dataset__configs_of_the_readme__choose_files(tmp_path: Path) -> None:
    write(tmp_path, "en/part-1.jsonl", "en/part-2.jsonl", "en/hard.jsonl", "extra/hard-1.jsonl", "de/a.jsonl")
    (tmp_path / "README.md").write_text(README)
    assert names(tmp_path, subset="en") == ["en/part-1.jsonl", "en/part-2.jsonl"]
    assert names(tmp_path, subset="en", split="hard") == ["en/hard.jsonl", "extra/hard-1.jsonl"]
    assert names(tmp_path, subset="de") == ["de/a.jsonl"]
    assert len(names(tmp_path)) == 5
    with pytest.raises(DataError, match="has no subset 'fr'; its subsets: en, de, all"):
        names(tmp_path, subset="fr")
    (tmp_path / "README.md").write_text(README.replace("  default: true\n", ""))
    with pytest.raises(DataError, match=r"has several subsets; set data\.subset; its subsets: en, de, all"):
        names(tmp_path)


def test_list_dataset__configs_with_names_only__are_split_by_names(tmp_path: Path) -> None:
    write(tmp_path, *LAYOUTS["names"])
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n---\n")
    assert names(tmp_path) == ["train.jsonl"]


@pytest.mark.parametrize("configs", ["configs: [", "configs: 3", "configs: [{data_files: 1}]", "configs:\n- 7"])
def test_list_dataset__configs_that_cannot_be_read__name_the_readme(tmp_path: Path, configs: str) -> None:
    write(tmp_path, "train.jsonl")
    (tmp_path / "README.md").write_text(f"---\n{configs}\n---\n")
    with pytest.raises(DataError, match=r"`configs` in .*README.md cannot be read"):
        names(tmp_path)


def test_list_dataset__several_kinds__reads_that_of_most_files_and_lists_the_others(tmp_path: Path) -> None:
    write(tmp_path, "train-1.parquet", "train-2.parquet", "train.csv", "notes.txt", "test-1.parquet")
    found = list_dataset(spec_of(tmp_path))
    assert [file.name for file in found.files] == ["train-1.parquet", "train-2.parquet"]
    reasons = {Path(one.path).name: one.reason for one in found.skipped}
    assert reasons == {
        "test-1.parquet": "a file of the split test",
        "train.csv": "a file without a split",
        "notes.txt": "a file without a split",
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["data.arrow", "state.json"], "save_to_disk"),
        (["reviews.py"], "runs no code of data sets"),
        (["cat.png"], "has no file of the kinds parquet"),
    ],
)
def test_list_dataset__nothing_to_read__says_what_to_do(tmp_path: Path, files: list[str], message: str) -> None:
    write(tmp_path, *files)
    with pytest.raises(DataError, match=message):
        names(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "a b", "../x", "org/name/more", "org/name@main"])
def test_list_dataset__no_folder_and_no_name__is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"data\.dataset: .* is no folder"):
        names(name)


def test_dataset__prepare__reads_the_split_alone(tmp_path: Path) -> None:
    write(tmp_path / "set", *LAYOUTS["shards"])
    texts = [f"text number {i} with some words" for i in range(200)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "set" / "data" / "train-00000-of-00002.parquet")
    spec = spec_of(tmp_path / "set", tokenizer={"vocab_size": 300}, seq_len=16, packing="examples")
    assert len(list(iter_documents(spec))) == 201
    facts = prepare(spec, cache_dir=tmp_path / "cache")
    assert facts.num_documents == 201 and Path(facts.folder).name.startswith("set-")
    pattern = look_at_corpus(spec).patterns[0]
    assert pattern.pattern.endswith("set, split train") and pattern.num_files == 2
    assert {one.reason for one in pattern.skipped} == {
        "a file of the split my_split",
        "a file of the split validation",
    }


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"dataset": "a/b", "files": ("x",)}, "give one of"),
        ({"files": ("x",), "split": "test"}, "is only for 'dataset'"),
        ({"files": ("x",), "subset": "en"}, "is only for 'dataset'"),
        ({"dataset": "a/b", "revision": "a b"}, "revision"),
    ],
)
def test_spec__keys_that_do_not_fit__are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        DataSpec(**settings)


class Hub(SimpleHTTPRequestHandler):
    """The answers of the hub's API that huggingface_hub needs to list and read one public data set."""

    def __init__(self, *arguments: Any, root: Path) -> None:
        self.root = root
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if re.fullmatch(r"/api/datasets/org/reviews(/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in self._names()]
            self._answer({"id": "org/reviews", "sha": "c" * 40, "siblings": siblings})
        elif match := re.fullmatch(r"/api/datasets/org/reviews/tree/[^/]+/?(.*)", path):
            self._answer(self._tree(match[1], is_recursive="recursive=true" in self.path.lower()))
        elif match := re.fullmatch(r"/datasets/org/reviews/resolve/[^/]+/(.+)", path):
            self._send((self.root / match[1]).read_bytes(), kind="application/octet-stream")
        else:
            self.send_error(404)

    def log_message(self, *_: Any) -> None: ...

    def _names(self) -> list[str]:
        return [str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()]

    def _tree(self, below: str, *, is_recursive: bool) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        folder = self.root / below
        for path in sorted(folder.rglob("*") if is_recursive else folder.iterdir()):
            name = str(path.relative_to(self.root))
            if path.is_dir():
                entries.append({"type": "directory", "path": name, "oid": "0" * 40, "size": 0})
            else:
                entries.append(
                    {"type": "file", "path": name, "oid": f"{len(name):040}", "size": path.stat().st_size}
                )
        return entries

    def _answer(self, body: Any) -> None:
        self._send(json.dumps(body).encode(), kind="application/json")

    def _send(self, content: bytes, *, kind: str) -> None:
        start, stop = 0, len(content)
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, stop = int(found[1]), min(stop, int(found[2]) + 1)
        self.send_response(206 if found else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", '"0"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:stop])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the data set org/reviews on a hub of this machine."""
    from huggingface_hub import HfFileSystem, constants, hf_api, hf_file_system

    root = tmp_path / "reviews"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, root=root))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    for place in (constants, hf_api, hf_file_system):
        if hasattr(place, "ENDPOINT"):
            monkeypatch.setattr(place, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    HfFileSystem.clear_instance_cache()
    yield root
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()
    thread.join()


def test_dataset__name_on_the_hub__is_read_through_huggingface_hub(hub: Path) -> None:
    write(hub, "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "reviews.py")
    (hub / "README.md").write_text("---\nlicense: mit\n---\n")
    spec = spec_of("org/reviews")
    assert [document.text for document in iter_documents(spec)] == ["data/train-00000-of-00001.parquet"]
    assert [document.text for document in iter_documents(spec_of("org/reviews", split="test"))] == [
        "data/test-00000-of-00001.parquet"
    ]
    assert look_at_corpus(spec).patterns[0].pattern == "org/reviews, split train"


def test_dataset__not_on_the_hub__says_so(hub: Path) -> None:
    with pytest.raises(DataError, match=r"data\.dataset: .*org/other"):
        names("org/other")


def test_dataset__code_beside_the_data__is_not_executed(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl")
    (tmp_path / f"{tmp_path.name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert names(tmp_path) == ["train.jsonl"]
    assert not (tmp_path / "ran").exists()
    assert "trust_remote_code" not in Path(module.__file__).read_text()
