"""A corpus on another machine is the same corpus, or none."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from forge.config.data import DataSpec, TokenizerSpec
from forge.data.cache_index import read_index, write_index
from forge.data.prepare import open_rows, prepare
from forge.data.store import FileEntry, checksum
from forge.data.transfer import CHUNK_BYTES, fetch_corpus, has_corpus, read_chunk, receive_corpus, send_corpus
from forge.errors import DataError
from forge.plan.inputs import CorpusInfo
from tests.support.fuzz import watched


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusInfo:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    (folder / "b.txt").write_text("a corpus on its way\n" * 100)
    spec = DataSpec(files=(f"{folder}/*.txt",), seq_len=16, tokenizer=TokenizerSpec(vocab_size=300))
    return prepare(spec, cache_dir=folder / "cache")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_sent_arrives_byte_for_byte(corpus: CorpusInfo, tmp_path: Path) -> None:
    stream = io.BytesIO()
    send_corpus(Path(corpus.folder), stream=stream)
    stream.seek(0)
    there = tmp_path / "data" / "there"
    receive_corpus(there, digest=corpus.digest, stream=stream)
    assert _files(there) == _files(Path(corpus.folder))
    assert has_corpus(there, digest=corpus.digest)


def test_what_is_fetched_arrives_byte_for_byte(corpus: CorpusInfo, tmp_path: Path) -> None:
    there = tmp_path / "data" / "there"
    home = Path(corpus.folder)
    fetch_corpus(there, digest=corpus.digest, read=lambda name, offset: read_chunk(home, name=name, offset=offset))
    assert _files(there) == _files(home)
    fetch_corpus(there, digest=corpus.digest, read=lambda name, offset: pytest.fail("asked again"))


@pytest.mark.parametrize("length", [0, 100, 3000, 20_000])
def test_a_connection_that_breaks_leaves_no_corpus(corpus: CorpusInfo, tmp_path: Path, length: int) -> None:
    stream = io.BytesIO()
    send_corpus(Path(corpus.folder), stream=stream)
    assert len(stream.getvalue()) > length
    there = tmp_path / "data" / "there"
    with pytest.raises(DataError):
        receive_corpus(there, digest=corpus.digest, stream=io.BytesIO(stream.getvalue()[:length]))
    assert not there.exists()
    assert not has_corpus(there, digest=corpus.digest)


def test_a_flipped_bit_is_seen(corpus: CorpusInfo, tmp_path: Path) -> None:
    home = Path(corpus.folder)

    def read(name: str, offset: int) -> bytes:
        content = bytearray(read_chunk(home, name=name, offset=offset))
        if content and name.endswith(".tokens"):
            content[len(content) // 2] ^= 1
        return bytes(content)

    with pytest.raises(DataError, match="checksum"):
        fetch_corpus(tmp_path / "data" / "there", digest=corpus.digest, read=read)
    assert not (tmp_path / "data" / "there").exists()


def test_another_corpus_is_not_taken_for_this_one(corpus: CorpusInfo, tmp_path: Path) -> None:
    stream = io.BytesIO()
    send_corpus(Path(corpus.folder), stream=stream)
    stream.seek(0)
    with pytest.raises(DataError, match="was expected"):
        receive_corpus(tmp_path / "data" / "there", digest="0" * 32, stream=stream)


def test_a_corpus_that_is_damaged_there_is_sent_again(corpus: CorpusInfo, tmp_path: Path) -> None:
    there, home = tmp_path / "data" / "there", Path(corpus.folder)
    shutil.copytree(home, there)
    shard = next(there.glob("*.tokens"))
    shard.write_bytes(shard.read_bytes()[:-2])
    assert not has_corpus(there, digest=corpus.digest)
    fetch_corpus(there, digest=corpus.digest, read=lambda name, offset: read_chunk(home, name=name, offset=offset))
    assert _files(there) == _files(home)


def test_nothing_but_the_corpus_is_read_from_its_folder(corpus: CorpusInfo) -> None:
    with pytest.raises(DataError, match="has no file"):
        read_chunk(Path(corpus.folder), name="../../../etc/passwd", offset=0)


def test_a_corpus_that_arrived_can_be_trained_on(corpus: CorpusInfo, tmp_path: Path) -> None:
    import dataclasses

    there, home = tmp_path / "data" / "there", Path(corpus.folder)
    fetch_corpus(there, digest=corpus.digest, read=lambda name, offset: read_chunk(home, name=name, offset=offset))
    train, held_out = open_rows(dataclasses.replace(corpus, folder=str(there)))
    assert train.num_rows == corpus.num_train_sequences
    assert held_out.num_rows == corpus.num_held_out_sequences


ELSEWHERE = ("../victim", "/tmp/forge-victim", "tokenizer/../../victim", "a/b", "..", "", "index.json", "x\n")


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_index_that_names_a_file_elsewhere_is_refused_on_every_side(
    corpus: CorpusInfo, tmp_path: Path, name: str
) -> None:
    """A checksum is no secret: whoever writes an index can make it right."""
    home, there = tmp_path / "home", tmp_path / "cache" / "data" / "there"
    shutil.copytree(corpus.folder, home)
    there.parent.mkdir(parents=True)
    index = read_index(home)
    evil = FileEntry(name=name, size_bytes=7, blake2b=checksum(b"private"))
    write_index(home, index=replace(index, tokenizer=(*index.tokenizer, evil)))

    def read(asked: str, offset: int) -> bytes:
        if asked == name and asked != "index.json":
            return b"private"[offset:]
        return (home / asked).read_bytes()[offset : offset + CHUNK_BYTES]

    with watched(there.parent), pytest.raises(DataError, match="is not the index of a token cache"):
        fetch_corpus(there, digest=corpus.digest, read=read)
    assert [path for path in there.parent.iterdir() if not path.name.startswith(".")] == []
    for give in (
        lambda: send_corpus(home, stream=io.BytesIO()),
        lambda: read_chunk(home, name=name, offset=0),
    ):
        with pytest.raises(DataError, match="is not the index of a token cache"):
            give()


def test_a_link_in_the_cache_gives_no_file_away(corpus: CorpusInfo, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(corpus.folder, home)
    name = read_index(home).train[0].name
    (home / name).rename(tmp_path / "private")
    (home / name).symlink_to(tmp_path / "private")
    for give in (
        lambda: send_corpus(home, stream=io.BytesIO()),
        lambda: read_chunk(home, name=name, offset=0),
    ):
        with pytest.raises(DataError, match="it is a link"):
            give()


def test_more_than_the_index_says_is_not_taken(corpus: CorpusInfo, tmp_path: Path) -> None:
    home = Path(corpus.folder)

    def read(name: str, offset: int) -> bytes:
        is_index = name == "index.json"
        return read_chunk(home, name=name, offset=offset) if is_index else b"x" * CHUNK_BYTES

    with pytest.raises(DataError, match="arrived with more than its"):
        fetch_corpus(tmp_path / "data" / "there", digest=corpus.digest, read=read)
