"""Hold the plan's estimate of memory against the measured peak of real runs on CPU.

    python -m benchmarks.memory [--only NAME ...] --json FILE

`forge train` runs a Llama of 8 layers of 512 (vocabulary of 8,192, 16 sequences of 256 a step) once for each
configuration. *measured* is the largest resident memory of a rank (`memory/peak_gib` of the last step). *estimate*
is what the plan says of that world size, without the copies that the agent of another machine holds. `error` is
estimate ÷ measured - 1; `median_error` and `largest_error` are of its absolute value; `median_state_error` likewise
without the libraries, which says more about larger models. Aim: at most 10 %.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.program import records_of, train_to_end
from benchmarks.report import benchmark_parser, parse_options, print_table, write_json
from forge.plan.memory import MemoryEstimate
from forge.plan.snapshot_memory import num_copies_in_memory
from forge.runs.reader import read_plan

MODEL = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
SMALLEST = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "2 workers": {"workers": 2},
    "ZeRO 0": {"zero": {"stage": 0}},
    "ZeRO 1, 2 workers": {"workers": 2, "zero": {"stage": 1}},
    "ZeRO 3, 2 workers": {"workers": 2, "zero": {"stage": 3}},
    "fp32": {"precision": "fp32"},
    "recomputed": {"activation_checkpointing": True},
    "selective": {"activation_checkpointing": "selective"},
    "plain loss": {"cross_entropy": "plain"},
    "EMA": {"ema": {"decay": 0.99}},
    "lion": {"optimizer": {"name": "lion", "lr": 1e-4}},
    "adafactor": {"optimizer": {"name": "adafactor", "lr": 1e-3}},
    "micro-batch 1": {"micro_batch_size": 1},
}
"""Values of `training`, and the number of workers."""
_COPIES_IN_RANK = 2
"""Snapshot buffers of its own that a rank has mapped (`forge.checkpoint.snapshot_buffer`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """One run, in bytes of one rank."""

    measured: int
    estimate: int
    libraries: int

    @property
    def error(self) -> float:
        return self.estimate / self.measured - 1

    @property
    def state_error(self) -> float:
        """Without the libraries on both sides."""
        return (self.estimate - self.libraries) / max(1, self.measured - self.libraries) - 1


def main() -> None:
    """Run every configuration once."""
    parser = benchmark_parser(__doc__, repeats=1)
    parser.add_argument("--steps", type=int, default=3, help="steps of each run")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME")
    options = parse_options(parser, smallest={"steps": 2, "only": ["defaults"]})
    peaks: dict[str, Peak] = {}
    model = MODEL | (SMALLEST if options.smallest else {})
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="forge-bench-") as folder:
            peaks[name] = run(CONFIGURATIONS[name], folder=Path(folder), steps=options.steps, model=model)
        print(f"  {name}: {peaks[name].error:+.1%}", file=sys.stderr)
    report(peaks, json_path=options.json)


def job_of(configuration: dict[str, Any], *, folder: Path, steps: int, model: dict[str, int]) -> dict[str, Any]:
    """The job of a configuration."""
    training = dict(configuration)
    workers = training.pop("workers", 1)
    usual = {
        "total_steps": steps,
        "global_batch_size": 16,
        "micro_batch_size": 8,
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup": 1},
    }
    return {
        "name": "memory",
        "model": {"architecture": "llama", **model},
        "data": {
            "source": "python-stdlib",
            "tokenizer": {"train": "bpe", "vocab_size": 8192},
            "seq_len": 256,
            "held_out": 0,
        },
        "training": usual | training,
        # Both snapshot buffers are in memory; a third is used only while a checkpoint is written.
        "checkpoint": {"every": "1000 steps", "snapshot_every": 1, "to": str(folder / "runs")},
        "resources": {"workers": workers, "gpu": "none"},
        "tracking": {"wandb": {"mode": "disabled"}},
    }


def run(configuration: dict[str, Any], *, folder: Path, steps: int, model: dict[str, int]) -> Peak:
    """Train one configuration as a user does."""
    job = job_of(configuration, folder=folder, steps=steps, model=model)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    run_folder = train_to_end(path, environment={"FORGE_STATE": str(folder / "state")})
    last = records_of(run_folder / "metrics.jsonl")[-1]
    plan, world_size = read_plan(run_folder), job["resources"]["workers"]
    need = plan.for_world_size(world_size).memory
    copies = num_copies_in_memory(engine=plan.job.resources.engine, world_size=world_size)
    return Peak(
        measured=round(last["memory/peak_gib"] * 2**30),
        estimate=resident_bytes(need, num_copies=copies),
        libraries=need.libraries_bytes,
    )


def resident_bytes(need: MemoryEstimate, *, num_copies: int) -> int:
    """The part of an estimate that is in the rank's own memory.

    Args:
        num_copies: of the rank's state in host memory, those in other processes included.
    """
    elsewhere = max(0, num_copies - _COPIES_IN_RANK)
    return need.total_bytes - need.host_bytes * elsewhere // num_copies


def report(peaks: dict[str, Peak], *, json_path: Path | None) -> None:
    """Print the table and write the figures."""
    rows = [
        (
            name,
            *(f"{size / 2**20:,.0f}" for size in (peak.measured, peak.estimate)),
            *(f"{error:+.1%}" for error in (peak.error, peak.state_error)),
        )
        for name, peak in peaks.items()
    ]
    header = ("configuration", "measured", "estimate", "error", "without libraries")
    print_table("peak resident memory of a rank, MiB", header=header, rows=rows)
    errors = [abs(peak.error) for peak in peaks.values()]
    figures = {
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
        "median_state_error": statistics.median(abs(peak.state_error) for peak in peaks.values()),
    }
    print(figures, file=sys.stderr)
    runs = {
        name: {"measured_bytes": peak.measured, "estimate_bytes": peak.estimate, "error": peak.error}
        for name, peak in peaks.items()
    }
    write_json(json_path, figures=figures | {"runs": runs})


if __name__ == "__main__":
    main()
