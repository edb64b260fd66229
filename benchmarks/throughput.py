"""Training throughput of forge, bare DeepSpeed and the transformers Trainer on the same work.

    python -m benchmarks.throughput [--only forge bare trainer] --json FILE

A small Llama (4 layers of 256, vocabulary 8,192, sequences of 256), 16 sequences a step, bf16, ZeRO 1,
two workers. forge runs as a user runs it: `forge train` with Ray, recorder, W&B (offline) and screen.
The peers run only their loop under torchrun, each as usually written and also tuned to forge's defaults on CPU:
torch's fused AdamW, and plain attention for short sequences. Ratios are relative to the fastest.

    forge            defaults: chunked cross entropy
    forge plain      the transformers model's own loss; the same arithmetic as the peers'
    bare             a bare DeepSpeed loop
    trainer          transformers' Trainer with DeepSpeed
    trainer ddp      the same with DistributedDataParallel, tuned: autocast over fp32 weights
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.program import records_of, train_to_end
from benchmarks.report import Measured, benchmark_parser, parse_options, print_table, write_json
from benchmarks.torchrun import run_under_torchrun

WORKERS = 2
SEQ_LEN = 256
VOCAB = 8192
MICRO_BATCH = 8
WARM_UP = 6
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
CONTENDERS = ("forge", "forge plain", "bare", "bare tuned", "trainer", "trainer tuned", "trainer ddp")
KINDS = ("forge", "bare", "trainer")
AIMS = {"overhead_ratio": "≥ 0.98", "ratio_vs_bare": "≥ 1.15", "ratio_vs_hf_trainer": "≥ 1.2", "mfu": "≥ 0.45"}


def main() -> None:
    """Run every contender `--repeats` times, in turn."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each run")
    parser.add_argument(
        "--only", nargs="+", choices=KINDS, default=KINDS, help="contenders, each with its variants"
    )
    options = parse_options(parser, smallest={"steps": 2})
    contenders = [name for name in CONTENDERS if name.partition(" ")[0] in options.only]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory(prefix="forge-bench-") as name:
        for _ in range(options.repeats):
            for contender in contenders:
                runs[contender].append(run(contender, folder=Path(name), steps=options.steps))
                print(f"  {contender}: {runs[contender][-1]['tokens_per_s']:,.0f} tokens/s", file=sys.stderr)
    report(runs, json_path=options.json)


def run(contender: str, *, folder: Path, steps: int) -> dict[str, float]:
    """Run one contender once. Returns: figures, at least `tokens_per_s`."""
    kind, _, variant = contender.partition(" ")
    if kind == "forge":
        return run_forge(folder, steps=steps, cross_entropy=variant or "chunked")
    module = {"bare": "deepspeed_loop", "trainer": "hf_trainer"}[kind]
    return run_peer(module, steps=steps, variant=variant)


def run_forge(folder: Path, *, steps: int, cross_entropy: str) -> dict[str, float]:
    """Run `forge train` as a user does; measure from the step after the warm-up to the last but one."""
    job = {
        "name": "bench",
        "model": {"architecture": "llama", **MODEL},
        "data": {"source": "python-stdlib", "tokenizer": {"vocab_size": VOCAB}, "seq_len": SEQ_LEN},
        "training": {
            "total_steps": WARM_UP + steps + 1,
            "global_batch_size": WORKERS * MICRO_BATCH,
            "optimizer": {"lr": 1e-3},
            "zero": {"stage": 1},
            "cross_entropy": cross_entropy,
            "evaluate_every": "1000 steps",
        },
        "checkpoint": {"every": "1000 steps", "to": str(folder / "runs")},
        "resources": {"workers": WORKERS, "gpu": "none"},
        "tracking": {"wandb": {"mode": "offline"}},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    run_folder = train_to_end(path, environment={"FORGE_STATE": str(folder / "state")})
    metrics = records_of(run_folder / "metrics.jsonl")
    events = records_of(run_folder / "events.jsonl")
    # The last step waits for the evaluation after it before it is recorded, so it is left out.
    first, last = metrics[WARM_UP - 1], metrics[-2]
    seconds = last["time"] - first["time"]
    tokens = last["train/tokens"] - first["train/tokens"]
    peak = next(event["peak_flops"] for event in events if event["event"] == "GenerationStarted")
    plan = json.loads((run_folder / "plan.json").read_text())
    rate = tokens / seconds
    return {
        "tokens_per_s": rate,
        "gemm_peak_flops": peak,
        "mfu": rate * plan["flops_per_token"] / peak,
        "peak_memory_gib": metrics[-1]["memory/peak_gib"],
    }


def run_peer(module: str, *, steps: int, variant: str) -> dict[str, float]:
    """Run a peer under torchrun; its last line is its result."""
    request: dict[str, Any] = {
        "model": {"model_type": "llama", **MODEL},
        "vocab_size": VOCAB,
        "seq_len": SEQ_LEN,
        "micro_batch_size": MICRO_BATCH,
        "lr": 1e-3,
        "warm_up": WARM_UP,
        "steps": steps,
        "fused": bool(variant),
        "attention": "eager" if variant else "sdpa",
        "deepspeed": variant != "ddp",
    }
    output = run_under_torchrun(module, world_size=WORKERS, request=request, stdout=subprocess.PIPE, quiet=True)
    answer: dict[str, float] = json.loads(output.splitlines()[-1])
    return answer


def report(runs: dict[str, list[dict[str, float]]], *, json_path: Path | None) -> None:
    """Print the table and the ratios of the contenders that ran; write the figures."""
    speeds = {name: Measured(values=tuple(run["tokens_per_s"] for run in of)) for name, of in runs.items()}
    bare = _fastest(speeds, "bare")
    print_table(
        "Training throughput, small Llama, bf16, ZeRO 1, two workers",
        header=["contender", "tokens/s: median [range]", "÷ bare"],
        rows=[[name, speed.text(), f"{speed.median / bare:.3f}" if bare else ""] for name, speed in speeds.items()],
    )
    figures: dict[str, Any] = {"all_tokens_per_s": {name: list(speed.values) for name, speed in speeds.items()}}
    if "forge" in runs:
        figures |= _figures_of_forge(runs, speeds=speeds, bare=bare, trainer=_fastest(speeds, "trainer"))
        rows = [
            [name, f"{figures[name]:,.4g}", AIMS.get(name, "")] for name in figures if name != "all_tokens_per_s"
        ]
        print_table("Figures", header=["figure", "value", "aim"], rows=rows)
    write_json(json_path, figures=figures)


def _fastest(speeds: dict[str, Measured], kind: str) -> float | None:
    """Return tokens/s of the fastest variant of a contender; None if it did not run."""
    return max((speed.median for name, speed in speeds.items() if name.partition(" ")[0] == kind), default=None)


def _figures_of_forge(
    runs: dict[str, list[dict[str, float]]],
    *,
    speeds: dict[str, Measured],
    bare: float | None,
    trainer: float | None,
) -> dict[str, float]:
    forge, plain = speeds["forge"].median, speeds["forge plain"].median
    figures = {"forge_tokens_per_s": forge, "forge_plain_tokens_per_s": plain}
    if bare:
        figures |= {
            "bare_deepspeed_tokens_per_s": bare,
            "overhead_ratio": plain / bare,
            "ratio_vs_bare": forge / bare,
        }
        figures["ratio_vs_bare_untuned"] = forge / speeds["bare"].median
    if trainer:
        figures |= {"hf_trainer_tokens_per_s": trainer, "ratio_vs_hf_trainer": forge / trainer}
    figures |= {key: statistics.median(run[key] for run in runs["forge"]) for key in ("gemm_peak_flops", "mfu")}
    for name, key in (("forge", "forge_peak_memory_gib"), ("forge plain", "forge_plain_peak_memory_gib")):
        figures[key] = statistics.median(run["peak_memory_gib"] for run in runs[name])
    return figures


if __name__ == "__main__":
    main()
