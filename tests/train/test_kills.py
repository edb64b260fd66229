"""Kill checkpoint writers at random moments: what remains is always a whole checkpoint, never an older one."""

from __future__ import annotations

import pytest

from tests.support.kills import KEEP, STAGES, VICTIMS, KillReport, kill_forge
from tests.support.seeds import SEED

# The harness has its own time limit, which grows with the number of kills.
pytestmark = pytest.mark.timeout(0)
ENOUGH_FOR_EVERY_STAGE = 300


@pytest.fixture(scope="module")
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KillReport:
    folder = tmp_path_factory.mktemp("kills") / "checkpoints"
    return kill_forge(folder, num_kills=request.config.getoption("--kills"), seed=SEED)


def test_kills__every_folder_named_as_checkpoint_verifies(killed: KillReport) -> None:
    assert killed.broken == []


def test_kills__no_reported_checkpoint_is_lost(killed: KillReport) -> None:
    assert killed.lost == []
    assert killed.num_committed >= killed.num_kills / 2


def test_kills__cover_every_stage_of_saving_and_every_kind_of_process(
    request: pytest.FixtureRequest, killed: KillReport
) -> None:
    assert killed.num_kills == killed.victims.total() == request.config.getoption("--kills")
    if killed.num_kills >= ENOUGH_FOR_EVERY_STAGE:
        assert set(VICTIMS) == set(killed.victims)
        assert all(phases & set(killed.phases) for phases in STAGES.values()), killed.phases


def test_kills__writer_processes_end_after_their_ranks(killed: KillReport) -> None:
    assert killed.left == []


def test_kills__no_writer_process_crashes_by_itself(killed: KillReport) -> None:
    assert killed.crashed == []


def test_kills__last_save_removes_leftover_staging_folders(killed: KillReport) -> None:
    assert killed.most_staging > 0
    assert len(killed.names) == KEEP
    assert all(name.startswith("step-") for name in killed.names)
