"""Cold start: seconds of `forge --help`, and of `forge train` until the end of the first optimizer step.

    python -m benchmarks.cold_start --json FILE

The job is jobs/pretrain.yaml on the elastic engine, with a prepared corpus. The parts are read from the run's
events.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.program import FORGE, Program, records_of, running, wait
from benchmarks.report import Measured, benchmark_parser, parse_options, print_table, write_json

JOB = "jobs/pretrain.yaml"
LIMIT_S = 180.0
T = TypeVar("T")


SMALLEST_JOB = """\
name: cold-start
model: {architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
data: {files: "CORPUS", seq_len: 32, tokenizer: {vocab_size: 300}, held_out: 0}
training: {total_steps: 1000, global_batch_size: 4}
resources: {workers: 1, gpu: none}
tracking: {wandb: {mode: disabled}}
"""


def main() -> None:
    """Measure both, `--repeats` times, in turn."""
    options = parse_options(benchmark_parser(__doc__), smallest={})  # a tiny job
    helps, starts = [], []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        job = Path(JOB).absolute()
        if options.smallest:
            job = Path(name) / "job.yaml"
            job.write_text(SMALLEST_JOB.replace("CORPUS", f"{name}/corpus.txt"))
            (Path(name) / "corpus.txt").write_text("the cat sat on a mat and saw one dog run past. " * 400)
        prepare(job, folder=Path(name))
        for _ in range(options.repeats):
            helps.append(seconds_of_help())
            starts.append(first_step(job, runs=Path(name) / "runs"))
    help_s = Measured(values=tuple(helps))
    total = Measured(values=tuple(start["total"] for start in starts))
    parts = {part: Measured(values=tuple(start[part] for start in starts)) for part in starts[0]}
    print_table(
        "Cold start",
        header=["what", "seconds: median [range]", "aim"],
        rows=[
            ["forge --help", help_s.text(".3f"), "≤ 0.25"],
            ["forge train, to the first step", total.text(".1f"), "≤ 20"],
            *([f"  {part}", measured.text(".1f"), ""] for part, measured in parts.items() if part != "total"),
        ],
    )
    figures = {
        "help_s": help_s.median,
        "train_first_step_s": total.median,
        "parts_s": {part: measured.median for part, measured in parts.items() if part != "total"},
        "all_help_s": list(help_s.values),
        "all_train_first_step_s": list(total.values),
    }
    write_json(options.json, figures=figures)


def seconds_of_help() -> float:
    began = time.perf_counter()
    subprocess.run([FORGE, "--help"], check=True, capture_output=True)
    return time.perf_counter() - began


def prepare(job: Path, *, folder: Path) -> None:
    """Train one step, so that the corpus is prepared and the model inspected."""
    changes = ["training.total_steps=1", f"checkpoint.to={folder}/first"]
    with running(train_command(job, changes), folder=folder) as program:
        if program.process.wait():
            raise RuntimeError(program.last_words())


def train_command(job: Path, changes: list[str]) -> list[str]:
    return [FORGE, "train", str(job), *(part for change in changes for part in ("--set", change))]


def first_step(job: Path, *, runs: Path) -> dict[str, float]:
    """Return the seconds from the command to the end of the first optimizer step, and their parts."""
    began = time.time()
    command = train_command(job, ["training.total_steps=1000", f"checkpoint.to={runs}"])
    with running(command, folder=runs.parent) as program:
        run_folder = wait_for(lambda: newest(runs, since=began), program)
        stepped = wait_for(lambda: first_of(run_folder / "metrics.jsonl"), program)["time"]
        # Metrics and events reach the recorder on different ways, so this event may come after the first step's
        # line.
        started = wait_for(lambda: first_of(run_folder / "events.jsonl", event="GenerationStarted"), program)
    records = {event["event"]: event for event in reversed(records_of(run_folder / "events.jsonl"))}
    planned = (run_folder / "plan.json").stat().st_mtime
    connected, forking = records["RunStarted"]["time"], records["GenerationStarting"]["time"]
    inside = started["seconds"]
    return {
        "total": stepped - began,
        "plan": planned - began,
        "start Ray and the recorder": connected - planned,
        "start supervisor, agent and fork server": forking - connected,
        **{f"rank: {part}": seconds for part, seconds in inside.items()},
        "first step": stepped - forking - sum(inside.values()),
    }


def newest(folder: Path, *, since: float) -> Path | None:
    found = [path for path in folder.glob("*/plan.json") if path.stat().st_mtime >= since]
    return found[0].parent if found else None


def first_of(path: Path, *, event: str | None = None) -> dict[str, Any] | None:
    """Return the first complete record of a file, or its first event of a kind."""
    return next((record for record in records_of(path) if event is None or record["event"] == event), None)


def wait_for(question: Callable[[], T | None], program: Program) -> T:
    """Poll for an answer that is not None. Raises: RuntimeError if the program ends or takes too long."""
    answer: T | None = None

    def is_answered() -> bool:
        nonlocal answer
        answer = question()
        return answer is not None

    if not wait(is_answered, program.process, deadline=time.monotonic() + LIMIT_S, poll_s=0.02):
        raise RuntimeError(f"the run did not come to its first step:\n{program.last_words()}")
    assert answer is not None
    return answer


if __name__ == "__main__":
    main()
