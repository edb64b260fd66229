"""Hold the estimate of throughput against published measurements.

    python -m benchmarks.forecast --published FILE --json OUT [--fit]

FILE is a CSV file with the columns model, num_params, seq_len, gpus, gpu, internode_gbps_per_node, micro_batch,
grad_accum, sharding, act_ckpt, precision and tokens_per_s_per_gpu, of models whose shapes are known (MPT), or with
the columns hidden_size, num_layers and vocab_size too. Every row is estimated. `median_error` and `p90_error` are
of |estimate ÷ measured - 1|; `pairs_right` is the share of pairs that differ by more than 10 % whose faster one the
estimate names. Pairs are made of all rows.

`--fit` fits the constants of `forge.plan.throughput.Efficiency` to the rows, prints them, and takes the errors by
cross-validation: each fifth of the rows, and then each model, is estimated with constants fitted to the others.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.report import benchmark_parser, parse_options, print_table, write_json
from forge.config.training import TrainingSpec
from forge.plan.batch import BatchPlan
from forge.plan.gpus import Gpu, find_gpu
from forge.plan.inputs import ModelInfo
from forge.plan.parameter_groups import OptimizerState
from forge.plan.step_work import step_work
from forge.plan.throughput import Efficiency, Interconnect, StepWork, estimate_step

_MPT_SHAPES = {
    "mpt-125m": (768, 12),
    "mpt-350m": (1024, 24),
    "mpt-760m": (1536, 24),
    "mpt-1b": (2048, 24),
    "mpt-3b": (2560, 32),
    "mpt-7b": (4096, 32),
    "mpt-13b": (5120, 40),
    "mpt-30b": (7168, 48),
    "mpt-70b": (8192, 80),
}
"""Hidden size and number of layers. Source: LLM Foundry, scripts/train/yamls/pretrain, commit 8c8dd48f."""
_MPT_VOCAB = 50368
_STAGES = {"zero-3": 3, "zero-2": 2, "zero-1": 1, "zero-0": 0, "ddp": 0, "none": 0}
_GPUS_PER_NODE = 8
_DIFFERENT = 1.1
"""Two rows are a pair if the faster is faster by this factor."""
_FOLDS = 5
_EXAMPLE = (
    "model,num_params,seq_len,gpus,gpu,internode_gbps_per_node,micro_batch,grad_accum,sharding,act_ckpt,precision,"
    "tokens_per_s_per_gpu\n"
    "mpt-7b,6658859008,2048,8,a100_80gb,1600,8,1,zero-3,True,bf16,4000\n"
    "mpt-125m,125311488,2048,8,a100_80gb,1600,32,1,zero-2,False,bf16,140000\n"
)
"""For `--smallest`: round figures of the right size, no measurements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured configuration."""

    model: str
    work: StepWork
    gpu: Gpu
    interconnect: Interconnect
    tokens_per_s: float
    """Measured, of one GPU."""

    def estimate(self, efficiency: Efficiency | None = None) -> float:
        return estimate_step(
            self.work, gpu=self.gpu, interconnect=self.interconnect, efficiency=efficiency
        ).tokens_per_s


def main() -> None:
    """Estimate every row, and report the errors."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--published", type=Path, metavar="FILE", help="CSV file of measurements")
    parser.add_argument("--fit", action="store_true", help="fit the constants again, and cross-validate")
    options = parse_options(parser, smallest={})
    if options.published is None and not options.smallest:
        parser.error("--published FILE is missing")
    text = _EXAMPLE if options.published is None else options.published.read_text(encoding="utf-8")
    rows = read_rows(text, where=str(options.published))
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


def read_rows(text: str, *, where: str) -> list[Row]:
    """Read the rows of a CSV file. Ends the program with the line of the first one that cannot be estimated."""
    rows = []
    for number, record in enumerate(csv.DictReader(text.splitlines()), start=2):
        try:
            rows.append(read_row(record))
        except (KeyError, ValueError, TypeError) as error:
            sys.exit(f"{where}:{number}: {type(error).__name__}: {error}")
    if not rows:
        sys.exit(f"{where}: no rows")
    return rows


def read_row(record: dict[str, str]) -> Row:
    """Raises: KeyError for a missing column or an unknown model, ValueError for a value that is none."""
    gpu = find_gpu(record["gpu"].replace("_", "-"))
    if gpu is None:
        raise ValueError(f"unknown GPU {record['gpu']}")
    hidden, layers = _shape(record)
    vocab = int(record.get("vocab_size") or _MPT_VOCAB)
    num_parameters = int(float(record["num_params"]))
    matrices = 12 * hidden**2 * layers
    model = ModelInfo(
        architecture="mpt",
        class_name="MPTForCausalLM",
        num_parameters=num_parameters,
        num_trainable_parameters=num_parameters,
        num_matmul_parameters=matrices + vocab * hidden,
        num_head_matmul_parameters=vocab * hidden,
        largest_module_parameters=vocab * hidden,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        attention_width=hidden,
        vocab_size=vocab,
        max_seq_len=None,
        has_linear_head=True,
        isolation_problem=None,
    )
    world_size, micro, steps = (int(record[name]) for name in ("gpus", "micro_batch", "grad_accum"))
    training = TrainingSpec.model_validate(
        {
            "total_steps": 1,
            "precision": "fp32" if record["precision"].lower() in ("fp32", "float32") else "bf16",
            "zero": {"stage": _STAGES[record["sharding"].lower()]},
            "activation_checkpointing": _truth(record["act_ckpt"]),
        }
    )
    rate = float(record["tokens_per_s_per_gpu"])
    if not 0 < rate < math.inf or min(world_size, micro, steps) < 1:
        raise ValueError("a count or a rate is not positive")
    return Row(
        model=record["model"],
        work=step_work(
            model,
            training,
            seq_len=int(record["seq_len"]),
            batch=BatchPlan(
                global_batch_size=micro * steps * world_size,
                world_size=world_size,
                micro_batch_size=micro,
                gradient_accumulation_steps=steps,
            ),
            state=OptimizerState(sharded_bytes=8 * num_parameters, replicated_bytes=0),
            gpu=gpu,
        ),
        gpu=gpu,
        interconnect=Interconnect(
            gpus_per_node=_GPUS_PER_NODE,
            inter_node_bytes_per_s=float(record["internode_gbps_per_node"]) * 1e9 / 8,
        ),
        tokens_per_s=rate,
    )


def _shape(record: dict[str, str]) -> tuple[int, int]:
    if record.get("hidden_size"):
        return int(record["hidden_size"]), int(record["num_layers"])
    return _MPT_SHAPES[record["model"]]


def _truth(text: str) -> bool:
    values = {"true": True, "1": True, "full": True, "false": False, "0": False, "": False, "none": False}
    return values[text.strip().lower()]


def errors(rows: Sequence[Row], estimates: Sequence[float]) -> dict[str, float]:
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
        "pairs_right": statistics.fmean(right) if right else 1.0,
    }


def fit(rows: Sequence[Row], *, start: Efficiency | None = None) -> Efficiency:
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


def held_out_estimates(rows: Sequence[Row], *, key: Callable[[int], object]) -> list[float]:
    """Estimate each row with constants fitted to the rows with another key."""
    constants = {
        k: fit([row for i, row in enumerate(rows) if key(i) != k]) for k in {key(i) for i in range(len(rows))}
    }
    return [row.estimate(constants[key(i)]) for i, row in enumerate(rows)]


def print_rows(rows: Sequence[Row], estimates: Sequence[float]) -> None:
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
