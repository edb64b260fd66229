from __future__ import annotations

import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from forge.config.data import DataSpec, TokenizerSpec
from forge.data import cache, prepare_streams, store
from forge.data import prepare as module
from forge.data.cache_index import read_index, verify
from forge.data.prepare import PrepareProgress, open_rows, prepare
from forge.data.rows import StreamRows
from forge.data.tokenizer import Encoder, load_tokenizer
from forge.data.unigram import unigram_perplexity
from forge.errors import DataError
from forge.fs import default_cache_dir
from forge.plan.inputs import CorpusInfo

SMALL = TokenizerSpec(vocab_size=300)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A corpus of 300 short documents of different lengths."""
    path = tmp_path / "words.jsonl"
    write_documents(path, [f"document {i} " + f"says {i * i} things. " * (i % 7 + 1) for i in range(300)])
    return path


def write_documents(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def spec_of(*files: Path, **settings: Any) -> DataSpec:
    return DataSpec(
        **{"files": tuple(map(str, files)), "tokenizer": SMALL, "seq_len": 16, "held_out": 0.1} | settings
    )


def documents_of(facts: CorpusInfo) -> tuple[list[str], list[str]]:
    """The texts of both sides, as their tokens spell them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{facts.folder}/tokenizer/tokenizer.json")
    sides = []
    for name in ("train", "held_out"):
        paths = sorted(Path(facts.folder).glob(f"{name}-*.tokens"))
        ids = np.concatenate([np.fromfile(path, dtype="<u2") for path in paths] or [np.array([], dtype="<u2")])
        ends = np.flatnonzero(ids == facts.eot_id)
        parts = np.split(ids, ends + 1)
        sides.append([tokenizer.decode(part.tolist()) for part in parts if len(part)])
    return sides[0], sides[1]


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def leftovers(cache_dir: Path) -> list[str]:
    return sorted(path.name for path in cache_dir.glob("data/.*.tmp"))


# ---- what comes out


def test_every_document_is_on_one_side_whole(words: Path, tmp_path: Path) -> None:
    train, held_out = documents_of(prepare(spec_of(words), cache_dir=tmp_path / "cache"))
    assert sorted(train + held_out) == sorted(texts_of(words))
    assert train == [text for text in texts_of(words) if text in set(train)]


def test_the_facts_are_those_of_the_streams(words: Path, tmp_path: Path) -> None:
    facts = prepare(spec_of(words), cache_dir=tmp_path / "cache")
    train, held_out = open_rows(facts)
    assert isinstance(train, StreamRows)
    assert isinstance(held_out, StreamRows)
    num_train = train.stream.num_tokens
    assert (facts.num_train_tokens, facts.num_held_out_tokens) == (num_train, held_out.stream.num_tokens)
    assert facts.num_train_sequences == train.num_rows == (num_train - 1) // 16
    assert facts.num_held_out_sequences == held_out.num_rows
    assert (facts.vocab_size, facts.eot_id, facts.seq_len, facts.num_documents) == (300, 0, 16, 300)
    assert facts.num_text_bytes == sum(len(text.encode()) for text in texts_of(words))
    assert Path(facts.folder).name == f"words-{facts.digest[:16]}"


def test_the_held_out_share_is_one_of_the_text(words: Path, tmp_path: Path) -> None:
    for share in (0.01, 0.1, 0.5):
        facts = prepare(spec_of(words, held_out=share), cache_dir=tmp_path / "cache")
        total = facts.num_train_tokens + facts.num_held_out_tokens
        assert share * 0.9 < facts.num_held_out_tokens / total < share * 1.1 + 0.005


def test_a_corpus_too_large_to_read_twice_is_split_by_keys_alone(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_streams, "SMALL_CORPUS_CHARS", 100)
    _, held_out = documents_of(prepare(spec_of(words, seed=3), cache_dir=tmp_path / "cache"))
    threshold = store.KEY_SPACE // 10
    assert held_out == [t for t in texts_of(words) if store.document_key(t.encode(), seed=3) < threshold]


def test_the_split_does_not_depend_on_the_order_of_documents(words: Path, tmp_path: Path) -> None:
    _, held_out = documents_of(prepare(spec_of(words), cache_dir=tmp_path / "cache"))
    shuffled = texts_of(words)
    random.Random(0).shuffle(shuffled)
    write_documents(words, shuffled)
    _, again = documents_of(prepare(spec_of(words), cache_dir=tmp_path / "cache"))
    assert sorted(again) == sorted(held_out)


def test_copies_of_a_document_fall_on_the_same_side(words: Path, tmp_path: Path) -> None:
    write_documents(words, texts_of(words) * 2)
    train, held_out = documents_of(prepare(spec_of(words), cache_dir=tmp_path / "cache"))
    assert held_out and not set(train) & set(held_out)


def test_the_seed_chooses_other_documents(words: Path, tmp_path: Path) -> None:
    one, other = (documents_of(prepare(spec_of(words, seed=s), cache_dir=tmp_path / "cache"))[1] for s in (1, 2))
    assert set(one) != set(other)


def test_nothing_is_held_out_if_nothing_shall_be(words: Path, tmp_path: Path) -> None:
    facts = prepare(spec_of(words, held_out=0), cache_dir=tmp_path / "cache")
    assert (facts.num_held_out_tokens, facts.num_held_out_sequences) == (0, 0)
    assert math.isnan(facts.unigram_perplexity)


@pytest.mark.parametrize("is_small", [True, False])
@pytest.mark.parametrize("share", [1e-9, 0.5])
def test_of_two_documents_one_is_held_out(
    tmp_path: Path, share: float, is_small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_streams, "SMALL_CORPUS_CHARS", 10**6 if is_small else 10)
    write_documents(tmp_path / "two.jsonl", ["the first of two " * 9, "the second of two " * 9])
    for seed in range(4):
        spec = spec_of(tmp_path / "two.jsonl", held_out=share, seed=seed)
        train, held_out = documents_of(prepare(spec, cache_dir=tmp_path / "cache"))
        assert (len(train), len(held_out)) == (1, 1)


@pytest.mark.parametrize("copies", [1, 3])
def test_of_a_single_document_the_end_is_held_out(tmp_path: Path, copies: int) -> None:
    (tmp_path / "a.txt").write_text("one two three four five " * 50)
    spec = spec_of(*[tmp_path / "a.txt"] * copies, held_out=0.25)
    facts = prepare(spec, cache_dir=tmp_path / "cache")
    total = facts.num_train_tokens + facts.num_held_out_tokens
    assert facts.num_held_out_tokens == math.ceil(total * 0.25)
    train, held_out = documents_of(facts)
    assert "".join(train + held_out) == "one two three four five " * 50


def test_a_long_document_gives_the_tokens_it_would_give_whole(tmp_path: Path) -> None:
    text = "".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(40_000))
    assert len(text) > 2**20
    (tmp_path / "long.txt").write_text(text)
    facts = prepare(spec_of(tmp_path / "long.txt", held_out=0), cache_dir=tmp_path / "cache")
    encoder = Encoder(load_tokenizer(f"{facts.folder}/tokenizer"))
    found = (Path(facts.folder) / "train-00000.tokens").read_bytes()
    assert found == encoder.encode([text])[0] + b"\0\0"


def test_a_text_cannot_end_its_document(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl", ["x<|endoftext|>y" * 5] * 10)
    facts = prepare(spec_of(tmp_path / "a.jsonl", held_out=0), cache_dir=tmp_path / "cache")
    tokens = np.fromfile(f"{facts.folder}/train-00000.tokens", dtype="<u2")
    assert (tokens == facts.eot_id).sum() == 10


def test_the_unigram_perplexity_is_the_formula() -> None:
    train, held_out = np.array([3, 0, 1]), np.array([1, 2, 0])
    likelihood = (4 / 7) * (1 / 7) ** 2
    assert unigram_perplexity(train, held_out_counts=held_out) == pytest.approx(likelihood ** (-1 / 3))


def test_the_perplexity_of_a_corpus_is_that_of_its_tokens(words: Path, tmp_path: Path) -> None:
    facts = prepare(spec_of(words), cache_dir=tmp_path / "cache")
    train, held_out = (np.fromfile(f"{facts.folder}/{name}-00000.tokens", "<u2") for name in ("train", "held_out"))
    counts = np.bincount(train, minlength=300) + 1
    expected = math.exp(-np.log(counts[held_out] / counts.sum()).mean())
    assert facts.unigram_perplexity == pytest.approx(expected)


def test_a_loaded_tokenizer_is_used_and_kept_beside_the_tokens(words: Path, tmp_path: Path) -> None:
    trained = prepare(spec_of(words), cache_dir=tmp_path / "cache")
    spec = spec_of(words, tokenizer=TokenizerSpec(from_pretrained=f"{trained.folder}/tokenizer"))
    loaded = prepare(spec, cache_dir=tmp_path / "cache")
    assert loaded.digest != trained.digest
    assert documents_of(loaded) == documents_of(trained)
    assert load_tokenizer(f"{loaded.folder}/tokenizer") == load_tokenizer(f"{trained.folder}/tokenizer")


def test_the_standard_library_makes_a_corpus_with_the_defaults(tmp_path: Path) -> None:
    facts = prepare(DataSpec(source="python-stdlib"), cache_dir=tmp_path)
    assert facts.vocab_size == 8192
    assert facts.num_train_sequences > 1000
    assert facts.num_held_out_sequences >= 10
    assert 100 < facts.unigram_perplexity < 8192


def test_progress__preparation__reports_phases_and_counts(words: Path, tmp_path: Path) -> None:
    seen: list[PrepareProgress] = []
    facts = prepare(spec_of(words), cache_dir=tmp_path, on_progress=seen.append)
    assert [progress.phase for progress in seen] == ["fingerprint", "tokenizer", "tokens"]
    assert seen[-1].num_documents == 300
    assert seen[-1].num_text_bytes == facts.num_text_bytes
    assert seen[-1].num_tokens == facts.num_train_tokens + facts.num_held_out_tokens


def test_fewer_tokens_than_a_sequence_are_refused_with_the_arithmetic(words: Path, tmp_path: Path) -> None:
    too_long = prepare(spec_of(words), cache_dir=tmp_path).num_train_tokens
    with pytest.raises(DataError, match=rf"has {too_long} training .*seq_len \+ 1 = {too_long + 1}\. Add"):
        prepare(spec_of(words, seq_len=too_long), cache_dir=tmp_path)
    assert prepare(spec_of(words, seq_len=too_long - 1), cache_dir=tmp_path).num_train_sequences == 1


# ---- the cache


def built(spec: DataSpec, *, cache_dir: Path) -> bool:
    """Whether the call had to build."""
    seen: list[PrepareProgress] = []
    prepare(spec, cache_dir=cache_dir, on_progress=seen.append)
    return any(progress.phase == "tokens" for progress in seen)


def test_a_second_call_finds_the_cache_and_says_the_same(words: Path, tmp_path: Path) -> None:
    first = prepare(spec_of(words), cache_dir=tmp_path)
    assert not built(spec_of(words), cache_dir=tmp_path)
    assert prepare(spec_of(words), cache_dir=tmp_path) == first


def test_another_sequence_length_reads_the_same_cache(words: Path, tmp_path: Path) -> None:
    prepare(spec_of(words), cache_dir=tmp_path)
    assert not built(spec_of(words, seq_len=33), cache_dir=tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{"held_out": 0.2}, {"seed": 2}, {"tokenizer": TokenizerSpec(vocab_size=301)}],
    ids=["held_out", "seed", "vocab_size"],
)
def test_every_other_setting_makes_another_cache(words: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    prepare(spec_of(words), cache_dir=tmp_path)
    assert built(spec_of(words, **settings), cache_dir=tmp_path)
    assert not built(spec_of(words), cache_dir=tmp_path)


def test_another_text_makes_another_cache(words: Path, tmp_path: Path) -> None:
    prepare(spec_of(words), cache_dir=tmp_path)
    write_documents(words, [*texts_of(words), "one more"])
    assert built(spec_of(words), cache_dir=tmp_path)


def test_a_read_only_cache_is_read(words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(spec_of(words), cache_dir=tmp_path)
    monkeypatch.setattr(module, "build_once", lambda *_, **__: pytest.fail("tried to write"))
    assert prepare(spec_of(words), cache_dir=tmp_path) == first


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train-00000.tokens", flip),
        ("held_out-00000.tokens", flip),
        ("tokenizer/tokenizer.json", flip),
        ("index.json", flip),
        ("train-00000.tokens", lambda path: os.truncate(path, 10)),
        ("held_out-00000.tokens", Path.unlink),
        ("index.json", Path.unlink),
        ("index.json", lambda path: path.write_text("")),
    ],
)
def test_a_damaged_cache_is_named_in_a_warning_and_built_again(
    words: Path, tmp_path: Path, name: str, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    facts = prepare(spec_of(words), cache_dir=tmp_path)
    damage(Path(facts.folder) / name)
    assert built(spec_of(words), cache_dir=tmp_path)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "built again" in record.message and f"{facts.folder}/{name}" in record.message
    assert prepare(spec_of(words), cache_dir=tmp_path) == facts
    assert not leftovers(tmp_path)


def test_streams_of_another_corpus_than_planned_are_refused(words: Path, tmp_path: Path) -> None:
    facts = prepare(spec_of(words), cache_dir=tmp_path)
    other = prepare(spec_of(words, seed=2), cache_dir=tmp_path)
    shutil.rmtree(facts.folder)
    shutil.copytree(other.folder, facts.folder)
    with pytest.raises(DataError, match="plan again"):
        open_rows(facts)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FORGE_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/forge"),
        ({"HOME": "/c"}, "/c/.cache/forge"),
    ],
)
def test_the_cache_is_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("FORGE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_cache_dir() == Path(expected)


# ---- killed, interrupted, crowded, full

PROGRAM = """
import sys
from pathlib import Path
from forge.data import tokenizer
from forge.data.prepare import prepare
from forge.config.data import DataSpec, TokenizerSpec
tokenizer._HELP_FROM_CHARS = 0
spec = DataSpec(files=(sys.argv[1],), tokenizer=TokenizerSpec(vocab_size=300), seq_len=16, held_out=0.1)
print("ready", flush=True)
facts = prepare(spec, cache_dir=Path(sys.argv[2]))
print(facts.digest, facts.num_train_tokens, flush=True)
"""


def start(words: Path, cache_dir: Path) -> subprocess.Popen[str]:
    """A process that prepares, just before it begins."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(words), str(cache_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def answer_of(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a process of `start` printed, until its end. `communicate` would miss what `readline` has read ahead."""
    assert process.stdout is not None and process.stderr is not None
    answer = process.stdout.read(), process.stderr.read()
    process.wait(timeout=60)
    return answer


@contextmanager
def fork(action: Callable[[], object]) -> Iterator[int]:
    """A child that does one thing, forked so that it starts in no time; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_kill_at_any_moment_leaves_no_half_cache_that_is_believed(words: Path, tmp_path: Path) -> None:
    reference = prepare(spec_of(words), cache_dir=tmp_path / "reference")
    began = time.monotonic()
    with fork(lambda: prepare(spec_of(words), cache_dir=tmp_path / "timed")) as pid:  # slower than here
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    duration_s = time.monotonic() - began
    chance = random.Random(0)
    cache_dir = tmp_path / "cache"
    outcomes: set[str] = set()
    num_kills = 0
    while num_kills < 25 or outcomes != {"half-way", "done"}:
        num_kills += 1
        assert num_kills < 200, f"the kills came all at the same point: {outcomes}"
        with fork(lambda: prepare(spec_of(words), cache_dir=cache_dir)):
            time.sleep(chance.uniform(0, 1.5 * duration_s))
        folder = cache_dir / "data" / Path(reference.folder).name
        if folder.exists():
            verify(folder, index=read_index(folder))
            shutil.rmtree(folder)
            outcomes.add("done")
        elif leftovers(cache_dir):
            outcomes.add("half-way")
    facts = prepare(spec_of(words), cache_dir=cache_dir)
    assert facts.digest == reference.digest
    assert documents_of(facts) == documents_of(reference)
    assert not leftovers(cache_dir)


def test_leftovers_of_another_dead_preparation_are_removed_and_live_ones_stay(words: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in (".dead-0123.tmp", ".live-4567.tmp"):
        (data / name).mkdir(parents=True)
        (data / name / "train-00000.tokens").write_bytes(b"half")
    with cache._locked(data / "live-4567", on_wait=None):
        prepare(spec_of(words), cache_dir=tmp_path)
    assert leftovers(tmp_path) == [".live-4567.tmp"]


def test_two_at_once_build_one_cache_and_agree(words: Path, tmp_path: Path) -> None:
    write_documents(words, texts_of(words) * 20)
    both = [start(words, tmp_path / "cache") for _ in range(2)]
    answers = [answer_of(process) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert answers[0][1] == answers[1][1] == ""
    assert not leftovers(tmp_path / "cache")


def test_who_comes_second_waits_and_says_so(words: Path, tmp_path: Path) -> None:
    folder = Path(prepare(spec_of(words), cache_dir=tmp_path).folder)
    away = folder.rename(tmp_path / "away")
    seen: list[str] = []
    with cache._locked(folder, on_wait=None):
        handed_over = False

        def watch(progress: PrepareProgress) -> None:
            nonlocal handed_over
            seen.append(progress.phase)
            if progress.phase == "waiting":
                handed_over = True
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare(spec_of(words), cache_dir=tmp_path, on_progress=watch)
    assert handed_over
    away.rename(folder)
    assert not built(spec_of(words), cache_dir=tmp_path)


@pytest.mark.parametrize("phase", ["tokenizer", "tokens"])
def test_an_interruption_leaves_nothing_behind(words: Path, tmp_path: Path, phase: str) -> None:
    def interrupt(progress: PrepareProgress) -> None:
        if progress.phase == phase:
            assert leftovers(tmp_path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(spec_of(words), cache_dir=tmp_path, on_progress=interrupt)
    assert not leftovers(tmp_path)
    assert not [path for path in (tmp_path / "data").iterdir() if path.is_dir()]


def test_ctrl_c_ends_a_preparation_with_helpers_and_leaves_nothing_behind(words: Path, tmp_path: Path) -> None:
    write_documents(words, [f"number {i} " * 2000 for i in range(300)])
    process = start(words, tmp_path)
    deadline = time.monotonic() + 60
    while not (helpers := psutil.Process(process.pid).children()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert leftovers(tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not leftovers(tmp_path)
    gone, alive = psutil.wait_procs(helpers, timeout=10)
    assert gone and not alive


def test_a_failed_corpus_leaves_nothing_behind(words: Path, tmp_path: Path) -> None:
    with words.open("a") as file:
        file.write("not json\n")
    with pytest.raises(DataError, match=r"words\.jsonl:301: not a line of JSON"):
        prepare(spec_of(words), cache_dir=tmp_path)
    assert not leftovers(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_is_named_with_what_was_free_and_leaves_nothing_behind(tmp_path: Path) -> None:
    write_documents(tmp_path / "big.jsonl", [f"number {i} " * 300 for i in range(2000)])
    mount = tmp_path / "mount"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode()}")
    try:
        with pytest.raises(DataError, match=r"the disk is full \(No space left on device\): .* [KM]iB free"):
            prepare(spec_of(tmp_path / "big.jsonl"), cache_dir=mount)
        assert not leftovers(mount)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_limit_on_file_sizes_is_named(tmp_path: Path) -> None:
    write_documents(tmp_path / "big.jsonl", [f"number {i} " * 300 for i in range(2000)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(DataError, match="ulimit -f"):
            prepare(spec_of(tmp_path / "big.jsonl"), cache_dir=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not leftovers(tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named_with_the_cure(words: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be written \(Not a directory: .*/file/data.*\); .* FORGE_CACHE"):
        prepare(spec_of(words), cache_dir=tmp_path / "file")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from forge.data.prepare import prepare\n"
        "from forge.config.data import DataSpec, TokenizerSpec\n"
        "spec = DataSpec(files=(sys.argv[1],), tokenizer=TokenizerSpec(from_pretrained=sys.argv[2]), seq_len=16)\n"
        "prepare(spec, cache_dir=Path(sys.argv[3]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    lines = [json.dumps({"text": f"some text {i} with words in it, " * 200}) + "\n" for i in range(500)]
    write_documents(tmp_path / "one.jsonl", ["some text with words in it " * 200])
    tokenizer = Path(prepare(spec_of(tmp_path / "one.jsonl"), cache_dir=tmp_path).folder) / "tokenizer"
    peaks_kib = []
    for factor in (2, 8):
        path = tmp_path / f"{factor}.jsonl"
        with path.open("w") as file:
            for _ in range(factor):
                file.writelines(lines)
        command = [sys.executable, "-c", program, str(path), str(tokenizer), str(tmp_path / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks_kib.append(int(done.stdout))
    assert peaks_kib[1] < peaks_kib[0] + 20_000
