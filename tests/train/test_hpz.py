"""hpZ on real ranks: the losses of plain ZeRO 3, in every layout that a run may continue in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge.events import Evaluated
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan
from tests.support.jobs import tiny_plan
from tests.support.ranks import Recording, run_ranks

pytestmark = pytest.mark.slow


def planned(corpus: CorpusInfo, size: int, **changes: Any) -> Plan:
    keys = {"training__micro_batch_size": 1, "training__precision": "fp32"} | changes
    plan = tiny_plan(corpus, training__zero={"stage": 3, "hpz_partition_size": size}, **keys)
    for world in plan.worlds:  # divide small parameters too
        world.deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return plan


def evaluations(recording: Recording) -> list[tuple[str, float]]:
    return [(event.weights, event.loss) for event in recording.events if isinstance(event, Evaluated)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses__groups_of_two__equal_plain_zero_3_bit_for_bit(
    corpus: CorpusInfo, tmp_path: Path, precision: str
) -> None:
    changes = {
        "training__precision": precision,
        "training__ema": {"decay": 0.5, "evaluate": "always"},  # exchanges the weights between steps
        "training__evaluate_every": "2 steps",
    }
    grouped, plain = (
        run_ranks(planned(corpus, size, **changes), tmp_path / str(size), world_size=4) for size in (2, 1)
    )
    assert planned(corpus, 2).for_world_size(4).groups.hpz_partition_size == 2
    assert grouped.losses == plain.losses
    assert [m.grad_norm for m in grouped.steps] == [m.grad_norm for m in plain.steps]
    assert evaluations(grouped) == evaluations(plain)
    assert len(evaluations(plain)) >= 6


@pytest.mark.parametrize(("sizes", "worlds"), [((2, 1), (4, 3)), ((1, 2), (3, 4)), ((2, 2), (4, 4))])
def test_resume__other_layout__losses_of_an_undisturbed_run(
    corpus: CorpusInfo, tmp_path: Path, sizes: tuple[int, int], worlds: tuple[int, int]
) -> None:
    whole = run_ranks(planned(corpus, 1), tmp_path / "whole", world_size=4)
    first = run_ranks(planned(corpus, sizes[0]), tmp_path / "parts", world_size=worlds[0], stop_after=3)
    second = run_ranks(planned(corpus, sizes[1]), tmp_path / "parts", world_size=worlds[1])
    assert [m.step for m in first.steps + second.steps] == [1, 2, 3, 4, 5, 6]
    expected = pytest.approx(whole.losses, rel=1e-5) if worlds != (4, 4) else whole.losses
    assert first.losses + second.losses == expected
