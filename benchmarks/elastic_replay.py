"""Training through recorded spot traces: forge compared with Ray Train's elastic mode.

    python -m benchmarks.elastic_replay --traces FOLDER --json FILE

The Parcae segments (github.com/JF-D/Parcae, `parcae-hh.jsonl` and `parcae-lh.jsonl`), scaled to simulated nodes of
this machine and sped up. Both train the model of `benchmarks.recovery`, 12 sequences a step, without notice unless
`--notice` is given. Both have 40 s to start on the initial machines; then the trace runs. `samples_per_s` is the
number of samples trained for the first time ÷ the duration of the trace. `share` is that ÷ the samples per second
of the contender's median step; the changes cost the rest.

    forge       `forge chaos replay`, defaults
    ray_train   its best settings, see `benchmarks.peers.ray_train_elastic`, and a checkpoint every 20 steps:
                by Young's formula, √(2 · steps between failures · cost of a checkpoint in steps)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.peers.forge_elastic import write_job
from benchmarks.program import FORGE, module, records_of, running
from benchmarks.recovery import JOB
from benchmarks.report import benchmark_parser, parse_options, print_table, write_json
from forge.chaos.trace import NodeChange, Trace, faster
from forge.chaos.trace_file import read_trace
from forge.chaos.trace_scale import scale

TRACES = ("parcae-hh", "parcae-lh")
_JOB: Mapping[str, Any] = {**JOB, "global_batch_size": 12, "checkpoint_every": 20}
_START_S = 40.0
_PATIENCE_S = 180.0
SMALLEST = Trace(
    changes=(
        NodeChange(at_s=0.0, added=("a", "b"), removed=()),
        NodeChange(at_s=10.0, added=(), removed=("b",)),
    ),
    duration_s=20.0,
    max_nodes=2,
)
"""One loss of a node, for `--smallest`."""
"""To raise the cluster before, and to stop after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The result of one contender on one trace."""

    samples_per_s: float
    """New ones."""
    repeated_samples: int
    share: float
    num_given_up: int = 0
    """How often the contender had to be started again."""


def main() -> None:
    """Replay every trace with both contenders."""
    parser = benchmark_parser(__doc__, repeats=1)
    parser.add_argument(
        "--traces", type=Path, metavar="FOLDER", help="where the recorded traces are; not needed with --smallest"
    )
    parser.add_argument("--only", nargs="+", choices=TRACES, default=TRACES, metavar="TRACE")
    parser.add_argument("--nodes", type=int, default=4, help="simulated machines at most")
    parser.add_argument("--speed", type=float, default=13.5, help="how much faster than the trace")
    parser.add_argument("--notice", type=float, default=0.0, metavar="S", help="seconds; by default none is given")
    options = parse_options(parser, smallest={"nodes": 2, "speed": 1.0, "only": ("smallest",)})
    if options.traces is None and not options.smallest:
        parser.error("give --traces FOLDER")
    figures: dict[str, Any] = {}
    for name in options.only:
        recorded = SMALLEST if options.smallest else read_trace(options.traces / f"{name}.jsonl")
        trace = faster(scale(recorded, num_nodes=options.nodes), speed=options.speed)
        found: dict[str, list[Trained]] = {"forge": [], "ray_train": []}
        for _ in range(options.repeats):
            for contender, replay in (("forge", replay_forge), ("ray_train", replay_ray_train)):
                found[contender].append(replay(trace, options))
                print(f"  {name}, {contender}: {found[contender][-1]}", file=sys.stderr)
        figures[name] = figures_of(found) | {"num_changes": len(trace.changes) - 1}
        write_json(options.json, figures=figures)
    report(figures)


def replay_forge(trace: Trace, options: argparse.Namespace) -> Trained:
    """Run `forge chaos replay` as a user does."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as text:
        folder = Path(text)
        job = write_job({**_JOB, "folder": text}, workers=options.nodes)
        (folder / "trace.jsonl").write_text(trace_text(trace))
        command = [FORGE, "chaos", "replay", str(folder / "trace.jsonl"), "--job", str(job), "-o", "json"]
        command += ["--nodes", str(options.nodes)]
        command += ["--notice", str(options.notice)] if options.notice else []
        await_end(command, folder=folder, trace=trace)
        answer = json.loads((folder / "answer").read_text())
        if answer["wall_s"] < _START_S + trace.duration_s:
            raise RuntimeError(f"the run was stopped after {answer['wall_s']:.0f} s")
        run = Path(answer["folder"])
        again = [event for event in records_of(run / "events.jsonl") if event["event"] == "StepRepeated"]
        # The plan is the last thing that is written before the run is carried.
        return trained(
            [*records_of(run / "metrics.jsonl"), *again], trace, began_s=(run / "plan.json").stat().st_mtime
        )


def replay_ray_train(trace: Trace, options: argparse.Namespace) -> Trained:
    """Run Ray Train with its best settings."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as text:
        folder, names = Path(text), dict[str, int]()
        lines = []
        for change in trace.changes:
            for node in change.added:
                names[node] = len(names)
            both = (("remove", change.removed), ("add", change.added)) if change.at_s else ()
            lines += [[_START_S + change.at_s, what, names[node]] for what, nodes in both for node in nodes]
        (folder / "schedule").write_text("".join(json.dumps(line) + "\n" for line in lines))
        num_nodes = len(trace.changes[0].added)
        request = {**_JOB, "folder": text, "is_tuned": True, "nodes": num_nodes, "max_nodes": options.nodes}
        arguments = ["--schedule", str(folder / "schedule"), "--seconds", str(_START_S + trace.duration_s)]
        arguments += ["--notice", str(options.notice)]
        await_end(module("ray_train_elastic", request, *arguments), folder=folder, trace=trace)
        records = records_of(folder / "steps.jsonl")
        began_s = next(record["time"] for record in records if "began" in record)
        steps = [record for record in records if "step" in record]
        num_given_up = sum("gave_up" in record for record in records)
        return replace(trained(steps, trace, began_s=began_s), num_given_up=num_given_up)


def trace_text(trace: Trace) -> str:
    """Format the trace for `forge chaos replay`, with all changes but the first after the startup time."""
    first, *later = trace.changes
    changes = (first, *(replace(change, at_s=_START_S + change.at_s) for change in later))
    return replace(trace, changes=changes, duration_s=_START_S + trace.duration_s).to_jsonl()


def await_end(command: list[str], *, folder: Path, trace: Trace) -> None:
    """Wait until a program ends. Raises: RuntimeError if it fails or takes too long."""
    with running(command, folder=folder) as program:
        try:
            code: int | str = program.process.wait(_START_S + trace.duration_s + _PATIENCE_S)
        except subprocess.TimeoutExpired:
            code = "too slow"
        if code != 0:
            raise RuntimeError(f"{' '.join(command[:4])} failed ({code}):\n{program.last_words()}")


def trained(steps: list[dict[str, Any]], trace: Trace, *, began_s: float) -> Trained:
    """Count the samples that were trained while the trace ran.

    Args:
        steps: `{"time", "step"}` of every completed step, repeated ones included.
        began_s: when the training was started.
    """
    steps = sorted(steps, key=lambda record: record["time"])
    first_s: dict[int, float] = {}
    for record in steps:
        first_s.setdefault(record["step"], record["time"])
    start_s, end_s = began_s + _START_S, began_s + _START_S + trace.duration_s
    if steps[0]["time"] > start_s:
        raise RuntimeError(f"the first step took {steps[0]['time'] - began_s:.0f} s")
    ends_s = [record["time"] for record in steps if start_s < record["time"] <= end_s]
    num_new = sum(start_s < at <= end_s for at in first_s.values())
    samples_per_s = num_new * _JOB["global_batch_size"] / trace.duration_s
    usual_samples_per_s = _JOB["global_batch_size"] / statistics.median(b - a for a, b in pairwise(ends_s))
    return Trained(
        samples_per_s=samples_per_s,
        repeated_samples=(len(ends_s) - num_new) * _JOB["global_batch_size"],
        share=samples_per_s / usual_samples_per_s,
    )


def figures_of(found: Mapping[str, list[Trained]]) -> dict[str, Any]:
    """Return the medians of one trace, and their ratio."""
    figures: dict[str, Any] = {}
    for contender, of in found.items():
        figures[f"{contender}_samples_per_s"] = statistics.median(one.samples_per_s for one in of)
        figures[f"{contender}_share"] = statistics.median(one.share for one in of)
        figures[f"{contender}_repeated_samples"] = statistics.median(one.repeated_samples for one in of)
        figures[f"{contender}_given_up"] = sum(one.num_given_up for one in of)
        figures[f"all_{contender}_samples_per_s"] = [one.samples_per_s for one in of]
    return figures | {"ratio": figures["forge_samples_per_s"] / figures["ray_train_samples_per_s"]}


def report(figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table."""
    rows = []
    for name, of in figures.items():
        for contender in ("forge", "ray_train"):
            cells = [f"{of[f'{contender}_samples_per_s']:.1f}", f"{of[f'{contender}_share']:.3f}"]
            ratio = f"{of['ratio']:.2f}" if contender == "forge" else ""
            rows.append([f"{name}, {contender}", *cells, f"{of[f'{contender}_repeated_samples']:,.0f}", ratio])
    print_table(
        "Spot traces; new samples a second",
        header=["", "samples/s", "share", "repeated", "ratio (≥ 1.5)"],
        rows=rows,
    )


if __name__ == "__main__":
    main()
