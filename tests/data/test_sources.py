"""Which files a pattern gives, as what they are read, what is refused, and what an odd record costs."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import socket
import subprocess
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.config.data import DataSpec
from forge.data.corpus import iter_documents
from forge.data.sources import json_values
from forge.data.sources.detect import open_content
from forge.data.sources.files import FileSource
from forge.data.sources.json_values import UnparsedJson, ValueReader, find_end, parse_record
from forge.data.sources.listing import list_files
from forge.errors import DataError

LINES = '{"text": "one"}\n{"text": "two"}\n'


def texts_of(*patterns: object, **settings: Any) -> list[str]:
    spec = DataSpec(files=tuple(map(str, patterns)), **settings)
    return [document.text for document in iter_documents(spec)]


def kind_of(path: Path, *, file_type: Any = "auto") -> str:
    (file,) = FileSource(patterns=(str(path),)).files()
    with open_content(file, file_type=file_type, text_key="text") as (content, _):
        return content.kind


def skipped_of(*patterns: object) -> dict[str, str]:
    """Why each path was skipped, by its name."""
    return {
        Path(one.path).name: one.reason
        for matched in list_files(list(map(str, patterns)))
        for one in matched.skipped
    }


def compressed(content: bytes, name: str) -> bytes:
    match name:
        case "gzip":
            return gzip.compress(content)
        case "bzip2":
            return bz2.compress(content)
        case "xz":
            return lzma.compress(content)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, name) as stream:
        stream.write(content)
    return bytes(sink.getvalue())


# ---- kinds


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.ndjson", LINES, "JSON lines"),
        ("a.jsonlines", LINES, "JSON lines"),
        ("a.json", LINES, "JSON lines"),
        ("a.JSON", LINES.strip(), "JSON lines"),
        ("a.json", '[{"text": "one"}, {"text": "two"}]', "JSON array"),
        ("a.jsonl", '[\n {"text": "one"},\n {"text": "two"}\n]\n', "JSON array"),
        ("a.json", '{\n "text": "one"\n}\n{\n "text": "two"\n}', "JSON objects"),
        ("part-00000", LINES, "JSON lines"),
        ("a.txt", LINES, "JSON lines"),
        ("a.data", '[{"text": "one"}, {"text": "two"}]', "JSON array"),
        ("a.csv", 'id,text\n1,one\n2,"two"\n', "CSV"),
        ("a.csv", "id;text\n1;one\n2;two\n", "CSV"),
        ("a.csv", "\ufefftext\none\ntwo\n", "CSV"),
        ("a.tsv", "id\ttext\n1\tone\n2\ttwo\n", "TSV"),
    ],
)
def test_records__kind_by_name_or_content__are_documents(
    tmp_path: Path, name: str, content: str, kind: str
) -> None:
    (tmp_path / name).write_text(content)
    assert kind_of(tmp_path / name) == kind
    assert texts_of(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize("name", ["gzip", "bzip2", "xz", "zstd", "lz4"])
@pytest.mark.parametrize("suffix", [".gz", ".bin", ""])
def test_compression__by_content__reads_every_frame(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"a.json{suffix}"
    path.write_bytes(b"".join(compressed(line.encode() + b"\n", name) for line in LINES.splitlines()))
    assert kind_of(path) == f"JSON lines, {name}"
    assert texts_of(path) == ["one", "two"]


@pytest.mark.parametrize("name", ["gzip", "bzip2", "xz", "zstd", "lz4"])
def test_compression__cut_short__is_refused(tmp_path: Path, name: str) -> None:
    content = compressed(os.urandom(3000).hex().encode(), name)
    (tmp_path / "a.txt").write_bytes(content[:-20])
    with pytest.raises(DataError, match=r"a\.txt cannot be read"):
        texts_of(tmp_path / "a.txt")


def test_name_of_a_compression__plain_content__is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_text(LINES)
    assert kind_of(tmp_path / "a.jsonl.gz") == "JSON lines"
    assert texts_of(tmp_path / "a.jsonl.gz") == ["one", "two"]


def archive(kind: str) -> bytes:
    sink = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(sink, "w") as file:
            file.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=sink, mode=kind) as file:
            entry = tarfile.TarInfo("a.txt")
            entry.size = 4
            file.addfile(entry, io.BytesIO(b"text"))
    return sink.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tar", archive("w"), "is an archive; unpack it .tar"),
        ("a.txt", archive("w"), "is an archive; unpack it .tar"),
        ("a.tar.gz", archive("w:gz"), "is an archive; unpack it .tar"),
        ("a.tgz", archive("w:gz"), "is an archive; unpack it .tar"),
        ("a.jsonl.zip", archive("zip"), "is an archive; unpack it .unzip"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c\x00\x04", "is an archive; unpack it .7z x"),
        ("a.txt.gz", gzip.compress(gzip.compress(b"text")), "is compressed twice"),
        ("a.jsonl", LFS, "is a pointer of Git LFS or git-annex.*git lfs pull"),
        ("a.parquet", LFS, "is a pointer of Git LFS"),
        ("a.ipynb", b'{"cells": []}', "is a notebook; convert it: jupyter.*data.file_type: text"),
        ("a.txt", "Grüße".encode("utf-16"), "is UTF-16; convert it: iconv"),
        ("a.txt", "plain words".encode("utf-16-le"), "is binary, not text"),
        ("a.txt", b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X", "is a side file of macOS"),
        ("a.arrow", b"ARROW1\x00\x00", "is an Arrow file; convert it"),
        ("a", b"\xff\xff\xff\xff\x10\x00\x00\x00", "is an Arrow file; convert it"),
        ("a.bin", bytes(range(256)), "is binary, not text"),
        ("model.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}", "is a file of weights"),
        ("a.pdf", b"%PDF-1.7\n", "is a document of an office program"),
        ("a.txt.part", b"text", "is an unfinished download"),
        ("a.br", b"\x0b\x02\x80text", "is compressed in a way that is not read"),
    ],
)
def test_no_documents__by_content_or_name__are_refused_with_advice(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts_of(tmp_path / "*")


@pytest.mark.parametrize("start", ["ORCs and elves", "RIFFs", "ID3 tags", "PARENTS", "BZh9 is a magic word", "P"])
def test_text__begins_like_a_binary_format__is_text(tmp_path: Path, start: str) -> None:
    (tmp_path / "a.txt").write_text(start)
    assert texts_of(tmp_path / "a.txt") == [start]


def test_file_type__text__takes_json_and_notebooks_as_they_are(tmp_path: Path) -> None:
    for name in ("a.json", "b.ipynb", "c.csv"):
        (tmp_path / name).write_text(LINES)
    assert texts_of(tmp_path / "*", file_type="text") == [LINES] * 3
    with pytest.raises(DataError, match="is an archive"):
        (tmp_path / "d.txt").write_bytes(archive("w"))
        texts_of(tmp_path / "d.txt", file_type="text")


def test_file_type__without_files__is_refused() -> None:
    with pytest.raises(ValueError, match="is only for 'files'"):
        DataSpec(source="python-stdlib", file_type="text")


# ---- which files


def test_links__to_files_and_folders__are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snap"
    (blobs / "below").mkdir(parents=True)
    snapshot.mkdir()
    (blobs / "1").write_text("one")
    (blobs / "below/b.txt").write_text("two")
    (snapshot / "a.txt").symlink_to("../blobs/1")
    (snapshot / "sub").symlink_to("../blobs/below")
    assert texts_of(snapshot / "*.txt") == ["one"]
    assert texts_of(snapshot / "**/*.txt") == ["one", "two"]
    assert texts_of(snapshot / "*/*.txt") == ["two"]


def test_links__second_name_of_a_file__is_read_once_and_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").symlink_to("a.txt")
    assert texts_of(tmp_path / "*.txt") == ["one"]
    assert skipped_of(tmp_path / "*.txt") == {"b.txt": "a second name of a file that is read"}


@pytest.mark.parametrize("target", [".", "..", "../sub"])
def test_links__a_loop_of_folders__ends_and_is_said(tmp_path: Path, target: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.txt").write_text("one")
    (tmp_path / "sub/loop").symlink_to(target)
    assert texts_of(tmp_path / "**/*.txt") == ["one"]
    assert skipped_of(tmp_path / "**/*.txt") == {"loop": "a second name of a folder that is read"}


def test_links__folders_that_link_to_each_other_twice__take_no_exponential_time(tmp_path: Path) -> None:
    for i in range(25):
        (tmp_path / f"d{i}").mkdir()
        (tmp_path / f"d{i}/a.txt").write_text(str(i))
        for name in ("x", "y"):
            (tmp_path / f"d{i}/{name}").symlink_to(f"../d{(i + 1) % 25}")
    assert len(texts_of(tmp_path / "**/*.txt")) == 25


@pytest.mark.parametrize("pattern", ["*.txt", "a.txt"])
@pytest.mark.parametrize("target", ["missing", "a.txt"])
def test_links__to_nothing__are_refused(tmp_path: Path, pattern: str, target: str) -> None:
    (tmp_path / "a.txt").symlink_to(target)
    with pytest.raises(DataError, match=rf"a\.txt (is a link to {target}, which does not exist|cannot be listed)"):
        texts_of(tmp_path / pattern)


def test_wildcards__side_files__are_left_out_and_said(tmp_path: Path) -> None:
    for name in (
        "a.jsonl",
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        "._a.jsonl",
        ".hidden.jsonl",
        "__MACOSX/a.jsonl",
        ".git/a.jsonl",
        "a.jsonl~",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(LINES)
    (tmp_path / "empty.jsonl").touch()
    assert texts_of(tmp_path / "**/*.jsonl*") == ["one", "two"]
    assert skipped_of(tmp_path / "**/*.jsonl*") == {
        ".ipynb_checkpoints": "a folder of copies that Jupyter keeps",
        "._a.jsonl": "a side file of macOS",
        ".hidden.jsonl": "a hidden file",
        "__MACOSX": "a folder of side files of macOS",
        ".git": "a hidden folder",
        "a.jsonl~": "a backup of an editor",
        "empty.jsonl": "an empty file",
    }
    assert texts_of(tmp_path / ".hidden.jsonl", tmp_path / ".git/*") == ["one", "two"] * 2


def test_wildcards__folders_below_two_stars__are_skipped_once_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a/.git").mkdir(parents=True)
    (tmp_path / "a/b.txt").write_text("one")
    (matched,) = list_files([str(tmp_path / "**/*")])
    assert [(one.path, one.reason) for one in matched.skipped] == [(f"{tmp_path}/a/.git/", "a hidden folder")]


def test_wildcards__nothing_to_read__says_what_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"matches no file to read; skipped: .*a\.txt is an empty file"):
        texts_of(tmp_path / "*")


def test_wildcards__sockets_pipes_and_folders__are_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        assert texts_of("*") == ["one"]
        reasons = skipped_of("*")
    assert reasons["pipe"] == "a named pipe" and reasons["socket"] == "a socket"
    assert reasons["folder"].startswith("a folder")
    with pytest.raises(DataError, match="is a named pipe, not a file"):
        texts_of("pipe")


@pytest.mark.parametrize("folder", ["data [v2]", "[x]", "a*b", "[!a]"])
def test_brackets__in_the_name_of_a_folder__are_literal(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "a.txt").write_text("one")
    assert texts_of(tmp_path / folder / "*.txt") == ["one"]
    assert texts_of(tmp_path / folder / "a.txt") == ["one"]
    assert texts_of(tmp_path / folder / "[a-c].txt") == ["one"]


def test_brackets__in_a_remote_folder__are_literal_if_nothing_else_matches() -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/odd [v2]/a.txt", b"one")
    try:
        assert texts_of("memory://odd [v2]/*.txt") == ["one"]
    finally:
        store.rm_file("/odd [v2]/a.txt")


def test_remote_wildcards__side_files__are_left_out(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe({"/side/a.txt": b"one", "/side/._a.txt": b"x", "/side/.ipynb_checkpoints/b.txt": b"x"})
    try:
        assert texts_of("memory://side/**") == ["one"]
        assert sorted(skipped_of("memory://side/**")) == ["._a.txt", "b.txt"]
    finally:
        store.rm("/side", recursive=True)


class _Quiet(SimpleHTTPRequestHandler):
    """A web server without ranges, which also refuses HEAD if the name says so."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        if "nohead" in self.path:
            self.send_error(405)
        else:
            super().do_HEAD()


def test_web_server__without_ranges__is_read_by_content(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "nohead.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(LINES.encode()) * 2)
    (tmp_path / "b.txt").write_text("text")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert texts_of(f"{url}/a.jsonl.gz", f"{url}/b.txt?x=1") == ["one", "two"] * 2 + ["text"]
        assert texts_of(f"{url}/nohead.jsonl.gz") == ["one", "two"] * 2
        with pytest.raises(DataError, match="matches no file"):
            texts_of(f"{url}/missing.txt")
        server.shutdown()


def test_home__in_a_pattern__is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    assert texts_of("~/*.txt") == texts_of("~/a.txt") == ["one"]


def test_deep_folders__more_than_pythons_recursion__are_walked(tmp_path: Path) -> None:
    subprocess.run(["mkdir", "-p", "/".join(["d"] * 1100)], cwd=tmp_path, check=True)
    (tmp_path / "a.txt").write_text("one")
    try:
        assert texts_of(tmp_path / "**/*.txt") == ["one"]
    finally:
        subprocess.run(["rm", "-r", "d"], cwd=tmp_path, check=True)  # pytest removes folders by recursion


# ---- odd records

DEEP = "[" * 100_000 + "]" * 100_000
ODD_FIELDS = [
    '"n": ' + "9" * 5000,
    '"n": -' + "9" * 500_000,
    f'"n": {DEEP}',
    '"n": ' + '{"a":' * 50_000 + "1" + "}" * 50_000,
    '"n": "\\ud800"',
    '"\\udc00": 1',
    '"n": NaN, "m": -Infinity, "o": 1e999999',
    '"n": 1, "n": 2',
    '"n": {"text": 1}',
    '"": ""',
    '"n": [' + "[]," * 100_000 + "0]",
]


@pytest.mark.parametrize("odd", ODD_FIELDS, ids=range(len(ODD_FIELDS)))
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_record__an_odd_field_that_is_not_in_use__costs_nothing(tmp_path: Path, odd: str, name: str) -> None:
    records = [f'{{"text": "one", {odd}}}', f'{{{odd}, "text": "two"}}']
    content = "\n".join(records) if name == "a.jsonl" else f"[{', '.join(records)}]"
    (tmp_path / name).write_text(content)
    assert texts_of(tmp_path / name) == ["one", "two"]
    (tmp_path / name).write_text(content)
    fields = [record.fields for record in FileSource(patterns=(str(tmp_path / name),)).records()]
    assert [one["text"] for one in fields] == ["one", "two"]  # of a format that uses every field


def test_record__bytes_that_are_not_utf8_in_another_field__cost_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one", "author": "J\xf6rg"}\n')
    assert texts_of(tmp_path / "a.jsonl") == ["one"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"text": "a", "text": "b"}', "the key 'text' has two different values"),
        (f'{{"text": {DEEP}}}', "must be a string, it is a long or deeply nested value"),
        (f'{{"text": {"9" * 5000}}}', "must be a string, it is a number"),
        (DEEP, "must be a JSON object, this one is"),
        ("9" * 5000, "must be a JSON object, this one is a number"),
        (f'{{"text": "a", "n": {DEEP}', "not a line of JSON"),
        (f'{{"text": "a", "n": {DEEP}}} x', "something follows"),
    ],
)
def test_record__odd_where_it_matters__is_refused_with_its_line(tmp_path: Path, record: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + record + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{message}"):
        texts_of(tmp_path / "a.jsonl")


def test_record__larger_than_the_bound__parses_only_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "_LARGE_CHARS", 100)
    text = json.dumps({"n": list(range(200)), "text": "x" * 200, "m": {"text": 1}})
    assert parse_record(text, columns=("text",))["text"] == "x" * 200
    everything = parse_record(text, columns=None)
    assert everything["text"] == "x" * 200 and everything["m"] == {"text": 1}
    assert isinstance(everything["n"], UnparsedJson)


def test_record__table_of_records_under_their_keys__is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({f"{number:x}": 0 for number in range(600_000)}))
    with pytest.raises(DataError, match=r"a\.json:1: .*more than 100,000 keys; .*one to a line"):
        texts_of(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}', "ends within its array"),
        ('[{"text": "a"}, {"text": ', "ends within a value"),
        ('[{"text": "a"} {"text": "b"}]', "a comma is missing"),
        ('[{"text": "a"},]', "ends within a value, or the value is not JSON"),
        ('[{"text": "a"}] x', "something follows the end of the array"),
        ('["a"]', "not a line of JSON|must be a JSON object"),
        ('{"data": [{"text": "a"}]}', "no key 'text'.*the keys are: 'data'; if its records are in 'data', .*jq -c"),
    ],
)
def test_json__not_a_list_of_objects__is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=rf"a\.json:\d: .*({message})"):
        texts_of(tmp_path / "a.json")


def test_value_reader__any_block_size__gives_the_same_values() -> None:
    values = [{"text": 'a "quoted" [text]', "n": [1, {"b": "]"}]}, {"text": "\\"}, {"text": "é" * 30}]
    for text in (json.dumps(values), json.dumps(values, indent=2), "\n".join(map(json.dumps, values))):
        for size in (1, 2, 3, 7, 1000):
            blocks = [text[i : i + size] for i in range(0, len(text), size)]
            found = [json.loads(one) for _, one in ValueReader(blocks, location="a.json")]
            assert found == values
    assert find_end("[1", 0) is None and find_end('"a', 0) is None


JSON_VALUES = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('ab"\\\\[]{},: é😀\n'), max_size=9),
    lambda below: st.lists(below, max_size=5) | st.dictionaries(st.text('a"[}', max_size=3), below, max_size=4),
    max_leaves=40,
)


@given(
    st.lists(JSON_VALUES, min_size=1, max_size=4),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.sampled_from([2, 256]),
)
def test_find_end__any_json__is_where_python_ends_it(
    values: list[Any], indent: int | None, is_ascii: bool, window: int
) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=is_ascii)
    with pytest.MonkeyPatch.context() as patch:
        pattern = json_values._WINDOW.pattern.replace("4096", str(window)).replace("{1,256}", f"{{1,{window}}}")
        patch.setattr(json_values, "_WINDOW", re.compile(pattern, re.DOTALL))
        assert find_end(text + ' ,"]', 0) == len(text)
        assert find_end(text[:-1], 0) is None
        found = [json.loads(one) for _, one in ValueReader([text], location="a.json")]
    assert found == values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n1,a,b\n", r"a\.csv:2: the row has 3 columns, the header 2"),
        ("id,text\n1\n", r"a\.csv:2: the row has 1 columns, the header 2"),
        ('id,text\n1,"open\n', r"a\.csv:\d: not a row of CSV"),
        ("id,body\n1,a\n", r"a\.csv: no column 'text' \(data.text_key\); the columns are: 'id', 'body'"),
        ("text,text\n1,a\n", r"a\.csv: two columns have the same name"),
    ],
)
def test_csv__a_row_that_does_not_fit__is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        texts_of(tmp_path / "a.csv")


def test_csv__quoted_lines_and_very_long_values__are_kept(tmp_path: Path) -> None:
    long = "x" * 300_000
    (tmp_path / "a.csv").write_text(f'text,id\r\n"two\r\nlines, ""quoted""",1\r\n\r\n{long},2\r\n')
    assert texts_of(tmp_path / "a.csv") == ['two\r\nlines, "quoted"', long]
