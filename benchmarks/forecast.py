"""Hold the estimate of throughput against published measurements.

    python -m benchmarks.forecast --published FILE --json OUT [--fit]

FILE is a CSV file; `benchmarks.published_rows` describes its columns. Every row is estimated. `median_error` and
`p90_error` are of |estimate ÷ measured - 1|; `pairs_right` is the share of pairs that differ by more than 10 %
whose faster one the estimate names, null if there are no such pairs. Pairs are made of all rows.

`--fit` fits the constants of `forge.plan.throughput.Efficiency` to the rows, prints them, and takes the errors by
cross-validation: each fifth of the rows, and then each model, is estimated with constants fitted to the others.
A wrong FILE ends the program with one message and the exit code 2.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.published_rows import PublishedRow, read_file, read_rows
from benchmarks.report import benchmark_parser, parse_options, print_table, write_json
from forge.errors import ArgumentError
from forge.plan.throughput import Efficiency

_DIFFERENT = 1.1
"""Two rows are a pair if the faster is faster by this factor."""
_FOLDS = 5
_FEWEST_TO_FIT = 20
"""Twice as many as there are constants."""
_EXAMPLE = (
    "model,num_params,seq_len,gpus,gpu,internode_gbps_per_node,micro_batch,grad_accum,sharding,act_ckpt,precision,"
    "tokens_per_s_per_gpu\n"
    "mpt-7b,6658859008,2048,8,a100_80gb,1600,8,1,zero-3,True,bf16,4000\n"
    "mpt-125m,125311488,2048,8,a100_80gb,1600,32,1,zero-2,False,bf16,140000\n"
)
"""For `--smallest`: round figures of the right size, no measurements."""


def main() -> None:
    """Estimate every row, and report the errors."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--published", type=Path, metavar="FILE", help="CSV file of measurements")
    parser.add_argument("--fit", action="store_true", help="fit the constants again, and cross-validate")
    options = parse_options(parser, smallest={})
    if options.published is None and not options.smallest:
        parser.error("--published FILE is missing")
    try:
        rows = read_rows(_EXAMPLE, where="example") if options.published is None else read_file(options.published)
        if options.fit and (len(rows) < _FEWEST_TO_FIT or len({row.model for row in rows}) < 2):
            raise ArgumentError(f"--fit needs at least {_FEWEST_TO_FIT} rows, of two models or more")
    except ArgumentError as error:
        parser.exit(2, f"error: {error}\n")
    assumed = {row.model: row.assumed_shape for row in rows if row.assumed_shape}
    for model, shape in assumed.items():
        print(f"{model}: {shape} assumed from num_params; hidden_size and num_layers would say", file=sys.stderr)
    estimates = [row.estimate() for row in rows]
    figures: dict[str, object] = {"rows": len(rows), **errors(rows, estimates)}
    if options.fit:
        fitted = fit(rows)
        print(*(f"{f.name} = {getattr(fitted, f.name):.3f}" for f in dataclasses.fields(fitted)), sep="\n")
        figures["fitted"] = dataclasses.asdict(fitted)
        figures["cross_validated"] = errors(rows, held_out_estimates(rows, key=lambda i: i * 7919 % _FOLDS))
        figures["other_models"] = errors(rows, held_out_estimates(rows, key=lambda i: rows[i].model))
    print_rows(rows, estimates)
    print({name: value for name, value in figures.items() if name != "fitted"}, file=sys.stderr)
    write_json(options.json, figures=figures | {"estimates_tokens_per_s_per_gpu": estimates})


def errors(rows: Sequence[PublishedRow], estimates: Sequence[float]) -> dict[str, float | None]:
    """Return median_error, p90_error and pairs_right."""
    off = [abs(estimate / row.tokens_per_s - 1) for row, estimate in zip(rows, estimates, strict=True)]
    right = [
        (estimates[i] > estimates[j]) == (rows[i].tokens_per_s > rows[j].tokens_per_s)
        for i in range(len(rows))
        for j in range(i)
        if abs(math.log(rows[i].tokens_per_s / rows[j].tokens_per_s)) > math.log(_DIFFERENT)
    ]
    return {
        "median_error": statistics.median(off),
        "p90_error": float(np.quantile(off, 0.9)),
        "pairs_right": statistics.fmean(right) if right else None,
    }


def fit(rows: Sequence[PublishedRow], *, start: Efficiency | None = None) -> Efficiency:
    """Return the constants with the least sum of squared logarithms of estimate ÷ measured, outliers damped."""
    from scipy.optimize import least_squares

    names = [f.name for f in dataclasses.fields(Efficiency)]
    lowest = [0.3, 0.0, 0.0, -1.0, 0.1, -1.0, 0.05, 0.1, 0.1, 0.0]
    highest = [1.0, 3000.0, 50000.0, 2.0, 1.0, 2.0, 6.0, 1.0, 1.0, 1.0]
    first = np.array([getattr(start or Efficiency(), name) for name in names])

    def residuals(values: np.ndarray) -> list[float]:
        constants = Efficiency(**dict(zip(names, values.tolist(), strict=True)))
        return [math.log(row.estimate(constants) / row.tokens_per_s) for row in rows]

    best = least_squares(
        residuals, first, bounds=(lowest, highest), loss="soft_l1", f_scale=0.05, x_scale=np.abs(first) + 0.1
    )
    return Efficiency(**dict(zip(names, best.x.tolist(), strict=True)))


def held_out_estimates(rows: Sequence[PublishedRow], *, key: Callable[[int], object]) -> list[float]:
    """Estimate each row with constants fitted to the rows with another key."""
    constants = {
        k: fit([row for i, row in enumerate(rows) if key(i) != k]) for k in {key(i) for i in range(len(rows))}
    }
    return [row.estimate(constants[key(i)]) for i, row in enumerate(rows)]


def print_rows(rows: Sequence[PublishedRow], estimates: Sequence[float]) -> None:
    """A line for each row, the worst estimate first."""
    order = sorted(range(len(rows)), key=lambda i: -abs(math.log(estimates[i] / rows[i].tokens_per_s)))
    print_table(
        "tokens/s of one GPU",
        header=("model", "GPU", "GPUs", "tokens", "measured", "estimate", "ratio"),
        rows=[
            (
                rows[i].model,
                rows[i].gpu.name,
                str(rows[i].work.world_size),
                f"{rows[i].work.tokens:,}",
                f"{rows[i].tokens_per_s:,.0f}",
                f"{estimates[i]:,.0f}",
                f"{estimates[i] / rows[i].tokens_per_s:.2f}",
            )
            for i in order
        ],
    )


if __name__ == "__main__":
    main()
