"""How long until something happens: `forge --help`, and `forge train` up to its first optimizer step.

    python -m benchmarks.cold_start --json FILE

The job is jobs/pretrain.yaml, its data cached. The parts are read from the run's own events.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import Measured, benchmark_parser, print_table, write_json

FORGE = str(Path(sys.executable).with_name("forge"))
JOB = "jobs/pretrain.yaml"


def main() -> None:
    """Measure both, `--repeats` times, in turn."""
    options = benchmark_parser(__doc__).parse_args()
    subprocess.run([FORGE, "plan", JOB], check=True, capture_output=True)
    helps, starts = [], []
    with tempfile.TemporaryDirectory(prefix="forge-bench-") as name:
        first_step(Path(name))  # prepares the corpus
        for _ in range(options.repeats):
            helps.append(seconds_of_help())
            starts.append(first_step(Path(name)))
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


def first_step(folder: Path) -> dict[str, float]:
    """Seconds from the command to the end of the first optimizer step, and what they were made of."""
    began = time.time()
    changes = ["training.total_steps=1000", f"checkpoint.to={folder}"]
    command = [FORGE, "train", JOB, *(part for change in changes for part in ("--set", change))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        run_folder = wait_for(lambda: newest(folder, since=began))
        line = wait_for(lambda: first_line(run_folder / "metrics.jsonl"))
    finally:
        for _ in range(2):  # stop now, without a checkpoint
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        process.wait()
    events = [json.loads(line) for line in (run_folder / "events.jsonl").read_text().splitlines()]
    planned = (run_folder / "plan.json").stat().st_mtime
    started = next(event["time"] for event in events if event["event"] == "RunStarted")
    formed = next(event for event in events if event["event"] == "GenerationStarted")
    stepped = json.loads(line)["time"]
    inside = formed["seconds"]
    return {
        "total": stepped - began,
        "plan": planned - began,
        "start Ray and the recorder": started - planned,
        "start Ray Train's workers, import": formed["time"] - started - sum(inside.values()),
        **{f"rank: {part}": seconds for part, seconds in inside.items()},
        "first step": stepped - formed["time"],
    }


def newest(folder: Path, *, since: float) -> Path | None:
    found = [path for path in folder.glob("*/plan.json") if path.stat().st_mtime >= since]
    return found[0].parent if found else None


def first_line(path: Path) -> str | None:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return lines[0] if lines and lines[0].endswith("\n") else None


def wait_for(question, *, timeout_s: float = 120.0):  # type: ignore[no-untyped-def]
    """The first answer that is not None."""
    deadline = time.monotonic() + timeout_s
    while (answer := question()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError("the run did not come to its first step")
        time.sleep(0.02)
    return answer


if __name__ == "__main__":
    main()
