from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.config.data import DataSpec
from forge.data.corpus import fingerprint, iter_documents, iter_sample
from forge.data.sources import files as files_module
from forge.data.sources import pieces as pieces_module
from forge.data.sources import stdlib
from forge.data.sources.pieces import PIECE_CHARS
from forge.data.sources.stdlib import StdlibSource
from forge.errors import DataError


def spec_of(*patterns: object, **settings: Any) -> DataSpec:
    return DataSpec(files=tuple(map(str, patterns)), **settings)


def texts_of(*patterns: object, **settings: Any) -> list[str]:
    """Whole documents; pieces are put together again."""
    texts: list[str] = []
    for document in iter_documents(spec_of(*patterns, **settings)):
        if document.starts:
            texts.append("")
        texts[-1] += document.text
    return texts


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


# ---- what is read


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Grüße\nan alle\n")
    assert texts_of(tmp_path / "a.txt") == ["Grüße\nan alle\n"]


def test_text_stays_as_it_is_but_for_the_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\x00\rthree")
    assert texts_of(tmp_path / "a.txt") == ["one\r\ntwo\x00\rthree"]


def test_a_jsonl_line_is_one_document_named_by_file_and_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two\nlines"})
    path.write_text(path.read_text() + '\n  \n{"text": "three"}')
    documents = list(iter_documents(spec_of(path)))
    assert [(d.name, d.text) for d in documents] == [
        ("a.jsonl:1", "one"),
        ("a.jsonl:2", "two\nlines"),
        ("a.jsonl:5", "three"),
    ]


def test_a_parquet_row_is_one_document(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", id=list(range(700)), text=[f"row {i}" for i in range(700)])
    assert texts_of(path) == [f"row {i}" for i in range(700)]


def test_dictionary_and_large_strings_of_parquet_are_text(tmp_path: Path) -> None:
    column = pa.array(["a", "b", "a"])
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": column.cast(kind)}), tmp_path / "a.parquet")
        assert texts_of(tmp_path / "a.parquet") == ["a", "b", "a"]


def test_the_text_key_names_field_and_column(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", {"body": "line", "text": "no"})
    write_parquet(tmp_path / "b.parquet", body=["row"], text=["no"])
    assert texts_of(tmp_path / "*", text_key="body") == ["line", "row"]


@pytest.mark.parametrize(("suffix", "module"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
def test_compressed_files_are_unpacked(tmp_path: Path, suffix: str, module: Any) -> None:
    (tmp_path / f"a.txt{suffix}").write_bytes(module.compress("Grüße\n".encode()))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(module.compress(b'{"text": "line"}\n'))
    assert texts_of(tmp_path / "*") == ["Grüße\n", "line"]


def test_files_of_a_remote_store_are_read_alike(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe({"/corpus/b.txt": b"second", "/corpus/a.txt": b"first", "/corpus/c.jsonl": b'{"text": "third"}'})
    try:
        assert texts_of("memory://corpus/*") == ["first", "second", "third"]
    finally:
        store.rm("/corpus", recursive=True)


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    write_jsonl(tmp_path / "b.jsonl", {"text": ""}, {"text": "x"})
    assert texts_of(tmp_path / "*") == ["x"]


# ---- which files, in which order


def test_files_come_pattern_by_pattern_sorted_within_and_once(tmp_path: Path) -> None:
    for name in ("c.txt", "a.txt", "sub/b.txt", "sub/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path / "c.txt", tmp_path / "**/*.txt") == ["c.txt", "a.txt", "sub/a.txt", "sub/b.txt"]


def test_relative_patterns_start_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    assert texts_of("*.txt") == ["here"]


def test_a_file_whose_name_looks_like_a_pattern_is_found(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("brackets")
    assert texts_of(tmp_path / "a[1].txt") == ["brackets"]


def test_the_standard_library_is_a_corpus_of_megabytes_without_packages_or_tests() -> None:
    files = StdlibSource().files()
    names = [file.name for file in files]
    assert names == sorted(names)
    assert {"json/decoder.py", "asyncio/tasks.py", "dataclasses.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib"}
    assert sum(Path(file.path).stat().st_size for file in files) > 5e6


def test_a_source_that_does_not_decode_is_left_out_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\nx = 'ä'\n".encode("latin-1"))
    (tmp_path / "bad.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "worse.py").write_bytes(b"# coding: no-such-encoding\n")
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    caplog.set_level(logging.INFO)
    texts = [document.text for document in iter_documents(DataSpec(source="python-stdlib"))]
    assert texts == ["x = 1\n", "# coding: latin-1\nx = 'ä'\n"]
    assert "bad.py" in caplog.text and "worse.py" in caplog.text


# ---- long documents


def test_a_long_document_comes_in_marked_pieces_that_make_up_the_whole(tmp_path: Path) -> None:
    text = "".join(f"line {i}: déjà vu\n" for i in range(200_000))
    (tmp_path / "a.txt").write_text(text)
    pieces = list(iter_documents(spec_of(tmp_path / "a.txt")))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.starts for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(0 < len(piece.text) <= PIECE_CHARS for piece in pieces)
    assert len(pieces) > 2


def test_every_kind_of_file_hands_on_long_text_in_the_same_pieces(tmp_path: Path) -> None:
    text = "A line of words.\n" * 150_000
    (tmp_path / "a.txt").write_text(text)
    files = [
        tmp_path / "a.txt",
        write_jsonl(tmp_path / "a.jsonl", {"text": text}),
        write_parquet(tmp_path / "a.parquet", text=[text]),
    ]
    pieces = [[piece.text for piece in iter_documents(spec_of(file))] for file in files]
    assert pieces[0] == pieces[1] == pieces[2]
    assert len(pieces[0]) == 3


@pytest.mark.parametrize(
    ("line", "end_of_piece"),
    [("word\n", "word"), ("x = 1;\n", ";"), ("words; in one line ", "line"), ("日本語", "日")],
)
def test_a_piece_ends_at_a_line_else_at_a_word_else_anywhere(tmp_path: Path, line: str, end_of_piece: str) -> None:
    (tmp_path / "a.txt").write_text(line * (2 * PIECE_CHARS // len(line)))
    first, *_ = iter_documents(spec_of(tmp_path / "a.txt"))
    assert first.text.endswith(end_of_piece)


@given(
    st.lists(st.sampled_from(["a", "é", "日", "😀", "\n", " ", "\r\n"]), min_size=1, max_size=300),
    st.integers(3, 9),
)
def test_pieces_make_up_the_document_whatever_the_blocks(parts: list[str], piece_chars: int) -> None:
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "PIECE_CHARS", piece_chars)
        store = fsspec.filesystem("memory")
        store.pipe("/pieces/a.txt", text.encode())
        pieces = [document.text for document in iter_documents(spec_of("memory://pieces/a.txt"))]
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= piece_chars for piece in pieces)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for factor in (8, 32):
        with (tmp_path / "a.txt").open("w") as file:
            for _ in range(factor):
                file.write("some words in a line\n" * 50_000)
        tracemalloc.start()
        for _ in iter_documents(spec_of(tmp_path / "a.txt")):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 20e6


# ---- the sample for the tokenizer


def test_a_small_corpus_is_sampled_whole(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    assert list(iter_sample(spec_of(tmp_path / "*"), max_chars=1000)) == [f"document {i}" for i in range(5)]


def test_a_sample_is_spread_evenly_over_the_files_and_bounded(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(str(i) * (1000 if i else 10))
    sample = list(iter_sample(spec_of(tmp_path / "*"), max_chars=910))
    assert [len(text) for text in sample] == [10] + [100] * 9
    assert len(list(iter_sample(spec_of(tmp_path / "*"), max_chars=910, max_files=3))) == 3


# ---- the fingerprint


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("same")
    one, two = (fingerprint(spec_of(tmp_path / folder / "*.txt")) for folder in ("one", "two"))
    assert one == two
    (tmp_path / "two/a.txt").write_text("SAME")
    assert fingerprint(spec_of(tmp_path / "two/*.txt")) != one


def test_the_fingerprint_sees_names_and_order(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("same")
    a, b, c = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"
    assert len({fingerprint(spec_of(*files)) for files in ([a, b], [b, a], [a, c], [a, b, c])}) == 4


def test_a_remote_fingerprint_follows_what_the_store_knows() -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/seal/a.txt", b"one")
    first = fingerprint(spec_of("memory://seal/a.txt"))
    assert first == fingerprint(spec_of("memory://seal/a.txt"))
    store.pipe("/seal/a.txt", b"two")
    assert first != fingerprint(spec_of("memory://seal/a.txt"))


# ---- what goes wrong


def test_a_pattern_without_a_match_is_named_with_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"nothing/\*\.txt matches no file \(looked in {tmp_path}\)"):
        texts_of("a.txt", "nothing/*.txt")


def test_a_folder_is_answered_with_the_pattern_for_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder; name the files in it, like .*/\*\*/\*\.txt"):
        texts_of(tmp_path)


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(DataError, match=r"s33://bucket/a\.txt cannot be opened: Protocol not known"):
        texts_of("s33://bucket/a.txt")


def test_a_line_that_is_no_json_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not a line of JSON: Expecting value"):
        texts_of(path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], r"a\.jsonl:1: a line must be a JSON object, this one is a list"),
        ({"body": 1, "title": 2}, r"a\.jsonl:1: no key 'text' \(data\.text_key\); the keys are: 'body', 'title'"),
        ({"text": 7}, r"a\.jsonl:1: 'text' must be a string, it is a number"),
        ({"text": None}, r"a\.jsonl:1: 'text' must be a string, it is null"),
        ({"text": "half \ud800"}, r"a\.jsonl:1: .* half a surrogate pair at character 5"),
    ],
)
def test_a_record_without_usable_text_says_what_is_there(tmp_path: Path, record: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        texts_of(write_jsonl(tmp_path / "a.jsonl", record))


def test_a_parquet_file_without_the_column_names_its_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'text' .*; the columns are: 'body', 'id'"):
        texts_of(write_parquet(tmp_path / "a.parquet", body=["x"], id=[1]))


@pytest.mark.parametrize(("values", "kind"), [([1, 2], "a number"), (["a", None], "null")])
def test_a_parquet_row_that_is_no_string_is_named(tmp_path: Path, values: list[Any], kind: str) -> None:
    with pytest.raises(DataError, match=rf"a\.parquet:\d: 'text' must be a string, it is {kind}"):
        texts_of(write_parquet(tmp_path / "a.parquet", text=values))


def test_a_torn_parquet_file_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["x"])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.parquet is not a readable parquet file"):
        texts_of(path)


@pytest.mark.parametrize("offset", [0, 5, PIECE_CHARS - 1, PIECE_CHARS + 3])
def test_text_that_is_not_utf8_is_named_with_the_byte(tmp_path: Path, offset: int) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * offset + b"\xff" + b"b" * 10)
    with pytest.raises(DataError, match=rf"a\.txt: not UTF-8 at byte {offset};"):
        texts_of(tmp_path / "a.txt")


def test_a_character_cut_off_at_the_end_is_named_where_it_begins(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xe2\x82")
    with pytest.raises(DataError, match="not UTF-8 at byte 3;"):
        texts_of(tmp_path / "a.txt")


def test_a_line_that_is_not_utf8_is_named_with_the_byte_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not UTF-8 at byte 24;"):
        texts_of(tmp_path / "a.jsonl")


def test_a_torn_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text " * 1000)[:-20])
    with pytest.raises(DataError, match=r"a\.txt\.gz cannot be read"):
        texts_of(tmp_path / "a.txt.gz")


def test_a_line_longer_than_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "MAX_RECORD_CHARS", 100)
    with pytest.raises(DataError, match=r"a\.jsonl:1: the line is longer than 100 bytes"):
        texts_of(write_jsonl(tmp_path / "a.jsonl", {"text": "x" * 200}))


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the corpus has no text"):
        texts_of(write_jsonl(tmp_path / "a.jsonl", {"text": ""}))


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    documents = iter_documents(spec_of(tmp_path / "*"))
    next(documents)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataError, match=r"b\.txt cannot be read"):
        next(documents)
