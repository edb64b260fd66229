"""Measure snapshots of a LoRA run, and its recovery from a killed machine, beside those of full fine-tuning.

    python -m benchmarks.lora [--only bytes recovery] [--rank 8] [--base FOLDER] --json FILE

The base is a random Llama of 30 million parameters, saved as a folder, or the model of `--base`; bf16, ZeRO 1.

    bytes       `forge train` makes one step on one worker with each setting and writes a checkpoint, whose parts
                have the bytes of a snapshot: the intervals of its manifest are added up.
                `lora_snapshot_bytes_ratio` is adapters on all linear layers ÷ all weights.
    recovery    three simulated machines of one worker each train, with a snapshot at every step. One of them,
                with its rank and its agent, receives SIGKILL, and a new one joins afterwards, `--repeats` times in
                one run. `lora_recovery_p50_s` and `full_recovery_p50_s` are the median seconds from SIGKILL to the
                end of the first step of the other two.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.changes import SETTLE_S, Cost, Watch, costs_of_losses
from benchmarks.changes import report as report_costs
from benchmarks.program import module, records_of, running, train_to_end
from benchmarks.report import benchmark_parser, parse_options, print_table, write_json
from forge.checkpoint.reader import list_checkpoints, open_checkpoint
from forge.checkpoint.storage import open_storage

_VOCAB = 4096
_NUM_LAYERS = 8
_WORDS = [f"w{number}" for number in range(_VOCAB - 1)]
_SEQ_LEN = 32
_NODES = 3
_VICTIM = _NODES - 1
"""Not the machine of the rendezvous, as in `benchmarks.recovery`."""


def main() -> None:
    """Train each setting, and write the figures after each part."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=("bytes", "recovery"), default=("bytes", "recovery"))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--base", type=Path, help="a folder with a model and its tokenizer")
    parser.add_argument("--layers", type=int, default=_NUM_LAYERS, help="of the random model")
    options = parse_options(parser, smallest={"layers": 1})
    lora = {"rank": options.rank}
    settings = {"full": None, "all_linear": lora, "attention": {**lora, "targets": "self_attn"}}
    figures: dict[str, Any] = {"rank": options.rank}
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        base = options.base.resolve() if options.base is not None else folder / "base"
        if options.base is None:
            save_base(base, num_layers=options.layers)
        chance = random.Random(0)
        (folder / "text.txt").write_text(" ".join(chance.choices(_WORDS, k=4000)))
        if "bytes" in options.only:
            sizes = {kind: snapshot_bytes(folder, base, of) for kind, of in settings.items()}
            figures |= report_bytes(sizes, rank=options.rank)
            write_json(options.json, figures=figures)
        if "recovery" in options.only:
            costs = {
                kind: recoveries(folder / kind, model_of(base, of), text=folder / "text.txt", kills=options.repeats)
                for kind, of in {"lora": lora, "full": None}.items()
            }
            figures |= report_recovery(costs)
            write_json(options.json, figures=figures)


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


def model_of(base: Path, lora: dict[str, Any] | None) -> dict[str, Any]:
    """Return the `model` section of a job; None trains all weights."""
    return {"from_pretrained": str(base)} | ({"lora": lora} if lora is not None else {})


def snapshot_bytes(folder: Path, base: Path, lora: dict[str, Any] | None) -> int:
    """Train one step, and return the bytes of the state that it saves."""
    body = {
        "name": "lora",
        "model": model_of(base, lora),
        "data": {"files": str(folder / "text.txt"), "seq_len": _SEQ_LEN, "held_out": 0},
        "training": {"total_steps": 1, "global_batch_size": 1, "zero": {"stage": 1}},
        "checkpoint": {"to": str(folder / "runs")},
        "resources": {"workers": 1},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(body))
    run = train_to_end(folder / "job.yaml", environment={"FORGE_STATE": str(folder / "state")})
    storage = open_storage(f"{run}/checkpoints")
    manifest = open_checkpoint(storage, list_checkpoints(storage)[0]).manifest
    size = sum(part.layout.size_bytes for part in manifest.parts)
    print(f"  {lora or 'all weights'}: {size:,} bytes", file=sys.stderr)
    return size


def recoveries(folder: Path, model: dict[str, Any], *, text: Path, kills: int) -> list[Cost]:
    """Kill a machine of one run repeatedly, replacing it before the next kill."""
    folder.mkdir()
    request = {"folder": str(folder), "nodes": _NODES, "model": model, "files": str(text), "seq_len": _SEQ_LEN}
    request |= {"global_batch_size": _NODES, "lr": 1e-4, "snapshot_every": 1}
    with running(module("forge_elastic", request), folder=folder) as program:
        watch = Watch(folder, program.process)
        watch.await_world(_NODES)
        for number in range(kills):
            if number:
                program.say(f"add {_VICTIM}")
                watch.await_world(_NODES)
            time.sleep(SETTLE_S)
            killed_s = time.time()
            program.say(f"remove {_VICTIM}")
            watch.await_formed("loss", since_s=killed_s)
    costs = costs_of_losses(folder, [one["time"] for one in records_of(folder / "steps.jsonl") if "removed" in one])
    print(f"  {model}: {[round(cost.seconds, 2) for cost in costs]} s", file=sys.stderr)
    return costs


def report_recovery(costs: dict[str, list[Cost]]) -> dict[str, Any]:
    """Print the table. Returns: the figures."""
    figures = report_costs({f"{kind}_recovery": of for kind, of in costs.items()})
    return {f"{kind}_recovery_p50_s": figures.pop(f"{kind}_recovery_s") for kind in costs} | figures


def report_bytes(sizes: dict[str, int], *, rank: int) -> dict[str, Any]:
    """Print the table. Returns: the figures."""
    ratios = {kind: size / sizes["full"] for kind, size in sizes.items()}
    rows = [
        ["all weights", f"{sizes['full']:,}", "1", ""],
        [f"rank {rank}, all linear layers", f"{sizes['all_linear']:,}", f"{ratios['all_linear']:.4f}", "≤ 0.02"],
        [f"rank {rank}, attention", f"{sizes['attention']:,}", f"{ratios['attention']:.4f}", ""],
    ]
    print_table("Bytes of a snapshot", header=["trained", "bytes", "ratio", "aim"], rows=rows)
    return {
        "lora_snapshot_bytes_ratio": ratios["all_linear"],
        "lora_snapshot_bytes_ratio_attention": ratios["attention"],
        "snapshot_bytes": sizes,
    }


if __name__ == "__main__":
    main()
