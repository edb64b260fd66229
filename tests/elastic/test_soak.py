"""Random faults at random times in one run: `pytest -m slow tests/elastic/test_soak.py --faults 50 -s`."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from forge.chaos.processes import processes_of
from forge.plan.plan import plan_from_json
from forge.runs.lock import driver_pid
from forge.runs.reader import read_metrics
from tests.support.command import forge, wait_for
from tests.support.elastic import Run, leftovers, machines, start_run, stop_run, write_job
from tests.support.ranks import run_ranks
from tests.support.seeds import SEED

TOLERANCE = 5e-5
NUM_MACHINES = 3


class Faults:
    """Every kind of fault, on random targets; each method returns once the run has handled the fault."""

    def __init__(self, run: Run, *, seed: int) -> None:
        self.run, self.random = run, random.Random(seed)
        self.kinds: list[Callable[[], None]] = [
            self.rank_killed,
            self.rank_stopped,
            self.agent_killed,
            self.agent_stopped,
            self.machine_killed,
            self.supervisor_killed,
            self.driver_killed,
            self.notice,
        ]

    def rank_killed(self) -> None:
        self.run.recovers_from(lambda: os.kill(self._random_rank()["pid"], signal.SIGKILL))

    def rank_stopped(self) -> None:
        self.run.recovers_from(lambda: os.kill(self._random_rank()["pid"], signal.SIGSTOP))

    def agent_killed(self) -> None:
        self.run.recovers_from(lambda: os.kill(self._agent(), signal.SIGKILL))

    def agent_stopped(self) -> None:
        self.run.recovers_from(lambda: os.kill(self._agent(), signal.SIGSTOP))

    def machine_killed(self) -> None:
        self._without(lambda node: None)

    def notice(self) -> None:
        repeated = len(self.run.repeated())

        def give(node: str) -> None:
            name = self.run.formed["generation"]
            done = forge(
                *("chaos", "notice", str(self.run.folder), "--node", node, "--seconds", "5"),
                cwd=self.run.cluster.home,
                env=dict(os.environ),
            )
            assert done.returncode == 0, done.stderr
            wait_for(lambda: self.run.formed["generation"] > name)
            assert len(self.run.repeated()) == repeated

        self._without(give)

    def supervisor_killed(self) -> None:
        count = len(self.run.of("SupervisorRestarted"))
        os.kill(processes_of(self.run.folder).supervisor, signal.SIGKILL)
        wait_for(lambda: len(self.run.of("SupervisorRestarted")) > count)

    def driver_killed(self) -> None:
        driver = driver_pid(self.run.folder)
        assert driver is not None
        os.kill(driver, signal.SIGKILL)
        wait_for(lambda: driver_pid(self.run.folder) not in (None, driver))

    def _without(self, before: Callable[[str], None]) -> None:
        """Kill a machine, after `before(node)`, and add another."""
        node = self._random_rank()["node"]
        machine = self.run.cluster.of(self.run.agent(node))
        before(node)
        generation = self.run.formed["generation"]
        is_member = node in [rank["node"] for rank in self.run.formed["ranks"]]
        self.run.cluster.kill(machine)
        if is_member:
            wait_for(lambda: self.run.formed["generation"] > generation)
        self.run.cluster.add()

    def _random_rank(self) -> dict[str, int | str]:
        wait_for(lambda: processes_of(self.run.folder).ranks)
        rank: dict[str, int | str] = self.random.choice(self.run.formed["ranks"])
        return rank

    def _agent(self) -> int:
        return self.run.agent(str(self._random_rank()["node"]))


def num_losses(run: Run) -> int:
    """Changes without notice so far, each of which may repeat a step."""
    return sum(change["cause"] in ("loss", "hang", "failure") for change in run.of("MembershipChangeStarted"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_soak__random_faults__at_most_one_step_repeated_each(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    num_faults = pytestconfig.getoption("--faults")
    write_job(tmp_path, steps=1_000_000, lr=1e-5)  # rounding errors grow over a hundred thousand updates
    counts: Counter[str] = Counter()
    worst = 0
    with machines(tmp_path, count=NUM_MACHINES) as cluster:
        run = start_run(cluster)
        run.await_world(NUM_MACHINES)
        faults_in_run = Faults(run, seed=SEED)
        for number in range(num_faults):
            time.sleep(faults_in_run.random.uniform(0.0, 4.0))
            fault = faults_in_run.kinds[number % len(faults_in_run.kinds)]
            before, losses_before, began = len(run.repeated()), num_losses(run), time.monotonic()
            fault()
            run.await_steps(3)
            repeated = len(run.repeated()) - before
            worst = max(worst, repeated)
            counts[fault.__name__] += 1
            print(f"{number + 1:3} {fault.__name__:18} {time.monotonic() - began:5.1f} s, repeated {repeated}")
            # A starved machine can lose a node to its silence while it recovers from the fault.
            assert repeated <= max(1, num_losses(run) - losses_before), fault.__name__
        stop_run(run)
        assert leftovers(run) == []
    records = read_metrics(run.folder)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    plan = plan_from_json((run.folder / "plan.json").read_text())
    undisturbed = run_ranks(plan, tmp_path / "undisturbed", world_size=1, stop_after=len(records)).losses
    difference = max(abs(record["train/loss"] - loss) for record, loss in zip(records, undisturbed, strict=True))
    print(f"{dict(counts)}; {len(records)} steps, at most {worst} repeated, losses differ by {difference:.1e}")
    assert difference < TOLERANCE
