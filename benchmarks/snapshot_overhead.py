"""Measure the cost of a snapshot with a replica on another machine at every step.

    python -m benchmarks.snapshot_overhead [--batch 48] --json FILE

A Llama of 30 million parameters (360 MB of training state), 12 sequences of 256 a step (2 s; a realistic batch is
larger, and the cost of a snapshot does not depend on it), bf16, ZeRO 1, on two simulated machines of one worker
each. `forge train` runs with `checkpoint.snapshot_every: 1` and without snapshots (an interval longer than the
run), in blocks of one run each whose order alternates. A step's time is from the end of the previous step to its
own end; the first steps of a run, which touch memory for the first time, and the last, which waits for the
checkpoint, are left out. `overhead` is the median step with snapshots ÷ the median step without. A last run with
`auto` shows which interval it chooses.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.forge_elastic import write_job
from benchmarks.program import Program, module, records_of, running, train_to_end, wait
from benchmarks.report import Measured, benchmark_parser, parse_options, print_table, write_json

_NODES = 2
_JOB: dict[str, Any] = {
    "model": {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "vocab_size": 4096,
    "seq_len": 256,
    "global_batch_size": 12,
    "lr": 3e-4,
}
_WARM_UP = 5
_NEVER = 1_000_000
_START_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One `forge train`."""

    steps_s: tuple[float, ...]
    every: int | None
    """Steps between snapshots as chosen by the run itself, if it chose."""


def main() -> None:
    """Run both settings `--repeats` times, in turn."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--steps", type=int, default=14, help="measured steps of each run")
    parser.add_argument("--batch", type=int, default=_JOB["global_batch_size"], help="sequences a step")
    options = parse_options(parser, smallest={"steps": 2, "batch": 2})
    runs: dict[int, list[Run]] = {1: [], _NEVER: []}
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        request = {"folder": name, "nodes": _NODES, "model": None}
        with running(module("forge_elastic", request), folder=folder) as program:
            if not wait(lambda: has_machines(folder), program.process, deadline=time.monotonic() + _START_LIMIT_S):
                raise RuntimeError(f"the machines did not start:\n{program.last_words()}")
            job = write_job({**_JOB, "global_batch_size": options.batch, "folder": name}, workers=_NODES)
            for block in range(options.repeats):
                for every in sorted(runs, reverse=bool(block % 2)):
                    runs[every].append(train(job, program, snapshot_every=every, num_steps=options.steps))
                    median_s = statistics.median(runs[every][-1].steps_s)
                    print(f"  a snapshot every {every:,} steps: {median_s:.3f} s a step", file=sys.stderr)
            auto = train(
                job,
                program,
                snapshot_every="auto",
                num_steps=options.steps if options.smallest else max(20, options.steps),
            )
    report(runs[1], runs[_NEVER], auto, json_path=options.json)


def has_machines(folder: Path) -> bool:
    """Whether the cluster is complete."""
    return any("ready" in record for record in records_of(folder / "steps.jsonl"))


def train(job: Path, program: Program, *, snapshot_every: int | str, num_steps: int) -> Run:
    """Train one run on the running machines and delete its folder."""
    changes = {
        "checkpoint.snapshot_every": snapshot_every,
        "checkpoint.every": f"{_NEVER} steps",
        "resources.workers": _NODES,
        "training.total_steps": _WARM_UP + num_steps + 1,
    }
    settings = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    folder = train_to_end(job, *settings, environment=program.environment)
    ends_s = [record["time"] for record in records_of(folder / "metrics.jsonl")]
    paced = [
        event["every"]
        for event in records_of(folder / "events.jsonl")
        if event["event"] == "SnapshotIntervalChanged"
    ]
    shutil.rmtree(folder)
    steps_s = [late - early for early, late in itertools.pairwise(ends_s)]
    return Run(steps_s=tuple(steps_s[_WARM_UP - 1 : -1]), every=paced[-1] if paced else None)


def report(with_snapshots: list[Run], without: list[Run], auto: Run, *, json_path: Path | None) -> None:
    """Print the table. Returns: the figures."""
    all_s = {
        name: Measured(values=tuple(seconds for run in runs for seconds in run.steps_s))
        for name, runs in (("every step", with_snapshots), ("never", without))
    }
    overhead = all_s["every step"].median / all_s["never"].median
    blocks = Measured(
        values=tuple(
            statistics.median(one.steps_s) / statistics.median(other.steps_s)
            for one, other in zip(with_snapshots, without, strict=True)
        )
    )
    rows = [[f"a step, a snapshot {name} (s)", measured.text(".3f"), ""] for name, measured in all_s.items()]
    rows += [
        ["overhead (÷)", f"{overhead:.3f}", "≤ 1.035"],
        ["the same, block by block", blocks.text(".3f"), ""],
        ["steps between snapshots that `auto` chooses", str(auto.every or 1), ""],
    ]
    print_table("Snapshots on two machines after every step", header=["", "median [range]", "aim"], rows=rows)
    figures = {
        "overhead": overhead,
        "overhead_of_blocks": blocks.values,
        "step_s": all_s["every step"].median,
        "step_without_s": all_s["never"].median,
        "auto_every": auto.every or 1,
        "all_step_s": [run.steps_s for run in with_snapshots],
        "all_step_without_s": [run.steps_s for run in without],
    }
    write_json(json_path, figures=figures)


if __name__ == "__main__":
    main()
