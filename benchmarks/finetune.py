"""Fine-tuning throughput of forge and its peers on the same work.

    python -m benchmarks.finetune [--only sft lora dpo mlm] --json FILE

A random Llama (of `mlm` a random BERT) of 4 layers of 256, a vocabulary of 4,096, rows of 256 tokens, 16 rows a
step, bf16, ZeRO 1, two workers; random records whose lengths vary. forge runs as a user runs it: `forge train` with
Ray, recorder and screen. The peers run under torchrun, with DeepSpeed and with DistributedDataParallel, with
torch's fused AdamW and plain attention, the fastest for short rows on CPU.

    sft    chat, packed, loss on the assistant's turns: TRL's SFTTrainer with both ways of packing
    lora   the same with LoRA of rank 8 on all linear layers: SFTTrainer with peft
    dpo    preference pairs with stored log-probabilities of the reference: TRL's DPOTrainer
    mlm    15 % of the tokens masked, texts end to end: transformers' Trainer with its collator

Figures are tokens/s without padding, and pairs/s of `dpo`. Ratios are relative to the fastest variant of the peer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.finetune_inputs import SEQ_LEN, save_base, write_records
from benchmarks.program import records_of, train_to_end
from benchmarks.report import Measured, benchmark_parser, parse_options, print_table, write_json
from benchmarks.torchrun import run_under_torchrun

WORKERS = 2
BATCH = 16
WARM_UP = 4
KINDS = ("sft", "lora", "dpo", "mlm")
RATIOS = {
    "sft": ("ratio_vs_sft_trainer", "≥ 1.2"),
    "lora": ("ratio_vs_peft_trainer", "≥ 1.1"),
    "dpo": ("ratio_vs_dpo_trainer", "≥ 1.3"),
    "mlm": ("ratio_vs_trainer_mlm", "≥ 1.2"),
}
_PACKED = ({"packing": "bfd", "micro": 1}, {"packing": "wrapped", "micro": 8})
_PEERS: dict[str, tuple[str, tuple[dict[str, Any], ...]]] = {
    "sft": ("trl_trainer", _PACKED),
    "lora": ("trl_trainer", _PACKED),
    "dpo": ("trl_trainer", ({"micro": 2}, {"micro": 8})),
    "mlm": ("mlm_trainer", ({"micro": 8},)),
}
"""Program and variants of the peer of each kind of work; each runs with and without DeepSpeed."""


def main() -> None:
    """Run forge and every variant of the peers `--repeats` times, in turn."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each run")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    options = parse_options(parser, smallest={"steps": 2, "only": ["sft"]})
    runs: dict[str, dict[str, list[float]]] = {}
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
        for kind in options.only:
            folder = Path(name) / kind
            folder.mkdir()
            save_base(folder / "base", kind=kind)
            write_records(folder / "records.jsonl", kind=kind)
            runs[kind], padding = measure(kind, folder=folder, steps=options.steps, repeats=options.repeats)
            figures |= figures_of(kind, runs[kind], padding=padding)
    report(runs, figures=figures)
    write_json(options.json, figures={**figures, "all": runs})


def measure(kind: str, *, folder: Path, steps: int, repeats: int) -> tuple[dict[str, list[float]], float]:
    """Run the contenders of one kind of work in turn. Returns: their speeds, and forge's share of padding."""
    module, variants = _PEERS[kind]
    speeds: dict[str, list[float]] = {"forge": []}
    padding = 0.0
    for _ in range(repeats):
        speed, padding = run_forge(kind, folder=folder, steps=steps)
        speeds["forge"].append(speed)
        for variant in ({**one, "deepspeed": on} for one in variants for on in (True, False)):
            name = " ".join([module, *(f"{key}={value}" for key, value in variant.items())])
            request: dict[str, Any] = {
                "kind": kind,
                "base": str(folder / "base"),
                "records": str(folder / "records.jsonl"),
            }
            request |= {"seq_len": SEQ_LEN, "batch": BATCH, "warm_up": WARM_UP, "steps": steps, **variant}
            output = run_under_torchrun(
                module, world_size=WORKERS, request=request, stdout=subprocess.PIPE, quiet=True
            )
            answer = json.loads(output.splitlines()[-1])
            speeds.setdefault(name, []).append(answer["pairs_per_s" if kind == "dpo" else "tokens_per_s"])
        print(f"  {kind}: { {name: round(found[-1], 1) for name, found in speeds.items()} }", file=sys.stderr)
    return speeds, padding


def run_forge(kind: str, *, folder: Path, steps: int) -> tuple[float, float]:
    """Run `forge train`, and measure from the step after the warm-up to the last but one.

    Returns: tokens without padding, or pairs, per second, and the share of padding.
    """
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job_of(kind, folder=folder, steps=steps)))
    run = train_to_end(path, environment={"FORGE_STATE": str(folder / "state")})
    metrics = records_of(run / "metrics.jsonl")
    seconds = metrics[-2]["time"] - metrics[WARM_UP - 1]["time"]
    corpus = json.loads((run / "plan.json").read_text())["corpus"]
    num_rows = (metrics[-2]["step"] - WARM_UP) * BATCH
    if kind == "dpo":
        return num_rows * corpus["num_examples"] / corpus["num_train_sequences"] / seconds, corpus["padding"]
    return num_rows * SEQ_LEN * (1 - corpus["padding"]) / seconds, corpus["padding"]


def job_of(kind: str, *, folder: Path, steps: int) -> dict[str, Any]:
    """Return the job file."""
    objective = {"sft": "chat", "lora": "chat", "dpo": "dpo", "mlm": "masked-lm"}[kind]
    form = {"chat": "chat", "dpo": "preference", "masked-lm": "text"}[objective]
    model: dict[str, Any] = {"from_pretrained": str(folder / "base")}
    if kind == "lora":
        model["lora"] = {"rank": 8, "alpha": 16, "targets": "all-linear"}
    return {
        "name": "bench",
        "model": model,
        "data": {
            "files": str(folder / "records.jsonl"),
            "format": form,
            "seq_len": SEQ_LEN,
            **({"packing": "concatenate"} if form == "text" else {}),
        },
        "training": {
            "objective": objective,
            "total_steps": WARM_UP + steps + 1,
            "global_batch_size": BATCH,
            "optimizer": {"lr": 1e-3},
            "zero": {"stage": 1},
            "evaluate_every": "1000 steps",
        },
        "checkpoint": {"every": "1000 steps", "to": str(folder / "runs")},
        "resources": {"workers": WORKERS, "gpu": "none"},
        "tracking": {"wandb": {"mode": "disabled"}},
    }


def figures_of(kind: str, speeds: dict[str, list[float]], *, padding: float) -> dict[str, float]:
    """Return the ratio to the fastest variant of the peer, and the share of padding."""
    medians = {name: Measured(values=tuple(found)).median for name, found in speeds.items()}
    fastest = max(value for name, value in medians.items() if name != "forge")
    return {
        RATIOS[kind][0]: medians["forge"] / fastest,
        f"{kind}_forge_per_s": medians["forge"],
        f"{kind}_padding": padding,
    }


def report(runs: dict[str, dict[str, list[float]]], *, figures: dict[str, float]) -> None:
    """Print the speeds and the ratios."""
    rows = [
        [kind, name, Measured(values=tuple(found)).text(",.1f")]
        for kind, speeds in runs.items()
        for name, found in speeds.items()
    ]
    print_table("Tokens/s without padding; dpo: pairs/s", header=["work", "contender", "median [range]"], rows=rows)
    aims = dict(RATIOS.values()) | {"sft_padding": "≤ 0.02"}
    rows = [[name, f"{value:,.4g}", aims.get(name, "")] for name, value in figures.items()]
    print_table("Figures", header=["figure", "value", "aim"], rows=rows)


if __name__ == "__main__":
    main()
