"""Tokenization into shards: forge and `datasets.map`, with the same tokenizer and documents.

    python -m benchmarks.data --json FILE

The corpus is real Python source: the standard library and the installed packages, one JSON line a file,
up to `--megabytes`. forge's time covers all of `prepare` (fingerprint, split, tokens, checksums, flush to
the disk), the peer's only `map` on a loaded dataset. Each run is a separate process, whose imports are not counted.
The ratio is relative to the peer's best settings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.report import Measured, benchmark_parser, parse_options, print_table, write_json
from forge.config.data import DataSpec, TokenizerSpec
from forge.data.corpus import iter_sample
from forge.data.prepare import TOKENIZER_SAMPLE_CHARS, prepare
from forge.data.tokenizer import train_tokenizer

PEERS = ("datasets default", "datasets tuned", "datasets threads")


def main() -> None:
    """Run all contenders; in a child process, run one."""
    parser = benchmark_parser(__doc__)
    parser.add_argument(
        "--megabytes", type=int, default=64, help="text of the corpus; memory is taken at 4x and 8x too"
    )
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parse_options(parser, smallest={"megabytes": 1, "vocab_size": 300})
    if options.child:
        print(json.dumps(CHILDREN[options.child](options.folder)))
        return
    with tempfile.TemporaryDirectory(prefix="forge-bench-") as name:
        folder = Path(name)
        num_bytes = write_corpus(folder / "corpus.jsonl", max_bytes=options.megabytes * 10**6)
        save_tokenizer(folder, vocab_size=options.vocab_size)
        names = ("forge", *PEERS)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(options.repeats):
            for one in names:
                runs[one].append(run_child(one, folder=folder))
        memory = {1: runs["forge"]}
        for times in (4, 8):
            repeat_corpus(folder, folder / f"x{times}", times=times)
            memory[times] = [run_child("forge", folder=folder / f"x{times}")]
    report(options, num_bytes=num_bytes, runs=runs, memory=memory)


def report(
    options: argparse.Namespace,
    *,
    num_bytes: int,
    runs: dict[str, list[dict[str, float]]],
    memory: dict[int, list[dict[str, float]]],
) -> None:
    """Print the tables and write the file."""
    num_tokens = {one["num_tokens"] for values in runs.values() for one in values}
    assert len(num_tokens) == 1, f"the contestants do not agree on the tokens: {num_tokens}"
    speed = {
        name: Measured(values=tuple(one["num_tokens"] / one["seconds"] for one in values))
        for name, values in runs.items()
    }
    best = max(PEERS, key=lambda name: speed[name].median)
    ratio = speed["forge"].median / speed[best].median
    peak_bytes = {factor: max(one["peak_rss_bytes"] for one in values) for factor, values in memory.items()}
    print_table(
        f"{num_bytes / 1e6:.0f} MB of Python source, {options.repeats} interleaved repeats, median [range]",
        header=("", "tokens/s", "seconds", "peak MiB"),
        rows=[
            (
                name,
                speed[name].text(),
                Measured(values=tuple(one["seconds"] for one in values)).text(".2f"),
                f"{max(one['peak_rss_bytes'] for one in values) / 2**20:,.0f}",
            )
            for name, values in runs.items()
        ],
    )
    print(f"\nratio {ratio:.2f} against {best}")
    peaks = [f"{size_bytes / 2**20:,.0f} MiB with {times}x" for times, size_bytes in peak_bytes.items()]
    print(f"forge's peak memory: {', '.join(peaks)} the corpus")
    figures = {
        "forge_tokens_per_s": speed["forge"].median,
        "datasets_tokens_per_s": speed[best].median,
        "datasets_default_tokens_per_s": speed[PEERS[0]].median,
        "datasets_best_settings": best,
        "ratio": ratio,
        "peak_rss_bytes": peak_bytes[1],
        "peak_rss_bytes_4x_corpus": peak_bytes[4],
        "peak_rss_bytes_8x_corpus": peak_bytes[8],
        "corpus_bytes": num_bytes,
        "runs": runs,
    }
    write_json(options.json, figures=figures)


def write_corpus(path: Path, *, max_bytes: int) -> int:
    """Write Python sources as JSON lines. Returns: the bytes of text."""
    num_bytes = 0
    roots = [Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib")]
    with path.open("w", encoding="utf-8") as file:
        for source in (found for root in roots for found in sorted(root.rglob("*.py"))):
            if num_bytes >= max_bytes:
                break
            try:
                text = source.read_text(encoding="utf-8")
                line = json.dumps({"text": text})
                size_bytes = len(text.encode())
            except (OSError, UnicodeError):
                continue
            if text:
                file.write(line + "\n")
                num_bytes += size_bytes
    return num_bytes


def repeat_corpus(folder: Path, target: Path, *, times: int) -> None:
    """Write the same documents several times, to see which memory grows with the corpus."""
    target.mkdir(exist_ok=True)
    with (target / "corpus.jsonl").open("wb") as file:
        for _ in range(times):
            file.write((folder / "corpus.jsonl").read_bytes())
    (target / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())


def save_tokenizer(folder: Path, *, vocab_size: int) -> None:
    """Train the tokenizer that all contenders use."""
    spec = DataSpec(files=(str(folder / "corpus.jsonl"),))
    tokenizer = train_tokenizer(iter_sample(spec, max_chars=TOKENIZER_SAMPLE_CHARS), vocab_size=vocab_size)
    (folder / "tokenizer.json").write_text(tokenizer.content, encoding="utf-8")


def run_child(name: str, *, folder: Path) -> dict[str, float]:
    """Run one contender in its own process."""
    command = [sys.executable, "-m", "benchmarks.data", "--child", name, "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_forge(folder: Path) -> dict[str, float]:
    tokenizer = TokenizerSpec(from_pretrained=str(folder / "tokenizer.json"))
    spec = DataSpec(files=(str(folder / "corpus.jsonl"),), tokenizer=tokenizer)
    with tempfile.TemporaryDirectory(dir=folder) as cache, PeakMemory() as memory:
        start = time.perf_counter()
        facts = prepare(spec, cache_dir=Path(cache))
        seconds = time.perf_counter() - start
    num_tokens = facts.num_train_tokens + facts.num_held_out_tokens - facts.num_documents  # the peer adds no EOT
    return {"seconds": seconds, "num_tokens": num_tokens, "peak_rss_bytes": memory.peak_bytes}


def run_datasets(folder: Path, *, setting: str) -> dict[str, float]:
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    encode = tokenizer.encode_batch if setting == "default" else tokenizer.encode_batch_fast

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [found.ids for found in encode(batch["text"])]}

    narrow = datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"))})
    settings: dict[str, dict[str, object]] = {
        "default": {"num_proc": 2},
        "tuned": {"num_proc": 2, "batch_size": 100, "features": narrow},
        "threads": {"batch_size": 200, "features": narrow},
    }
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if setting == "threads" else "false"
    with tempfile.TemporaryDirectory(dir=folder) as cache, PeakMemory() as memory:
        data = datasets.load_dataset(
            "json", data_files=str(folder / "corpus.jsonl"), split="train", cache_dir=cache
        )
        start = time.perf_counter()
        mapped = data.map(tokenize, batched=True, remove_columns=["text"], **settings[setting])
        seconds = time.perf_counter() - start
        lists = mapped.data.column("input_ids")
        num_tokens = sum(len(chunk.flatten()) for chunk in lists.chunks)
    return {"seconds": seconds, "num_tokens": num_tokens, "peak_rss_bytes": memory.peak_bytes}


class PeakMemory:
    """Peak resident memory of this process and its children together, sampled every 20 ms."""

    def __enter__(self) -> PeakMemory:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.02):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


CHILDREN: dict[str, Callable[[Path], dict[str, float]]] = {
    "forge": run_forge,
    "datasets default": lambda folder: run_datasets(folder, setting="default"),
    "datasets tuned": lambda folder: run_datasets(folder, setting="tuned"),
    "datasets threads": lambda folder: run_datasets(folder, setting="threads"),
}

if __name__ == "__main__":
    main()
