"""A whole search with real Ray and real kills: its trials and results equal those of an undisturbed search."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from forge.config.load import load_job
from forge.runs.create import create_run
from forge.runs.reader import read_metrics, read_run
from forge.runs.trials import TrialTable, trial_folder
from forge.runtime.driver_process import start_driver
from forge.runtime.resolve import resolve
from tests.support.command import wait_for
from tests.support.elastic import Machines, Run, leftovers, machines, write_job

SEARCH = """\
search:
  space:
    training.optimizer.lr: {loguniform: [1.0e-4, 1.0e-2]}
    training.optimizer.beta2: {choice: [0.95, 0.99]}
  searcher: {kind: optuna, startup_trials: 2, seed: 7}
  max_trials: 6
  trials_at_once: 2
"""
CHANGES = [
    "data.held_out=10%",
    "training.evaluate_every=10 steps",
    "resources.workers=1",
    "checkpoint.every=10 steps",
]
STEPS = 60
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    home = tmp_path_factory.mktemp("home")
    write_job(home, steps=STEPS)
    with (home / "job.yaml").open("a") as job:
        job.write(SEARCH)
    with machines(home, count=2) as cluster:
        yield cluster


class Search:
    """A search in progress."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._driver = start_driver(folder)

    @property
    def table(self) -> TrialTable:
        return TrialTable(read_run(self.folder).events)

    @property
    def status(self) -> str:
        return read_run(self.folder).status

    def resume(self) -> None:
        self._driver = start_driver(self.folder)

    def kill_driver(self) -> None:
        os.kill(self._driver.pid, signal.SIGKILL)
        self._driver.wait()

    def rank_of(self, number: int) -> int:
        """The pid of a trial's only rank; waits until it trains."""
        folder = Path(trial_folder(str(self.folder), number))

        def pid() -> int | None:
            formed = [event for event in read_run(folder).events if event["event"] == "GenerationStarted"]
            return int(formed[-1]["ranks"][0]["pid"]) if formed else None

        found: int = wait_for(pid)
        return found

    def await_step(self, number: int, step: int) -> None:
        wait_for(lambda: number in self.table.trials and self.table.trials[number].step >= step)

    def await_end(self) -> None:
        wait_for(lambda: self.status != "running", timeout_s=180)
        self._driver.wait()


def start(cluster: Machines, **changes: str) -> Search:
    here = Path.cwd()
    os.chdir(cluster.home)
    try:
        overrides = [*CHANGES, *(f"{key.replace('__', '.')}={value}" for key, value in changes.items())]
        plan = resolve(load_job("job.yaml", overrides=overrides))
        return Search(create_run(plan, root=str(cluster.home / "runs")))
    finally:
        os.chdir(here)


def numbers_of(search: Search, kind: str) -> list[int]:
    return sorted(event["trial"] for event in read_run(search.folder).events if event["event"] == kind)


def actor_pid(cluster: Machines, name: str) -> int:
    """The pid of the newest process of the cluster whose command line contains the name."""

    def newest() -> int | None:
        found = []
        for process in psutil.process_iter(["cmdline", "create_time"]):
            with contextlib.suppress(psutil.Error, OSError):
                is_of_cluster = os.getsid(process.pid) in cluster.leaders
                if is_of_cluster and name in " ".join(process.info["cmdline"] or []):
                    found.append((process.info["create_time"], process.pid))
        return max(found)[1] if found else None

    pid: int = wait_for(newest)
    return pid


@pytest.mark.slow  # over a minute
def test_search__killed_processes__results_of_an_undisturbed_search(cluster: Machines) -> None:
    undisturbed = start(cluster)
    undisturbed.await_end()
    search = start(cluster)
    search.await_step(1, 10)
    os.kill(search.rank_of(1), signal.SIGKILL)
    search.await_step(1, 30)
    search.kill_driver()
    search.resume()
    search.await_step(3, 10)
    cluster.kill(cluster.of(search.rank_of(3)))
    cluster.add()
    search.await_step(4, 10)
    os.kill(actor_pid(cluster, "TrialRunnerActor"), signal.SIGKILL)
    search.await_step(5, 10)
    os.kill(actor_pid(cluster, "ray::ResourceTrainable"), signal.SIGKILL)  # Tune's own actor of a trial
    search.await_step(5, 30)
    search.kill_driver()
    search.resume()
    search.await_end()
    assert search.status == "finished"
    expected, found = undisturbed.table.trials, search.table.trials
    assert list(found) == list(expected) == [1, 2, 3, 4, 5, 6]
    for number, trial in found.items():
        assert trial.values == expected[number].values, number
        assert trial.status == "finished"
        assert [step for step, _ in trial.reports] == list(range(10, STEPS + 1, 10))
        assert [value for _, value in trial.reports] == pytest.approx(
            [value for _, value in expected[number].reports], rel=TOLERANCE
        )
        steps = [record["step"] for record in read_metrics(Path(trial_folder(str(search.folder), number)))]
        assert steps == list(range(1, STEPS + 1))
    assert numbers_of(search, "TrialSuggested") == numbers_of(search, "TrialEnded") == [1, 2, 3, 4, 5, 6]
    assert not leftovers(Run(folder=search.folder, cluster=cluster), timeout_s=90)


@pytest.mark.slow  # tests/search/test_scheduler.py tests it without a cluster
def test_search__asha_driver_killed__scheduler_resumes(cluster: Machines) -> None:
    search = start(cluster, search__scheduler="{kind: asha, reduction_factor: 2}")
    search.await_step(2, 20)
    search.kill_driver()
    search.resume()
    search.await_end()
    assert search.status == "finished"
    assert numbers_of(search, "TrialSuggested") == numbers_of(search, "TrialEnded") == [1, 2, 3, 4, 5, 6]
    trials = search.table.trials.values()
    assert {trial.status for trial in trials} == {"finished", "stopped"}
    # Every stopped trial names the scheduler and the step.
    assert all(
        trial.reason == f"stopped by asha at step {trial.step}" for trial in trials if trial.status == "stopped"
    )


@pytest.mark.slow
def test_search__pbt_driver_killed__resumes_from_the_last_round(cluster: Machines) -> None:
    space = "{training.optimizer.lr: {loguniform: [1.0e-4, 1.0e-2]}}"
    search = start(
        cluster,
        search__scheduler="{kind: pbt, interval_steps: 20}",
        search__max_trials="4",
        search__space=space,
    )
    wait_for(lambda: search.table.population_step == 20)
    search.await_step(1, 40)
    search.kill_driver()
    search.resume()
    search.await_end()
    assert search.status == "finished"
    trials = search.table.trials
    assert {trial.status for trial in trials.values()} == {"finished"}
    assert search.table.population_step == 40
    moved = [trial for trial in trials.values() if trial.moves]
    assert moved
    for trial in moved:
        (step, donor), value = trial.moves[-1], dict(trial.reports)
        donated = dict(trials[donor].reports)[step]
        assert donated < value[step]  # the donor was better
        assert value[step + 10] < value[step]  # and the taker goes on from there
