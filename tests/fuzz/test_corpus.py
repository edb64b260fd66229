"""Odd corpora: files of every kind, broken, mislabelled, oddly named, linked in circles or full of odd values.

Each is looked at as by `forge plan`, and then read or prepared as by `forge train`.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from forge.config.data import DataSpec
from forge.data.corpus import iter_documents
from forge.data.look import look_at_corpus
from forge.data.prepare import prepare
from forge.data.sources.build import build_source
from tests.support.fuzz import NASTY, mutate_bytes, mutate_file, mutate_json, run_cases

TEXTS = [
    "the cat sat on the mat\n",
    "Grüße, 日本語 😀",
    "<|endoftext|>",
    'a "quoted", text; with\ttabs',
    "x" * 3000,
]
SUFFIXES = [
    ".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".md", "", ".gz", ".jsonl.gz", ".json.zst",
    ".txt.bz2", ".csv.xz", ".lz4", ".tar", ".tar.gz", ".zip", ".ipynb", ".bin", ".arrow", ".txt~", ".part",
]  # fmt: skip
STEMS = [
    "a", "b", "data", "[x]", "a[1", "a*b", "a?b", "._a", ".hidden", ".DS_Store", "a b", "-rf", "~", "é", "a\nb",
    "\x1b[2J", "\udcff\udcfe", "n" * 200, "a#b", "%s{0}", "file:", "s3:",
]  # fmt: skip
FOLDERS = [*[""] * 8, "sub/", "sub [v2]/", ".ipynb_checkpoints/", "__MACOSX/", "a/b/c/d/", "*/"]
PATTERNS = [*["**/*"] * 12, "*", "*/*", "**", "**/*.json*", "**/[a-z]*", "[[]x]*", "**/**/*", "sub [v2]/*"]
FILE_TYPES = [*["auto"] * 16, "text", "json", "csv", "parquet"]
PACKINGS = ["concatenate", "concatenate", "examples", "none"]


def records(rng: random.Random) -> list[Any]:
    """Records, most of them with a text, some with odd fields."""
    found: list[Any] = []
    is_odd = rng.random() < 0.2
    for number in range(rng.choice([1, 3, 30])):
        record: Any = {"id": number, "text": rng.choice(TEXTS), "meta": {"tags": ["a", "b"], "n": 1.5}}
        if is_odd and rng.random() < 0.2:
            record = mutate_json(record, rng)
        elif rng.random() < 0.1:
            record["odd"] = mutate_json(rng.choice(NASTY), rng)
        found.append(record)
    return found


def json_text(value: Any, rng: random.Random) -> str:
    indent = rng.choice([None, None, None, 1])
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=indent)
    except RecursionError:
        text = f'{{"id": 1, "text": "deep", "odd": {"[" * 2000}{"]" * 2000}}}'
    if rng.random() < 0.1:
        depth = rng.choice([500, 100_000])
        odd = rng.choice(["9" * 5000, "[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth])
        text = text.replace('"id":', f'"odd": {odd}, "id":', 1)
    return text


def lines(rng: random.Random) -> bytes:
    return "".join(f"{json_text(one, rng)}\n" for one in records(rng)).encode(errors="surrogatepass")


def array(rng: random.Random) -> bytes:
    return json_text(records(rng), rng).encode(errors="surrogatepass")


def table(rng: random.Random) -> bytes:
    sink = io.StringIO()
    writer = csv.writer(sink, delimiter=rng.choice(",;\t|"))
    writer.writerow(["id", "text"])
    writer.writerows([[number, rng.choice(TEXTS)] for number in range(rng.choice([0, 3, 50]))])
    return sink.getvalue().encode()


def parquet(rng: random.Random) -> bytes:
    sink = pa.BufferOutputStream()
    count = rng.choice([0, 1, 300])
    texts = pa.array([rng.choice([*TEXTS, None]) if rng.random() < 0.1 else TEXTS[0] for _ in range(count)])
    odd = pa.array([rng.choice([2**62, -(2**62), 0]) for _ in range(count)], pa.int64()).cast(pa.timestamp("us"))
    columns = {"text": texts, "when": odd, "nested": pa.array([{"a": [1]}] * count)}
    codec = rng.choice(["snappy", "zstd", "none"])
    pq.write_table(pa.table(columns), sink, compression=codec)
    return bytes(sink.getvalue())


def plain(rng: random.Random) -> bytes:
    text = "".join(rng.choice(TEXTS) for _ in range(rng.choice([1, 5, 200])))
    return text.encode(rng.choice([*["utf-8"] * 12, "utf-8-sig", "utf-16", "utf-32", "utf-16-le"]))


def archive(rng: random.Random) -> bytes:
    sink = io.BytesIO()
    if rng.random() < 0.5:
        with zipfile.ZipFile(sink, "w") as file:
            file.writestr("../../a.txt", "text")
    else:
        with tarfile.open(fileobj=sink, mode="w") as tar:
            entry = tarfile.TarInfo("../../a.txt")
            entry.size = 4
            tar.addfile(entry, io.BytesIO(b"text"))
    return sink.getvalue()


def other(rng: random.Random) -> bytes:
    return rng.choice(
        [
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n",
            b"", b"\n", b"\xef\xbb\xbf", b"\x00" * 5000, b"ARROW1\0\0", b"PAR1", b"PAR1\0\0PAR1", b"\xff" * 40,
            b"[" * 300_000, b'{"text": "' + b"a" * 2_000_000, b'"' * 9999, b",\n" * 9999, b"{}\n" * 999,
            b'{"text": "a"}' * 99, b"[]", b"[[]]", b"[{}]", b"null", b'{"text": null}', rng.randbytes(3000),
            b"text\n" + b'"' + b"a,b\n" * 9999, b"\r" * 5000, b'{"cells": []}', b"text\r\none\r\n",
        ]
    )  # fmt: skip


FITTING = {lines: ".jsonl", array: ".json", table: ".csv", parquet: ".parquet", plain: ".txt"}
CONTENTS: list[Callable[[random.Random], bytes]] = [*list(FITTING) * 3, archive, other]


def arrow_compress(name: str) -> Callable[[bytes], bytes]:
    def compress(content: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, name) as stream:
            stream.write(content)
        return bytes(sink.getvalue())

    return compress


COMPRESSIONS: list[Callable[[bytes], bytes]] = [
    gzip.compress, bz2.compress, lzma.compress, arrow_compress("zstd"), arrow_compress("lz4"),
]  # fmt: skip


def content_of(rng: random.Random) -> tuple[bytes, str]:
    """The content of a file, and a suffix that fits more often than not."""
    make_content = rng.choice(CONTENTS)
    content = make_content(rng)
    suffix = FITTING.get(make_content, ".txt") if rng.random() < 0.7 else rng.choice(SUFFIXES)
    if rng.random() < 0.1:
        content = mutate_bytes(content, rng)
    if rng.random() < 0.3:
        compress = rng.choice(COMPRESSIONS)
        content = b"".join([compress(content)] * rng.choice([1, 1, 2]))
        if rng.random() < 0.1:
            content = compress(content)
        if rng.random() < 0.2:
            content = mutate_bytes(content, rng)
    return content, suffix


def make(folder: Path, rng: random.Random) -> None:
    root = folder / "corpus"
    root.mkdir()
    outside = folder / "outside.txt"
    outside.write_text("text outside")
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        content, suffix = content_of(rng)
        stem = rng.choice(STEMS) if rng.random() < 0.6 else "a"
        path = Path(f"{root}/{rng.choice(FOLDERS)}{stem}{suffix}")
        with suppress(OSError):  # a file where a folder is needed
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            if rng.random() < 0.05:
                mutate_file(path, rng, outside=outside)
    if rng.random() < 0.1:
        with suppress(OSError):
            (root / "loop").symlink_to(rng.choice([".", "..", "sub", "loop", "/dev", str(outside)]))
    spec = {
        "files": [f"{root.name}/{rng.choice(PATTERNS)}"],
        "file_type": rng.choice(FILE_TYPES),
        "text_key": rng.choice([*["text"] * 12, "id", '"']),
        "packing": rng.choice(PACKINGS),
        "special_tokens": rng.choice(["text", "parse"]),
        "prepare": rng.random() < 0.15,
    }
    if rng.random() < 0.1:
        names = [path.name for path in sorted(root.iterdir()) if path.name.isprintable()]
        chosen = rng.choice(names or ["a"])
        spec["files"] = [f"{root.name}/{chosen}"]
    (folder / "spec.json").write_text(json.dumps(spec))


def check(folder: Path) -> None:
    body = json.loads((folder / "spec.json").read_text())
    is_prepared = body.pop("prepare")
    files = tuple(f"{folder}/{name}" for name in body.pop("files"))
    spec = DataSpec(files=files, seq_len=16, tokenizer={"vocab_size": 257}, **body)  # type: ignore[arg-type]
    looked = look_at_corpus(spec, special_tokens=("<|endoftext|>",))
    json.dumps([[one.pattern, one.examples] for one in looked.patterns], ensure_ascii=False).encode()
    if is_prepared:
        prepare(spec, cache_dir=folder / "cache")
        return
    spec_of_all = build_source(spec)  # every field, as for a format of the user's own
    for record in spec_of_all.records():
        record.name.encode(errors="surrogateescape")
    for _ in iter_documents(spec):
        pass
    build_source(spec).fingerprint()


def test_corpus__odd_files__are_read_or_refused_with_one_message(tmp_path: Path) -> None:
    result = run_cases("corpus", make=make, check=check, root=tmp_path)
    assert 0 < result.num_refused < result.num_cases or result.num_cases < 20
