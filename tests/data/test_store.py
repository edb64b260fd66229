from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.data import cache_index, store
from forge.data.cache_index import (
    CacheIndex,
    Column,
    ExampleLayout,
    SplitSizes,
    read_index,
    verify,
    write_index,
)
from forge.data.store import (
    FileEntry,
    Packer,
    Split,
    StreamWriter,
    TokenStream,
    document_key,
    token_dtype,
    verify_sizes,
    write_file,
)
from forge.errors import DataError


def write_stream(folder: Path, tokens: list[int], *, shard_tokens: int, vocab_size: int = 1000) -> TokenStream:
    writer = StreamWriter(folder, name="train", vocab_size=vocab_size, shard_tokens=shard_tokens)
    dtype = token_dtype(vocab_size)
    writer.append(np.array(tokens, dtype=dtype).tobytes())
    return TokenStream(folder=folder, entries=writer.close(), dtype=dtype)


def index_of(**changes: Any) -> CacheIndex:
    index = CacheIndex(
        digest="abc",
        dtype="<u2",
        vocab_size=1000,
        eot_id=0,
        num_documents=3,
        num_text_bytes=70,
        unigram_perplexity=None,
        train=(FileEntry(name="train-00000.tokens", size_bytes=20, blake2b="1" * 32),),
        held_out=(),
        tokenizer=(),
    )
    return replace(index, **changes)


def cache(folder: Path) -> CacheIndex:
    """A small cache that verifies."""
    stream = write_stream(folder, list(range(50)), shard_tokens=20)
    files = (write_file(folder, name="tokenizer/tokenizer.json", content=b"{}"),)
    index = index_of(train=stream.entries, tokenizer=files)
    write_index(folder, index=index)
    return index


# ---- windows


@given(
    num_tokens=st.integers(0, 200), seq_len=st.integers(1, 50), shard_tokens=st.integers(1, 60), wide=st.booleans()
)
def test_windows_are_slices_of_the_stream_wherever_shards_end(
    tmp_path_factory: pytest.TempPathFactory, num_tokens: int, seq_len: int, shard_tokens: int, wide: bool
) -> None:
    tokens = [(i * 37) % 997 + (70_000 if wide else 0) for i in range(num_tokens)]
    folder = tmp_path_factory.mktemp("shards")
    vocab_size = 80_000 if wide else 1000
    stream = write_stream(folder, tokens, shard_tokens=shard_tokens, vocab_size=vocab_size)
    count = stream.num_sequences(seq_len)
    assert count == max(0, (num_tokens - 1) // seq_len)
    windows = stream.read(np.arange(count), seq_len)
    assert windows.dtype == np.int64
    assert windows.shape == (count, seq_len + 1)
    assert windows.tolist() == [tokens[i * seq_len : i * seq_len + seq_len + 1] for i in range(count)]


def test_windows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    stream = write_stream(tmp_path, list(range(100)), shard_tokens=7)
    assert stream.read(np.array([3, 0, 3]), 10)[:, 0].tolist() == [30, 0, 30]


def test_reading_nothing_gives_no_windows(tmp_path: Path) -> None:
    stream = write_stream(tmp_path, list(range(100)), shard_tokens=7)
    assert stream.read(np.array([], dtype=np.int64), 10).shape == (0, 11)


@pytest.mark.parametrize("index", [-1, 9, 10])
def test_a_sequence_that_is_not_there_is_refused(tmp_path: Path, index: int) -> None:
    stream = write_stream(tmp_path, list(range(90)), shard_tokens=7)
    with pytest.raises(IndexError, match="from 0 to 7"):
        stream.read(np.array([0, index]), 10)


def test_a_stream_travels_between_processes_without_its_tokens(tmp_path: Path) -> None:
    stream = write_stream(tmp_path, list(range(1000)) * 5, shard_tokens=1000)
    stream.read(np.arange(10), 16)
    packed = pickle.dumps(stream)
    assert len(packed) < 2000
    assert np.array_equal(pickle.loads(packed).read(np.arange(10), 16), stream.read(np.arange(10), 16))


# ---- writing


def test_shards_are_plain_little_endian_numbers_of_bounded_size(tmp_path: Path) -> None:
    stream = write_stream(tmp_path, [1, 258, 65535, 7, 9], shard_tokens=2, vocab_size=65536)
    assert [entry.name for entry in stream.entries] == [f"train-0000{i}.tokens" for i in range(3)]
    assert (tmp_path / "train-00000.tokens").read_bytes() == b"\x01\x00\x02\x01"
    assert [entry.size_bytes for entry in stream.entries] == [4, 4, 2]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_ids_take_two_bytes_as_long_as_they_fit(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == dtype


@given(sizes=st.lists(st.integers(0, 40), max_size=20))
def test_the_writer_counts_every_token_however_it_came(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("writer")
    writer = StreamWriter(folder, name="x", vocab_size=50, shard_tokens=16)
    tokens = [i % 50 for i in range(sum(sizes))]
    position = 0
    for size in sizes:
        writer.append(np.array(tokens[position : position + size], dtype="<u2").tobytes())
        position += size
    entries = writer.close()
    assert writer.num_tokens == len(tokens) == sum(entry.size_bytes for entry in entries) // 2
    assert writer.counts.tolist() == [tokens.count(i) for i in range(50)]


def test_an_empty_stream_has_no_shards(tmp_path: Path) -> None:
    assert write_stream(tmp_path, [], shard_tokens=10).num_tokens == 0
    assert not list(tmp_path.iterdir())


# ---- packing


def pack(folder: Path, documents: list[bytes], *, split: Split, pieces: int = 1) -> tuple[list[int], list[int]]:
    """Bytes as tokens, 0 as end of text; the tokens of both sides."""
    packer = Packer(folder, vocab_size=256, eot_id=0, split=split, seed=1)
    for content in documents:
        cuts = [len(content) * i // pieces for i in range(pieces + 1)]
        for i in range(pieces):
            part = content[cuts[i] : cuts[i + 1]]
            ids = np.frombuffer(part, dtype=np.uint8).astype("<u2").tobytes()
            packer.add(part, ids=ids, starts=i == 0, ends=i == pieces - 1)
    packer.close()
    assert packer.num_documents == len(documents)
    assert packer.num_text_bytes == sum(map(len, documents))
    sides = [
        np.concatenate([np.fromfile(path, dtype="<u2") for path in sorted(folder.glob(f"{name}-*"))] or [[]])
        for name in ("train", "held_out")
    ]
    assert packer.num_tokens == len(sides[0]) + len(sides[1])
    return sides[0].tolist(), sides[1].tolist()


def test_documents_are_packed_end_to_end_each_with_its_end(tmp_path: Path) -> None:
    assert pack(tmp_path, [b"ab", b"c"], split=Split()) == ([97, 98, 0, 99, 0], [])


def test_pieces_of_a_document_stay_together_and_end_once(tmp_path: Path) -> None:
    documents = [b"first one", b"second", b"third two"]
    split = Split(key_below=1 << 63)
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    whole = pack(tmp_path / "one", documents, split=split)
    keys = [document_key(content[: len(content) // 3], seed=1) for content in documents]
    torn = pack(tmp_path / "three", documents, split=split, pieces=3)
    assert sorted(whole[0] + whole[1]) == sorted(torn[0] + torn[1])
    held_out = [
        token for content, key in zip(documents, keys, strict=True) if key < 1 << 63 for token in (*content, 0)
    ]
    assert torn[1] == held_out


def test_documents_below_the_key_are_held_out_whole(tmp_path: Path) -> None:
    documents = [b"%d" % i for i in range(200)]
    threshold = store.KEY_SPACE // 5
    _, held_out = pack(tmp_path, documents, split=Split(key_below=threshold))
    expected = [content for content in documents if document_key(content, seed=1) < threshold]
    assert bytes(held_out) == b"".join(content + b"\0" for content in expected)
    assert 20 < len(expected) < 60


def test_a_tail_is_cut_at_the_very_token(tmp_path: Path) -> None:
    assert pack(tmp_path, [b"abcdef"], split=Split(tail_from=4), pieces=3) == ([97, 98, 99, 100], [101, 102, 0])


# ---- the index, and caches that are not what it says


def test_an_index_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    for perplexity in (None, 123.456):
        index = index_of(unigram_perplexity=perplexity)
        write_index(tmp_path, index=index)
        assert read_index(tmp_path) == index


def test_a_sound_cache_verifies(tmp_path: Path) -> None:
    index = cache(tmp_path)
    verify(tmp_path, index=index)
    assert index.num_train_tokens == 50
    assert index.size_bytes == 102


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"index\.json cannot be read \(No such file or directory\)"):
        read_index(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}', "\xff"])
def test_an_index_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"index\.json is not the index of a token cache"):
        read_index(tmp_path)


def test_an_index_of_another_format_is_named_with_both(tmp_path: Path) -> None:
    cache(tmp_path)
    content = json.loads((tmp_path / "index.json").read_text()) | {"format": 99}
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"has format 99, this forge reads 1"):
        read_index(tmp_path)


def test_an_index_that_was_changed_is_noticed(tmp_path: Path) -> None:
    cache(tmp_path)
    content = json.loads((tmp_path / "index.json").read_text()) | {"eot_id": 7}
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"index\.json was changed"):
        read_index(tmp_path)


def test_a_shard_of_another_size_is_named_with_both_sizes(tmp_path: Path) -> None:
    index = cache(tmp_path)
    (tmp_path / "train-00001.tokens").write_bytes(b"\0" * 38)
    with pytest.raises(DataError, match=r"train-00001\.tokens has 38 bytes, the index says 40"):
        TokenStream(folder=tmp_path, entries=index.train, dtype=index.dtype)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = cache(tmp_path)
    (tmp_path / "train-00002.tokens").unlink()
    with pytest.raises(DataError, match=r"train-00002\.tokens is part of the token cache but cannot be read"):
        verify_sizes(tmp_path, index.files)


@pytest.mark.parametrize("name", ["train-00000.tokens", "train-00002.tokens", "tokenizer/tokenizer.json"])
def test_a_single_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    index = cache(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)
    verify_sizes(tmp_path, index.files)
    with pytest.raises(DataError, match=rf"{name} has checksum [0-9a-f]{{32}}, the index says"):
        verify(tmp_path, index=index)


def test_what_ranks_import_needs_numpy_alone() -> None:
    program = (
        "import sys, forge.data.store, forge.data.order\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'pyarrow', 'fsspec', 'pydantic', 'deepspeed', 'ray'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


SIZES = SplitSizes(num_rows=1, num_examples=1, num_tokens=4, num_targets=4)
LAYOUT = ExampleLayout(
    seq_len=8, packing="examples", train=SIZES, held_out=SIZES, notes={"split": 1}, foreign_target=None,
    columns=tuple(Column(name=name, dtype="<i4", shape=()) for name in ("tokens", "targets")),
)  # fmt: skip


def test_read_index__of_examples__is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write_index(tmp_path, index=index_of(examples=LAYOUT))
    assert read_index(tmp_path) == index_of(examples=LAYOUT)


def layout_with(**changes: object) -> dict[str, object]:
    return {"examples": asdict(LAYOUT) | changes}


@pytest.mark.parametrize(
    "change",
    [
        {"other": 1},
        {"train": None},
        {"tokenizer": [None]},
        {"train": [{"name": None, "size_bytes": 1, "blake2b": "0"}]},
        {"dtype": None},
        {"dtype": "<i2"},
        {"digest": None},
        {"vocab_size": None},
        {"eot_id": True},
        {"num_documents": "3"},
        {"num_text_bytes": 1.5},
        {"unigram_perplexity": "1"},
        {"examples": []},
        {"examples": {}},
        layout_with(seq_len=None),
        layout_with(seq_len=0),
        layout_with(packing=None),
        layout_with(train=None),
        layout_with(train=asdict(SIZES) | {"num_rows": None}),
        layout_with(train=asdict(SIZES) | {"num_rows": 0}),
        layout_with(held_out={}),
        layout_with(notes={"split": 1.5}),
        layout_with(notes=None),
        layout_with(columns=[]),
        layout_with(columns=[{"name": "tokens"}]),
        layout_with(columns=[{"name": name, "dtype": "O", "shape": []} for name in ("tokens", "targets")]),
        layout_with(columns=[{"name": name, "dtype": "<i4", "shape": [None]} for name in ("tokens", "targets")]),
    ],
)
def test_read_index__valid_checksum_but_other_content__is_a_data_error(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    write_index(tmp_path, index=index_of(examples=LAYOUT))
    content = json.loads((tmp_path / "index.json").read_bytes()) | change
    body = {key: value for key, value in content.items() if key not in ("format", "blake2b")}
    content["blake2b"] = store.checksum(cache_index._canonical(body))
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="is not the index of a token cache"):
        read_index(tmp_path)


def test_read_index__nested_too_deeply__is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match="is not the index of a token cache"):
        read_index(tmp_path)
