"""How recovery from a killed rank grows with the number of ranks.

    python -m benchmarks.recovery_growth [--sizes 2 4 8 16 32 64] --json FILE

For each size W two simulated machines of W / 2 forked ranks each train a Llama of one layer of 64 with a
snapshot at every step. Rank W - 1 is killed `--repeats` times; the next generation has W ranks again.
Reported are the median seconds from SIGKILL to the end of the first step of all ranks, and their parts:
`detect` is the time until the change began, the others are those of the run's report. On a machine with fewer
cores than ranks the parts that compute (fork, build, first step) grow with the ranks per core, which the JSON
file has too.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.changes import SETTLE_S, Cost, Watch, changes_of, medians_of_parts
from benchmarks.program import module, records_of, running
from benchmarks.report import Measured, benchmark_parser, parse_options, print_table, write_json

SIZES = (2, 4, 8, 16, 32, 64)
_MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
_NUM_MACHINES = 2


def main() -> None:
    """Measure each size in its own run."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="W", help="even numbers of ranks")
    options = parse_options(parser, smallest={"sizes": (2,)})
    if odd := [size for size in options.sizes if size < _NUM_MACHINES or size % _NUM_MACHINES]:
        parser.error(f"--sizes {odd[0]}: the ranks are divided between {_NUM_MACHINES} machines; use even numbers")
    costs: dict[int, list[Cost]] = {}
    for size in options.sizes:
        costs[size] = measure(size, kills=options.repeats)
        write_json(
            options.json, figures=figures_of(costs)
        )  # what is measured is kept, whatever happens to the rest
    report(costs)


def measure(size: int, *, kills: int) -> list[Cost]:
    """Kill the last rank of one run repeatedly, each time after the ranks have trained together for a while."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as text:
        folder = Path(text)
        request = {"folder": text, "nodes": _NUM_MACHINES, "slots": size // _NUM_MACHINES, "model": _MODEL}
        request |= {"vocab_size": 512, "seq_len": 32, "global_batch_size": size, "lr": 1e-3, "snapshot_every": 1}
        with running(module("forge_elastic", request), folder=folder) as program:
            watch = Watch(folder, program.process)
            watch.await_world(size)
            for _ in range(kills):
                time.sleep(SETTLE_S)
                killed_s = time.time()
                program.say(f"kill {size - 1}")
                watch.await_formed("failure", since_s=killed_s)
            time.sleep(SETTLE_S)
        costs = costs_of_kills(folder, size)
    print(f"  {size} ranks: {[round(cost.seconds, 2) for cost in costs]} s", file=sys.stderr)
    return costs


def costs_of_kills(folder: Path, size: int) -> list[Cost]:
    """Return the time from each SIGKILL to the end of the first step. Raises: RuntimeError if a rank is missing."""
    changes, costs = changes_of(folder), []
    for at in [record["time"] for record in records_of(folder / "steps.jsonl") if "killed" in record]:
        change = next(one for one in changes if one.time > at and one.cause == "failure")
        if change.seconds is None or change.to_world_size != size:
            raise RuntimeError(f"after a killed rank no step of {size} ranks followed: {change}")
        detect_s = change.time - at
        costs.append(Cost(seconds=detect_s + change.seconds, parts_s={"detect": detect_s, **change.parts}))
    return costs


def figures_of(costs: dict[int, list[Cost]]) -> dict[str, Any]:
    """The figures of all sizes so far, by size."""
    cores = len(os.sched_getaffinity(0))
    return {
        f"ranks_{size}": {
            "recovery_p50_s": Measured(values=tuple(cost.seconds for cost in of)).median,
            "parts_s": medians_of_parts([cost.parts_s for cost in of]),
            "ranks_per_core": size / cores,
            "all_s": [cost.seconds for cost in of],
        }
        for size, of in costs.items()
    }


def report(costs: dict[int, list[Cost]]) -> None:
    """Print one row for each size and one column for each part."""
    medians = {size: medians_of_parts([cost.parts_s for cost in of]) for size, of in costs.items()}
    names = list(dict.fromkeys(name for parts in medians.values() for name in parts))
    rows: list[Sequence[str]] = []
    for size, of in costs.items():
        seconds = Measured(values=tuple(cost.seconds for cost in of)).text(".2f")
        parts = [f"{medians[size][name]:.3f}" if name in medians[size] else "" for name in names]
        rows.append([str(size), seconds, *parts])
    print_table(
        "A rank is killed: seconds to the next step, median [range], and medians of its parts",
        header=["ranks", "seconds", *names],
        rows=rows,
    )


if __name__ == "__main__":
    main()
