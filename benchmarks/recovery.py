"""Recovery from the loss of a machine: forge beside Ray Train's and torchrun's elastic modes.

    python -m benchmarks.recovery --json FILE

Three simulated nodes of this machine, one worker each, train a small Llama (4 layers of 256, vocabulary
1,024, sequences of 128), 6 sequences a step, bf16, ZeRO 1. One node, not the one that hosts the rendezvous
or the controller, is killed with all its processes at once. The results are the time from the kill to the
end of the first optimizer step of the other two, and the number of repeated steps.

    forge               `forge train`, a snapshot at every step; see `benchmarks.peers.forge_elastic`
    forge_auto          defaults: snapshots cost at most 1 % of the time
    ray_train_default   Ray Train's elastic mode, defaults
    ray_train_tuned     the same with its best settings; see `benchmarks.peers.ray_train_elastic`
    torchrun            its elastic mode with its best settings; see `benchmarks.peers.torchrun_elastic`

The peers run one loop, which writes a checkpoint every five steps. The contenders take turns; a run
that has not recovered after four minutes is ended and counted as unrecovered, not in the medians. The times of
kills are spread evenly over 20 s, the period in which Ray Train refreshes its view of the cluster, because its
recovery time depends on the age of that view.

Other changes of a run of forge are measured afterwards: `changes`, see `benchmarks.changes`, and `partition`, see
`benchmarks.partition`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.changes import changes_of, measure_changes, medians_of_parts
from benchmarks.partition import measure_partition
from benchmarks.program import module, records_of, running, wait
from benchmarks.report import Measured, benchmark_parser, parse_options, print_table, write_json

NODES = 3
VICTIM = NODES - 1
JOB: Mapping[str, Any] = {
    "model": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "vocab_size": 1024,
    "seq_len": 128,
    "global_batch_size": 6,
    "lr": 1e-3,
    "checkpoint_every": 5,
}
"""The peers write checkpoints; one costs them about as much as a step."""
WARM_UP = 10
"""Steps of all nodes together before any kill."""
KILLS_SPREAD_S = 20.0
STEPS_AFTER = 3
START_LIMIT_S = 240.0
LIMIT_S = 240.0
"""From the kill."""
CONTENDERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "forge": ("forge_elastic", {"snapshot_every": 1}),
    "forge_auto": ("forge_elastic", {}),
    "ray_train_default": ("ray_train_elastic", {"is_tuned": False}),
    "ray_train_tuned": ("ray_train_elastic", {"is_tuned": True}),
    "torchrun": ("torchrun_elastic", {}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """The cost of one kill."""

    seconds: float
    """From the kill to the end of the first step of those that were left."""
    repeated_steps: int
    parts_s: Mapping[str, float] = field(default_factory=dict)
    """What it was made of, where the contender tells."""


def main() -> None:
    """Kill a node of every contender in turn, `--repeats` times; then measure the other changes."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--peer-repeats", type=int, default=3, help="they are slow")
    parser.add_argument("--sequences", type=int, default=JOB["global_batch_size"], help="of a step")
    everything = (*CONTENDERS, "changes", "partition")
    parser.add_argument("--only", nargs="+", choices=everything, default=everything, metavar="NAME")
    options = parse_options(parser, smallest={"peer_repeats": 1})
    job = {**JOB, "global_batch_size": options.sequences}
    repeats = {
        name: options.repeats if program == "forge_elastic" else options.peer_repeats
        for name, (program, _) in CONTENDERS.items()
    }
    runs: dict[str, list[Recovery | None]] = {name: [] for name in CONTENDERS if name in options.only}
    for repeat in range(max(repeats.values())):
        for name in runs:
            if repeat < repeats[name]:
                kill_after_s = 0.0 if options.smallest else KILLS_SPREAD_S * (repeat + 0.5) / repeats[name]
                recovery = measure(name, job=job, kill_after_s=kill_after_s)
                runs[name].append(recovery)
                if recovery is not None:
                    print(f"  {name}: {recovery}", file=sys.stderr)
    figures: dict[str, Any] = report(runs) if runs else {}
    write_json(options.json, figures=figures)  # what is measured is kept, whatever happens to the rest
    for name, measure_more in (("changes", measure_changes), ("partition", measure_partition)):
        if name in options.only:
            figures |= measure_more(job, repeats=options.repeats)
            write_json(options.json, figures=figures)


def measure(name: str, *, job: Mapping[str, Any], kill_after_s: float) -> Recovery | None:
    """Measure one run of one contender; None if it did not recover in time.

    Args:
        kill_after_s: delay of the kill after the warm-up.
    """
    program_name, settings = CONTENDERS[name]
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as text:
        folder = Path(text)
        request = {**job, **settings, "folder": text, "nodes": NODES}
        steps = folder / "steps.jsonl"
        with running(module(program_name, request), folder=folder) as program:
            deadline = time.monotonic() + START_LIMIT_S
            if not wait(lambda: is_warm(records_of(steps)), program.process, deadline=deadline):
                raise RuntimeError(f"{name} did not begin to train:\n{program.last_words()}")
            time.sleep(kill_after_s)
            program.say(f"remove {VICTIM}")
            deadline = time.monotonic() + LIMIT_S
            wait(lambda: recovery_of(records_of(steps)) is not None, program.process, deadline=deadline)
            exit_code, last_words = program.process.poll(), program.last_words()
        recovery = recovery_of(records_of(steps))
        if recovery is None:
            reason = f"within {LIMIT_S:.0f} s" if exit_code is None else f": its program ended with {exit_code}"
            worlds = [record["world_size"] for record in records_of(steps) if "step" in record][-10:]
            print(f"  {name}: no {STEPS_AFTER} steps of {NODES - 1} workers {reason}.", file=sys.stderr)
            print(f"Workers of its last steps: {worlds}; its last output:\n{last_words}", file=sys.stderr)
        elif program_name == "forge_elastic":
            recovery = replace(recovery, parts_s=changes_of(folder)[-1].parts)
        return recovery


def is_warm(records: Sequence[dict[str, Any]]) -> bool:
    """Whether all nodes have trained together for a while."""
    return len([record for record in records if record.get("world_size") == NODES]) >= WARM_UP


def recovery_of(records: Sequence[dict[str, Any]]) -> Recovery | None:
    """Return the cost of the kill after the survivors have taken some steps; None before.

    Args:
        records: `{"time", "step", "world_size"}` of every completed step, `{"time", "removed"}` of the kill. A
            step may be completed after the kill by all nodes: what the dead one had to say was already said.
    """
    killed_s = next((record["time"] for record in records if "removed" in record), None)
    if killed_s is None:
        return None
    steps = [record for record in records if "step" in record]
    after = [record for record in steps if record["time"] > killed_s and record["world_size"] == NODES - 1]
    if len(after) < STEPS_AFTER:
        return None
    newest = max(record["step"] for record in steps if record["time"] < after[0]["time"])
    return Recovery(seconds=after[0]["time"] - killed_s, repeated_steps=max(0, newest - after[0]["step"] + 1))


def report(runs: Mapping[str, Sequence[Recovery | None]]) -> dict[str, Any]:
    """Print the table. Returns: the figures."""
    rows, figures = [], dict[str, Any]()
    for name, of in runs.items():
        recovered = [run for run in of if run is not None]
        seconds = Measured(values=tuple(run.seconds for run in recovered))
        repeated = Measured(values=tuple(run.repeated_steps for run in recovered))
        unrecovered = len(of) - len(recovered)
        figures[name] = {
            "recovery_p50_s": seconds.median if recovered else None,
            "recovery_max_s": max(seconds.values, default=None),
            "repeated_steps": repeated.median if recovered else None,
            "unrecovered": unrecovered,
            "parts_s": medians_of_parts([run.parts_s for run in recovered]),
            "all": {"recovery_s": seconds.values, "repeated_steps": repeated.values},
        }
        texts = [seconds.text(".2f"), repeated.text(".0f")] if recovered else ["", ""]
        rows.append([name, *texts, str(unrecovered)])
    print_table(
        f"One of {NODES} machines is killed; median [range]",
        header=["contender", "seconds to the next step", "steps repeated", "unrecovered"],
        rows=rows,
    )
    return figures


if __name__ == "__main__":
    main()
