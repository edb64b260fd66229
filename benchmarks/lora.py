"""Measure the bytes of a snapshot of a LoRA run against those of a full fine-tuning run.

    python -m benchmarks.lora [--rank 8] [--base FOLDER] --json FILE

A random Llama of 30 million parameters, saved as a folder, or the model of `--base`. `forge train` makes one step
on one worker in bf16 with each setting and writes a checkpoint, whose parts have the bytes of a snapshot: the
intervals of its manifest are added up. `lora_snapshot_bytes_ratio` is adapters on all linear layers ÷ all weights.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.program import FORGE
from benchmarks.report import benchmark_parser, parse_options, print_table, write_json
from forge.checkpoint.reader import list_checkpoints, open_checkpoint
from forge.checkpoint.storage import open_storage

_VOCAB = 4096
_NUM_LAYERS = 8
_WORDS = [f"w{number}" for number in range(_VOCAB - 1)]


def main() -> None:
    """Train one step of each setting."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--base", type=Path, help="a folder with a model and its tokenizer")
    parser.add_argument("--layers", type=int, default=_NUM_LAYERS, help="of the random model")
    options = parse_options(parser, smallest={"layers": 1})
    settings: dict[str, dict[str, Any] | None] = {
        "full": None,
        "all_linear": {"rank": options.rank},
        "attention": {"rank": options.rank, "targets": "self_attn"},
    }
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        base = options.base.resolve() if options.base is not None else folder / "base"
        if options.base is None:
            save_base(base, num_layers=options.layers)
        chance = random.Random(0)
        (folder / "text.txt").write_text(" ".join(chance.choices(_WORDS, k=4000)))
        sizes = {kind: snapshot_bytes(folder, base, lora) for kind, lora in settings.items()}
    report(sizes, rank=options.rank, json_path=options.json)


def save_base(folder: Path, *, num_layers: int) -> None:
    """Save the random Llama, and a tokenizer of its words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=_VOCAB, num_hidden_layers=num_layers, **sizes)).save_pretrained(folder)
    ids = {"<eos>": 0} | {word: number for number, word in enumerate(_WORDS, start=1)}
    words = Tokenizer(WordLevel(ids, unk_token="<eos>"))
    words.pre_tokenizer = Whitespace()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')


def snapshot_bytes(folder: Path, base: Path, lora: dict[str, Any] | None) -> int:
    """Train one step, and return the bytes of the state that it saves."""
    body = {
        "name": "lora",
        "model": {"from_pretrained": str(base)} | ({"lora": lora} if lora is not None else {}),
        "data": {"files": str(folder / "text.txt"), "seq_len": 32, "held_out": 0},
        "training": {"total_steps": 1, "global_batch_size": 1, "zero": {"stage": 1}},
        "checkpoint": {"to": str(folder / "runs")},
        "resources": {"workers": 1},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(body))
    done = subprocess.run(
        [FORGE, "train", str(folder / "job.yaml"), "--yes", "-o", "json"],
        env=os.environ | {"FORGE_STATE": str(folder / "state")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    storage = open_storage(f"{json.loads(done.stdout)['folder']}/checkpoints")
    manifest = open_checkpoint(storage, list_checkpoints(storage)[0]).manifest
    size = sum(part.layout.size_bytes for part in manifest.parts)
    print(f"  {lora or 'all weights'}: {size:,} bytes", file=sys.stderr)
    return size


def report(sizes: dict[str, int], *, rank: int, json_path: Path | None) -> None:
    """Print the table, and write the figures."""
    ratios = {kind: size / sizes["full"] for kind, size in sizes.items()}
    rows = [
        ["all weights", f"{sizes['full']:,}", "1", ""],
        [f"rank {rank}, all linear layers", f"{sizes['all_linear']:,}", f"{ratios['all_linear']:.4f}", "≤ 0.02"],
        [f"rank {rank}, attention", f"{sizes['attention']:,}", f"{ratios['attention']:.4f}", ""],
    ]
    print_table("Bytes of a snapshot", header=["trained", "bytes", "ratio", "aim"], rows=rows)
    figures = {
        "lora_snapshot_bytes_ratio": ratios["all_linear"],
        "lora_snapshot_bytes_ratio_attention": ratios["attention"],
        "snapshot_bytes": sizes,
        "rank": rank,
    }
    write_json(json_path, figures=figures)


if __name__ == "__main__":
    main()
