"""Writers of checkpoints killed at random moments: what is left is always whole, and never older than before."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.deepspeed_kills import kill_deepspeed
from tests.support.kills import KEEP, STAGES, VICTIMS, KillReport, kill_forge

# The harness has a limit of its own, which grows with the number of kills.
pytestmark = pytest.mark.timeout(0)
NUM_DEEPSPEED_KILLS = 12
ENOUGH_FOR_EVERY_STAGE = 300


@pytest.fixture(scope="module")
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KillReport:
    folder = tmp_path_factory.mktemp("kills") / "checkpoints"
    return kill_forge(folder, num_kills=request.config.getoption("--kills"), seed=int.from_bytes(os.urandom(4)))


def test_after_every_kill_all_that_is_called_a_checkpoint_is_whole(killed: KillReport) -> None:
    assert killed.broken == []


def test_no_kill_costs_a_checkpoint_that_was_reported(killed: KillReport) -> None:
    assert killed.lost == []
    assert killed.num_sealed >= killed.num_kills / 2


def test_every_stage_of_saving_is_hit_and_every_kind_of_victim(
    request: pytest.FixtureRequest, killed: KillReport
) -> None:
    assert killed.num_kills == killed.victims.total() == request.config.getoption("--kills")
    if killed.num_kills >= ENOUGH_FOR_EVERY_STAGE:
        assert set(VICTIMS) == set(killed.victims)
        assert all(phases & set(killed.phases) for phases in STAGES.values()), killed.phases


def test_savers_end_when_their_work_is_done_and_their_ranks_are_gone(killed: KillReport) -> None:
    assert killed.left == []


def test_savers_die_of_nothing_but_kills(killed: KillReport) -> None:
    assert killed.crashed == []


def test_the_last_save_sweeps_away_what_the_dead_have_left(killed: KillReport) -> None:
    assert killed.most_drafts > 0
    assert len(killed.names) == KEEP
    assert all(name.startswith("step-") for name in killed.names)


def test_what_kills_do_to_the_checkpoints_of_deepspeed_is_told(tmp_path: Path) -> None:
    found = kill_deepspeed(tmp_path / "deepspeed", num_kills=NUM_DEEPSPEED_KILLS, seed=0)
    assert found.num_kills == NUM_DEEPSPEED_KILLS
    assert found.num_sealed >= NUM_DEEPSPEED_KILLS
    assert found.phases["save"] > 0
    counts = f"{found.num_kills} kills, {len(found.broken)} broken, {len(found.lost)} lost"
    sys.stdout.write(f"\nDeepSpeed: {counts}\n")
