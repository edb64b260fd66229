"""Bytes that each rank sends in a step and holds of the training state, counted and by the plan's formulas.

    python -m benchmarks.rank_costs [--ranks 4] [--json FILE]

A tiny model is trained on real ranks (gloo, bf16, AdamW, an average of the weights) in every layout of
`tests.support.rank_costs`; bytes are counted where torch's collectives are called, and in the storages of all live
tensors between two micro-batches. The table is that of benchmarks/RESULTS.md. It takes several minutes.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.report import benchmark_parser, parse_options, write_json
from tests.support.jobs import synthetic_corpus
from tests.support.rank_costs import LAYOUTS, Cost, RankLayout, rank_costs

TOLERANCE = 0.05


def main() -> int:
    """Print the table. Returns: 1 if a cost differs by more than 5 % from the plan's, else 0."""
    parser = benchmark_parser(__doc__, repeats=1)
    parser.add_argument("--ranks", type=int, default=6, help="leave out layouts of more (default: %(default)s)")
    options = parse_options(parser, smallest={"ranks": 2})
    found: dict[str, list[Cost]] = {}
    with tempfile.TemporaryDirectory() as folder:
        corpus = synthetic_corpus(Path(folder) / "corpus")
        for number, layout in enumerate(one for one in LAYOUTS if one.world_size <= options.ranks):
            costs = rank_costs(layout, corpus, Path(folder) / str(number))
            found[f"{layout}, {layout.world_size} ranks"] = costs
            sys.stdout.write(("" if number else header(costs)) + row(layout, costs))
            sys.stdout.flush()
    worst = max(difference(cost) for costs in found.values() for cost in costs)
    sys.stdout.write(f"\nThe largest difference is {100 * worst:.1f} %.\n")
    write_json(options.json, figures={layout: [asdict(cost) for cost in costs] for layout, costs in found.items()})
    return int(worst > TOLERANCE)


def header(costs: list[Cost]) -> str:
    """Return the first two lines of the table."""
    names = ["layout", "ranks", *(cost.name for cost in costs), "largest difference"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"


def row(layout: RankLayout, costs: list[Cost]) -> str:
    """Return the line of a layout: kB counted, and kB of the plan."""
    cells = [f"{cost.counted / 1e3:,.0f} ({cost.planned / 1e3:,.0f})" if cost.planned else "" for cost in costs]
    most = max(difference(cost) for cost in costs)
    return f"| {' | '.join([str(layout), str(layout.world_size), *cells])} | {100 * most:.1f} % |\n"


def difference(cost: Cost) -> float:
    """Return the share of the planned bytes by which the counted ones differ; infinite if none were planned."""
    if not cost.planned:
        return float("inf") if cost.counted else 0.0
    return abs(cost.counted - cost.planned) / cost.planned


if __name__ == "__main__":
    sys.exit(main())
