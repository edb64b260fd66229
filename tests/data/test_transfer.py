"""A corpus on another machine is the same corpus, or none."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from forge.config.data import DataSpec, TokenizerSpec
from forge.data.prepare import open_rows, prepare
from forge.data.transfer import fetch_corpus, has_corpus, read_chunk, receive_corpus, send_corpus
from forge.errors import DataError
from forge.plan.inputs import CorpusInfo


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
