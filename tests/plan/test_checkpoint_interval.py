"""Young's and Daly's interval against a simulated optimum, and what a plan says about it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.config.load import load_job
from forge.errors import JobFileError
from forge.plan.checkpoint_interval import (
    ASSUMED_NODE_MTBF_S,
    GROUP_LOSS_SHARE,
    MAX_S,
    MIN_S,
    best_interval_s,
    interval_text,
    is_worth_a_change,
    planned_every,
    posterior_s,
    state_mtbf_s,
    young_daly_s,
)
from forge.plan.plan import plan_from_json, plan_to_json
from forge.report.text import plan_facts
from forge.units import Every
from tests.support.jobs import tiny_plan


def simulated_s(*, interval_s: float, cost_s: float, mtbf_s: float, work_s: float) -> float:
    """Time of a run that saves after each interval and repeats what it has not saved; losses by chance."""
    dice = np.random.default_rng(0)
    length_s = interval_s + cost_s
    num_parts = int(work_s / interval_s)
    failures = dice.geometric(np.exp(-length_s / mtbf_s), size=num_parts) - 1
    # Times of losses that come before the end of the part: a truncated exponential distribution.
    chances = dice.random(int(failures.sum())) * -np.expm1(-length_s / mtbf_s)
    lost_s = float((-mtbf_s * np.log1p(-chances)).sum())
    return (num_parts * length_s + lost_s) * work_s / (num_parts * interval_s)


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(0.1, 1000.0), (5.0, 3600.0), (60.0, 3600.0), (600.0, 3600.0)])
def test_young_daly__simulated_runs__is_within_one_percent_of_the_best(cost_s: float, mtbf_s: float) -> None:
    times = {"cost_s": cost_s, "mtbf_s": mtbf_s}
    best_s = young_daly_s(**times)
    work_s = 20_000 * best_s
    found_s = simulated_s(interval_s=best_s, work_s=work_s, **times)
    others = [
        simulated_s(interval_s=best_s * factor, work_s=work_s, **times) for factor in np.geomspace(0.2, 5, 33)
    ]
    assert found_s < 1.01 * min(others)
    assert found_s < 0.99 * others[0] or cost_s < 1  # where the interval matters, the simulation shows it
    assert found_s < 0.99 * others[-1] or cost_s < 1


def test_young_daly__small_cost__is_young() -> None:
    assert young_daly_s(cost_s=0.01, mtbf_s=1e6) == pytest.approx((2 * 0.01 * 1e6) ** 0.5, rel=1e-3)
    assert young_daly_s(cost_s=30.0, mtbf_s=10.0) == 10.0


@given(cost_s=st.floats(0, 1e5), mtbf_s=st.floats(1e-3, 1e12), written_s=st.floats(0, 1e4))
def test_best_interval__any_input__is_within_its_bounds(cost_s: float, mtbf_s: float, written_s: float) -> None:
    found = best_interval_s(cost_s=cost_s, mtbf_s=mtbf_s, written_s=written_s)
    assert max(MIN_S, 10 * written_s) <= found <= max(MAX_S, 10 * written_s)


def test_state_mtbf__replicas__only_losses_of_both_copies_count() -> None:
    assert state_mtbf_s(num_nodes=4, node_mtbf_s=400.0, has_replicas=False) == 100.0
    assert state_mtbf_s(num_nodes=4, node_mtbf_s=400.0, has_replicas=True) == pytest.approx(100 / GROUP_LOSS_SHARE)
    assert state_mtbf_s(num_nodes=1, node_mtbf_s=400.0, has_replicas=True) == 400.0


def test_posterior__losses_and_time__move_the_prior() -> None:
    assert posterior_s(100.0, seen_s=0.0, num_losses=0) == 100.0
    assert posterior_s(100.0, seen_s=300.0, num_losses=3) == 100.0
    assert posterior_s(100.0, seen_s=900.0, num_losses=0) == 1000.0


def test_is_worth_a_change__less_than_half__is_not() -> None:
    assert not is_worth_a_change(100.0, 149.0)
    assert is_worth_a_change(100.0, 151.0)
    assert is_worth_a_change(100.0, 66.0)


def auto_plan(**changes: Any) -> Any:
    return tiny_plan(checkpoint={"every": "auto"}, **changes)


def test_plan__auto__is_shown_with_its_assumptions_and_kept() -> None:
    plan = auto_plan()
    text = interval_text(plan)
    assert text is not None and dict(plan_facts(plan))["checkpoints"] == text
    assert text.startswith("auto: every 1m 00s at first") and "a machine lost every 9d 11h" in text
    assert plan_from_json(plan_to_json(plan)).job.checkpoint.every == "auto"
    assert interval_text(tiny_plan()) is None


def test_planned_every__ray_train__counts_every_loss() -> None:
    large = {"model__hidden_size": 32, "resources__workers": 4}
    elastic, restarting = auto_plan(**large), auto_plan(resources__engine="ray-train", **large)
    assert planned_every(elastic, world_size=4).seconds == 60.0  # a small model: the lower bound
    shown = [interval_text(plan) or "" for plan in (elastic, restarting)]
    assert [text.rpartition("every ")[2] for text in shown] == ["33d 21h", "2d 08h"]
    assert pytest.approx(9.49 * 86400, rel=1e-3) == ASSUMED_NODE_MTBF_S
    assert planned_every(tiny_plan(checkpoint={"every": "7 steps"}), world_size=4) == Every(steps=7)


def test_load__misspelt_auto__names_the_forms(tmp_path: Any) -> None:
    (tmp_path / "job.yaml").write_text("name: a\ncheckpoint: {every: automatic}\n")
    with pytest.raises(JobFileError, match=r"checkpoint\.every.*write it like '50 steps', '10m' or auto"):
        load_job(tmp_path / "job.yaml")
