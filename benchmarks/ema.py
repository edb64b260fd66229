"""Measure what the moving average of the weights (EMA) costs of a training step.

    python -m benchmarks.ema --json FILE

The model and the batch of `jobs/pretrain.yaml`, a Llama of 4 layers of 256 and 32 sequences of 256 a step, in bf16
on one worker with all cores, with random tokens. The update of the average is timed within the step, so the two
times are of the same steps. `ema_cost` is the median of update ÷ rest of the step.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import Measured, benchmark_parser, parse_options, print_table, write_json
from forge.config.load import load_job
from forge.config.training import EmaSpec
from forge.data.loader import MicroBatch
from forge.model.families.base import DataShape
from forge.objective.causal_lm import CausalLm
from forge.plan.batch import plan_batch
from forge.plan.deepspeed_config import deepspeed_config
from forge.train.engine import Engine, StepControl, build_engine
from forge.train.process_group import join_process_group

_JOB = Path(__file__).parents[1] / "jobs" / "pretrain.yaml"
_MICRO_BATCH = 8


@dataclass(slots=True, kw_only=True)
class Times:
    """Seconds of each step, and of the update of the average within it."""

    steps_s: list[float] = field(default_factory=list)
    updates_s: list[float] = field(default_factory=list)

    @property
    def shares(self) -> Measured:
        pairs = zip(self.updates_s, self.steps_s, strict=True)
        return Measured(values=tuple(update / (step - update) for update, step in pairs))


def main() -> None:
    """Train some steps at each ZeRO stage."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each repeat")
    parser.add_argument("--batch", type=int, default=32, help="sequences a step")
    options = parse_options(parser, smallest={"steps": 1, "batch": _MICRO_BATCH})
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    join_process_group(device=torch.device("cpu"))
    times = {stage: Times() for stage in (2, 3)}
    for repeat in range(options.repeats):
        for stage in sorted(times, reverse=bool(repeat % 2)):
            measure(times[stage], stage=stage, batch=options.batch, num_steps=options.steps)
            print(f"  repeat {repeat + 1}, ZeRO {stage}: {times[stage].shares.text('.2%')}", file=sys.stderr)
    report(times, json_path=options.json)


def measure(times: Times, *, stage: int, batch: int, num_steps: int) -> None:
    """Build an engine, and time its steps after the first, which touches memory for the first time."""
    job = load_job(_JOB).job
    training = job.training.model_copy(
        update={"zero": job.training.zero.model_copy(update={"stage": stage}), "ema": EmaSpec(decay=0.99)}
    )
    plan = plan_batch(batch, world_size=1, max_micro_batch_size=_MICRO_BATCH)
    vocab_size, seq_len = job.data.tokenizer.vocab_size, job.data.seq_len
    engine = build_engine(
        job.model,
        training,
        deepspeed_config=deepspeed_config(training, plan),
        data=DataShape(vocab_size=vocab_size, seq_len=seq_len, eot_id=0),
        objective=CausalLm(),
        device=torch.device("cpu"),
        has_linear_head=True,
    )
    update = engine.state.update_average
    seconds: list[float] = []

    def timed(**options: Any) -> None:
        began = time.perf_counter()
        update(**options)
        seconds.append(time.perf_counter() - began)

    engine.state.update_average = timed  # type: ignore[method-assign]
    for step in range(1, num_steps + 2):
        began = time.perf_counter()
        train_step(engine, step, batch=batch, shape=(_MICRO_BATCH, seq_len), vocab_size=vocab_size)
        if step > 1:
            times.steps_s.append(time.perf_counter() - began)
    times.updates_s += seconds[1:]


def train_step(engine: Engine, step: int, *, batch: int, shape: tuple[int, int], vocab_size: int) -> None:
    """Make one step on random tokens."""

    def micro_batches() -> Iterator[MicroBatch]:
        chance = np.random.default_rng(step)
        for first in range(0, batch, shape[0]):
            tokens = chance.integers(vocab_size, size=shape)
            yield MicroBatch(
                arrays={"tokens": tokens, "targets": tokens}, positions=np.arange(first, first + shape[0])
            )

    engine.step(step, micro_batches(), total_weight=batch * shape[1], lr=1e-3, requests=StepControl)


def report(times: dict[int, Times], *, json_path: Path | None) -> None:
    """Print the table, and write the figures."""
    rows = [
        [
            f"ZeRO {stage}",
            Measured(values=tuple(measured.steps_s)).text(".3f"),
            Measured(values=tuple(1000 * value for value in measured.updates_s)).text(".1f"),
            measured.shares.text(".2%"),
            "≤ 1 %",
        ]
        for stage, measured in times.items()
    ]
    header = ["", "step (s)", "update of the average (ms)", "share", "aim"]
    print_table("The moving average of the weights", header=header, rows=rows)
    figures = {
        "ema_cost": max(measured.shares.median for measured in times.values()),
        "ema_cost_by_stage": {str(stage): measured.shares.median for stage, measured in times.items()},
        "all_step_s": {str(stage): measured.steps_s for stage, measured in times.items()},
        "all_update_s": {str(stage): measured.updates_s for stage, measured in times.items()},
    }
    write_json(json_path, figures=figures)


if __name__ == "__main__":
    main()
