"""Measure the cost of a snapshot with a replica on another machine at every step.

    python -m benchmarks.snapshot_overhead [--batch 48] --json FILE

A Llama of 30 million parameters (360 MB of training state), 12 sequences of 256 a step (2 s; a realistic batch is
larger, and the cost of a snapshot does not depend on it), bf16, ZeRO 1, on two simulated machines of one worker
each. `forge train` runs with `checkpoint.snapshot_every: 2`. A snapshot is taken at the end of a step of even
number, and copied and sent during the next one, so each pair of steps is one with a snapshot and one without. A
machine whose speed drifts by a fifth within minutes, as shared ones do, cannot favour either. A step's time is from
the end of the previous step to its own end. The first steps of a run, which touch memory for the first time, and
the last, which waits for the checkpoint, are left out. `overhead` is the median over all pairs of the step with a
snapshot ÷ the step without. A last run with `auto` shows which interval it chooses.
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
_WARM_UP = 6
"""Even: the first measured step is the one after a snapshot."""
_NEVER = 1_000_000
_START_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One `forge train`."""

    steps_s: tuple[float, ...]
    """The first one and each second one after it with a snapshot, if the interval is two steps."""
    every: int | None
    """Steps between snapshots as chosen by the run itself, if it chose."""

    @property
    def ratios(self) -> tuple[float, ...]:
        """Of each pair, the step with a snapshot ÷ the step without."""
        return tuple(after / other for after, other in zip(self.steps_s[::2], self.steps_s[1::2], strict=True))


def main() -> None:
    """Run with a snapshot at each second step, `--repeats` times, then with `auto`."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=12, help="measured pairs of steps of each run")
    parser.add_argument("--batch", type=int, default=_JOB["global_batch_size"], help="sequences a step")
    options = parse_options(parser, smallest={"pairs": 1, "batch": 2})
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        request = {"folder": name, "nodes": _NODES, "model": None}
        with running(module("forge_elastic", request), folder=folder) as program:
            if not wait(lambda: has_machines(folder), program.process, deadline=time.monotonic() + _START_LIMIT_S):
                raise RuntimeError(f"the machines did not start:\n{program.last_words()}")
            job = write_job({**_JOB, "global_batch_size": options.batch, "folder": name}, workers=_NODES)
            for _ in range(options.repeats):
                runs.append(train(job, program, snapshot_every=2, num_steps=2 * options.pairs))
                print(f"  with ÷ without: {Measured(values=runs[-1].ratios).text('.3f')}", file=sys.stderr)
            auto = train(
                job,
                program,
                snapshot_every="auto",
                num_steps=2 * options.pairs if options.smallest else max(20, 2 * options.pairs),
            )
    report(runs, auto, json_path=options.json)


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


def report(runs: list[Run], auto: Run, *, json_path: Path | None) -> None:
    """Print the table and write the figures."""
    with_s = Measured(values=tuple(seconds for run in runs for seconds in run.steps_s[::2]))
    without_s = Measured(values=tuple(seconds for run in runs for seconds in run.steps_s[1::2]))
    ratios = Measured(values=tuple(ratio for run in runs for ratio in run.ratios))
    of_runs = Measured(values=tuple(statistics.median(run.ratios) for run in runs))
    rows = [
        ["a step with a snapshot (s)", with_s.text(".3f"), ""],
        ["a step without (s)", without_s.text(".3f"), ""],
        ["overhead: with ÷ without, of all pairs", ratios.text(".3f"), "≤ 1.035"],
        ["the median of each run", of_runs.text(".3f"), ""],
        ["steps between snapshots that `auto` chooses", str(auto.every or 1), ""],
    ]
    print_table("A snapshot on two machines", header=["", "median [range]", "aim"], rows=rows)
    figures = {
        "overhead": ratios.median,
        "overhead_of_runs": of_runs.values,
        "step_s": with_s.median,
        "step_without_s": without_s.median,
        "auto_every": auto.every or 1,
        "all_steps_s": [run.steps_s for run in runs],
    }
    write_json(json_path, figures=figures)


if __name__ == "__main__":
    main()
