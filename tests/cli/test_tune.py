"""`forge tune` and `forge runs` on searches, in this process: output, files and exit codes.

Everything is real but the driver process, which records the events of a script instead of training.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import forge as public
from forge import api
from forge.cli.app import app
from forge.config.dump import dump_job
from forge.config.load import load_job
from forge.errors import ArgumentError, JobFileError, RunError
from forge.events import CostUpdated, Event, RunFailed, RunFinished, RunStarted, RunStopped, event_to_record
from forge.runs.create import create_run
from forge.runs.remote_ref import RemoteRef, write_remote_ref
from forge.runtime import driver_process
from forge.runtime.driver_process import RunHandle
from forge.runtime.resolve import resolve
from tests.cli.conftest import JOB
from tests.support.command import wait_for
from tests.support.jobs import tiny_job
from tests.support.runs import make_run
from tests.support.tuning import LR, WARMUP, begun, ended, make_search

TUNE = (
    JOB.replace("tokenizer:", "held_out: 25%, tokenizer:")
    + """\
search:
  space:
    training.optimizer.lr: {loguniform: [1.0e-4, 1.0e-2]}
    training.schedule.warmup: {int: [0, 3]}
  max_trials: 4
  max_hours: 8
  scheduler: {kind: asha, grace_steps: 2}
  proxy: {training.total_steps: 3}
"""
)
THREE = [
    *ended(1, step=6, value=5.5),
    *ended(2, step=2, value=7.0, status="stopped", reason="given up by asha at step 2"),
    *ended(3, step=6, value=5.25),
]
BAD = [
    *ended(1, step=2, status="diverged", reason="the loss is no number"),
    *ended(2, step=4, status="failed", reason="rank 0 died"),
    *ended(3, step=3, status="diverged", reason="the loss is no number"),
]

pytestmark = pytest.mark.usefixtures("home")


def forge(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.fixture
def tune_file(home: Path) -> str:
    (home / "tune.yaml").write_text(TUNE)
    return "tune.yaml"


class Script:
    """What the drivers that are started from now on record, after RunStarted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.write([])

    def write(self, events: Iterable[Event], *, until_stopped: bool = False) -> None:
        records = [event_to_record(event) for event in events]
        self._path.write_text(json.dumps({"events": records, "until_stopped": until_stopped}))


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    monkeypatch.setattr(driver_process, "DRIVER_MODULE", "tests.support.scripted_driver")
    monkeypatch.setenv("FORGE_TEST_SCRIPT", str(tmp_path / "script.json"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return Script(tmp_path / "script.json")


def planned_search(*events: Event, trial_runs: Iterable[int] = ()) -> Path:
    """The folder `runs/searched` of the search in tune.yaml, which recorded `events`."""
    folder = create_run(resolve(load_job("tune.yaml"))).rename("runs/searched")
    record_events(folder, [RunStarted(run_id="searched", total_steps=3, resumed_from_step=0), *events])
    return folder


def record_events(folder: Path, events: Iterable[Event]) -> None:
    with (folder / "events.jsonl").open("a") as file:
        for at, event in enumerate(events):
            file.write(json.dumps({"time": 1_000_000.0 + at} | event_to_record(event)) + "\n")


class TestThePlan:
    @pytest.mark.parametrize("arguments", [("plan", "tune.yaml"), ("tune", "tune.yaml", "--dry-run")])
    def test_dry_run__table__shows_the_search_and_starts_nothing(
        self, home: Path, tune_file: str, arguments: tuple[str, ...]
    ) -> None:
        done = forge(*arguments)
        assert done.exit_code == 0
        lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
        assert lines[0][1].startswith("each trial: ")
        assert lines[0][1].endswith(" 3 steps")
        assert ["searched", "training.optimizer.lr     0.0001 to 0.01, log-uniform"] in lines
        assert ["training.schedule.warmup", "0 to 3, whole numbers"] in lines
        assert ["limits", "8 hours"] in lines
        assert ["metric", "eval/loss, less is better"] in lines
        said = done.stderr.splitlines()
        assert (said[0], said[-1]) == ("looking at the corpus", "search: forge tune tune.yaml")
        assert not (home / "runs").exists()

    def test_dry_run__json__is_the_plan_alone(self, tune_file: str) -> None:
        done = forge("tune", tune_file, "--dry-run", "-o", "json", "--set", "search.max_trials=7")
        draft = json.loads(done.stdout)
        assert json.dumps(draft, sort_keys=True, indent=1) + "\n" == done.stdout
        assert draft["search"]["num_trials"] == 7
        assert draft["corpus"]["digest"]  # a corpus this small is prepared for the plan

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ("train", "tune.yaml"),
                r"tune\.yaml:6: search: this job is a search over many trials: use forge tune",
            ),
            (("train", "tune.yaml", "--dry-run"), r"search: this job is a search .*: use forge tune"),
            (("tune", "job.yaml"), r"job\.yaml:1: search: is missing: .* use forge train"),
            (("tune", "tune.yaml", "--set", "search.metric=loss"), r"search\.metric=loss: is not a metric"),
        ],
    )
    def test_start__job_of_the_other_kind__names_the_command(
        self, home: Path, tune_file: str, arguments: tuple[str, ...], message: str
    ) -> None:
        with pytest.raises(JobFileError, match=message) as raised:
            forge(*arguments)
        assert raised.value.exit_code == 2
        assert not (home / "runs").exists()

    def test_api__job_of_the_other_kind__raises(self, tune_file: str) -> None:
        with pytest.raises(JobFileError, match="use forge tune"):
            public.train_job(tune_file)
        with pytest.raises(JobFileError, match="use forge train"):
            public.tune_job("job.yaml")

    def test_tune__without_file__exits_2(self) -> None:
        done = forge("tune")
        assert (done.exit_code, "give a job file, or --resume SEARCH" in done.stderr) == (2, True)


class TestASearch:
    def test_tune__pipe__lines_then_summary(self, home: Path, tune_file: str, script: Script) -> None:
        script.write([*THREE, CostUpdated(usd=1.5, usd_per_hour=3.0), RunFinished(step=0)])
        done = forge("tune", tune_file)
        folder = next((home / "runs").iterdir())
        lines = done.stderr.splitlines()
        assert done.exit_code == 0
        assert f"search {folder.name} in runs/{folder.name}" in lines
        assert "trial 1 started in 1.2s: lr=0.001 warmup=1" in lines
        assert "trial 1 step 6 eval/loss 5.5000" in lines
        assert "trial 2 stopped by asha at step 2, eval/loss 7.0000" in lines
        assert lines[-1] == f"train with the best values: forge train runs/{folder.name}/best.yaml"
        assert f"{folder.name}  finished after 3 of 4 trials" in done.stdout
        assert "trial 3, eval/loss 5.2500 at step 6: lr=0.003 warmup=3" in done.stdout
        assert "1.50 USD" in done.stdout
        assert "█" in done.stdout
        assert (folder / "best.yaml").exists()
        assert (folder / "report.html").exists()

    def test_tune__json__record_alone_on_stdout(self, tune_file: str, script: Script) -> None:
        script.write([*THREE, RunFinished(step=0)])
        record = json.loads(forge("tune", tune_file, "-o", "json").stdout)
        assert (record["status"], record["best"]["trial"]) == ("finished", 3)

    def test_tune__detach__does_not_follow(self, tune_file: str, script: Script) -> None:
        done = forge("tune", tune_file, "--detach")
        assert (done.exit_code, "trial" in done.stderr) == (0, False)
        assert "follow it: forge runs watch tiny-" in done.stderr

    @pytest.mark.parametrize(
        ("events", "code", "message"),
        [
            (
                [*BAD, RunFinished(step=0)],
                4,
                "none of 3 trials reported a usable eval/loss; the reason of 2: the loss is no number",
            ),
            ([*THREE, RunStopped(step=0)], 130, "resume: forge tune --resume tiny-"),
            ([RunStopped(step=0)], 130, "try again: forge tune --resume tiny-"),
            ([*THREE, RunStopped(step=0, reason="8 hours are over")], 0, "! stopped: 8 hours are over"),
            ([*BAD, RunStopped(step=0, reason="8 hours are over")], 4, "none of 3 trials"),
            ([*THREE, RunFailed(error="ClusterError", message="Ray went away")], 3, "error: Ray went away"),
            ([], 4, "the driver of the run died without recording why"),
        ],
    )
    def test_tune__ending__exit_code_and_message(
        self, tune_file: str, script: Script, events: Sequence[Event], code: int, message: str
    ) -> None:
        script.write(events)
        done = forge("tune", tune_file)
        assert done.exit_code == code
        assert message in done.stderr

    def test_tune_job__finished__returns_the_best_trial(self, home: Path, tune_file: str, script: Script) -> None:
        events = [*THREE, RunFinished(step=0)]
        script.write(events)
        recorded: list[Any] = []
        found = public.tune_job(tune_file, on_record=recorded.append)
        assert found.best is not None
        assert (found.best.number, found.best.values) == (3, {LR: 0.003, WARMUP: 3})
        assert (found.run.status, len(found.table.trials), len(recorded)) == ("finished", 3, len(events) + 1)
        assert (found.run.folder / "best.yaml").exists()

    def test_tune_job__no_usable_trial__raises(self, tune_file: str, script: Script) -> None:
        script.write([*BAD, RunFinished(step=0)])
        with pytest.raises(RunError, match="the reason of 2: the loss is no number"):
            public.tune_job(tune_file)


class TestWhileItIsRunning:
    @pytest.fixture
    def running(self, tune_file: str, script: Script) -> Iterator[RunHandle]:
        """A search whose driver runs until it is asked to stop."""
        folder = planned_search()
        make_run(folder / "trials", "searched-0002")
        script.write([*ended(1, value=5.5), *begun(2)], until_stopped=True)
        handle = api.start(tune_file, resume=folder)
        yield handle
        handle.request_stop()
        handle.wait()

    def test_tune__ctrl_c__stops_its_trials_with_checkpoints(self, tune_file: str, script: Script) -> None:
        script.write([*ended(1, value=5.5), *begun(2)], until_stopped=True)
        before = signal.getsignal(signal.SIGINT)

        def press_ctrl_c() -> None:
            wait_for(lambda: signal.getsignal(signal.SIGINT) is not before)
            os.kill(os.getpid(), signal.SIGINT)

        pressing = threading.Thread(target=press_ctrl_c)
        pressing.start()
        done = forge("tune", tune_file)
        pressing.join()
        assert done.exit_code == 130
        assert "stopping every trial after its step, with a checkpoint; Ctrl-C again" in done.stderr
        assert re.search(r"resume: forge tune --resume tiny-\S+\n$", done.stderr)
        assert "1 finished, 1 unfinished" in done.stdout

    def test_runs__running_search__trials_are_running_until_stop(self, running: RunHandle) -> None:
        with pytest.raises(ArgumentError, match=r"searched is still running, in process \d+"):
            forge("tune", "--resume", "searched")
        assert json.loads(forge("runs", "show", "searched-0002", "-o", "json").stdout)["status"] == "running"
        assert "1 finished, 1 running" in forge("runs", "show", "searched").stdout
        done = forge("runs", "stop", "searched")
        assert done.stderr.splitlines() == [
            "the trials of searched stop after their current steps, with checkpoints",
            "resume: forge tune --resume searched",
        ]
        assert json.loads(forge("runs", "show", "searched-0002", "-o", "json").stdout)["status"] == "died"


@pytest.mark.usefixtures("tune_file")
class TestResuming:
    def test_resume__latest__newest_of_its_kind(self, home: Path, script: Script) -> None:
        planned_search(*THREE, RunStopped(step=0))
        trained = make_run(home / "runs", "trained", endings=[RunFinished(step=6)])
        (trained / "job.yaml").write_text(dump_job(tiny_job()))
        script.write([*ended(4, value=1.0), RunFinished(step=0)])
        done = forge("tune", "--resume", "latest")
        assert done.exit_code == 0
        assert "searched  finished after 4 of 4 trials" in done.stdout
        assert "trial 3 step" not in done.stderr
        assert "trained has already reached its last step" in forge("train", "--resume", "latest").stderr

    @pytest.mark.parametrize(
        ("verb", "name", "message"),
        [
            ("train", "searched", "searched is a search; resume it with: forge tune --resume searched"),
            ("tune", "trained", "trained is not a search; resume it with: forge train --resume trained"),
            ("tune", "searched-0002", "is a trial and cannot be resumed alone; .*: forge tune --resume searched$"),
            ("train", "searched-0002", "is a trial and cannot be resumed alone; .*: forge tune --resume searched$"),
            ("tune", "nobody", "no run 'nobody' under runs"),
        ],
    )
    def test_resume__wrong_kind_or_name__raises(self, home: Path, verb: str, name: str, message: str) -> None:
        make_search(home / "runs", "searched", events=[*THREE, RunStopped(step=0)], trial_runs=[2])
        make_run(home / "runs", "trained")
        with pytest.raises(ArgumentError, match=message):
            forge(verb, "--resume", name)

    def test_resume__no_search__raises(self, home: Path) -> None:
        make_run(home / "runs", "trained")
        with pytest.raises(ArgumentError, match="no search under runs"):
            forge("tune", "--resume", "latest")

    @pytest.mark.parametrize(
        "change", ["max_trials=9", "max_hours=1", "max_usd=3", "trials_at_once=1"], ids=lambda text: text
    )
    def test_resume__changed_limits__is_accepted(self, home: Path, script: Script, change: str) -> None:
        planned_search(*THREE, RunStopped(step=0))
        script.write([RunFinished(step=0)])
        assert forge("tune", "--resume", "searched", "--set", f"search.{change}").exit_code == 0

    @pytest.mark.parametrize(
        ("change", "blamed"),
        [
            ("search.metric=train/loss", "search.metric"),
            ("search.mode=max", "search.mode"),
            ("search.searcher.seed=2", "search.searcher"),
            ("search.scheduler.grace_steps=3", "search.scheduler"),
            ("search.space={training.optimizer.lr: {choice: [0.001]}}", "search.space"),
            ("search.proxy={training.total_steps: 4}", "search.proxy"),
            ("training.total_steps=9", "training.total_steps changed from 4 to 9"),
        ],
    )
    def test_resume__changed_search__raises(self, home: Path, script: Script, change: str, blamed: str) -> None:
        folder = planned_search(*THREE, RunStopped(step=0))
        before = (folder / "plan.json").read_text()
        with pytest.raises(ArgumentError, match=f"cannot resume searched: .*{blamed}"):
            forge("tune", "--resume", "searched", "--set", change)
        assert (folder / "plan.json").read_text() == before

    def test_resume__all_trials_done__only_with_more_trials(self, home: Path, script: Script) -> None:
        events = [*THREE, *ended(4, value=9.0), RunFinished(step=0)]
        planned_search(*events)
        script.write([*ended(5, value=0.5), RunFinished(step=0)])
        done = forge("tune", "--resume", "searched")
        assert (done.exit_code, "searched has already completed all its trials" in done.stderr) == (0, True)
        more = forge("tune", "--resume", "searched", "--set", "search.max_trials=5")
        assert "trial 5, eval/loss 0.5000" in more.stdout


class TestRuns:
    @pytest.fixture
    def folder(self, home: Path) -> Path:
        make_run(home / "runs", "trained", endings=[RunFinished(step=6)])
        events = [*THREE, *begun(4, values={2: 6.0}), RunStopped(step=0)]
        return make_search(home / "runs", "searched", events=events, trial_runs=[1, 3])

    def test_list__table__counts_trials(self, folder: Path) -> None:
        rows = {row.split()[0]: row.split() for row in forge("runs", "list").stdout.splitlines()[1:]}
        assert rows["searched"][1:6] == ["stopped", "3/4", "trials", "5.2500", "10.50"]
        assert rows["trained"][1:3] == ["finished", "3/6"]
        assert len(rows) == 2

    def test_list__json__counts_trials(self, folder: Path) -> None:
        found = json.loads(forge("runs", "list", "-o", "json").stdout)
        trials = {run["run_id"]: run["trials"] for run in found}
        assert trials == {"searched": {"total": 4, "over": 3}, "trained": None}

    def test_show__table__one_line_per_trial(self, folder: Path) -> None:
        done = forge("runs", "show", "searched")
        lines = [line.split() for line in done.stdout.splitlines()]
        assert done.exit_code == 0
        assert ["4", "unfinished", "2/6", "6.0000", "lr=0.004", "warmup=4", "-"] in lines
        assert ["*3", "finished", "6/6", "5.2500", "lr=0.003", "warmup=3", "3s"] in lines
        assert [line[0] for line in lines if len(line) == 7 and line[2].endswith("/6")] == ["4", "*3", "2", "1"]

    def test_show__json__is_the_search_record(self, folder: Path) -> None:
        assert json.loads(forge("runs", "show", "searched", "-o", "json").stdout)["best"]["trial"] == 3

    def test_runs__trial__is_a_run(self, folder: Path) -> None:
        record = json.loads(forge("runs", "show", "searched-0003", "-o", "json").stdout)
        assert (record["run_id"], record["step"]) == ("searched-0003", 3)
        watched = forge("runs", "watch", "searched-0003")
        assert watched.stderr.endswith("see its search: forge runs show searched\n")
        with pytest.raises(ArgumentError, match="stop the whole search: forge runs stop searched"):
            forge("runs", "stop", "searched-0003")
        with pytest.raises(ArgumentError, match="no run 'searched-0002' under runs"):
            forge("runs", "show", "searched-0002")

    def test_watch__stopped_search__exits_130(self, folder: Path) -> None:
        done = forge("runs", "watch", "searched")
        assert done.exit_code == 130
        assert "searched  stopped after 3 of 4 trials" in done.stdout
        assert done.stderr.endswith("resume: forge tune --resume searched\n")

    def test_logs__search__is_the_drivers(self, folder: Path) -> None:
        (folder / "logs" / "driver.log").write_text("hello\n")
        assert forge("runs", "logs", "searched", "--file", "driver").stdout == "hello\n"

    def test_report__search__writes_and_prints_the_path(self, folder: Path) -> None:
        done = forge("runs", "report", "latest")
        assert (done.exit_code, done.stdout) == (0, "runs/searched/report.html\n")
        assert (folder / "report.html").exists()

    def test_report__search_without_trials__raises(self, home: Path, folder: Path) -> None:
        make_search(home / "runs", "new")
        with pytest.raises(ArgumentError, match="new has no trials yet"):
            forge("runs", "report", "new")

    def test_watch__run_of_a_cluster_that_ended__writes_its_report_here(self, home: Path) -> None:
        folder = make_run(home / "runs", "away", steps=6, endings=[RunFinished(step=6)])
        ref = RemoteRef(cluster="big", folder="/home/u/runs/away", job="", events=0, steps=0)
        write_remote_ref(folder, ref)
        assert forge("runs", "watch", "away").exit_code == 0
        assert "big, its folder there /home/u/runs/away" in (folder / "report.html").read_text()

    def test_compare__two_runs__table_json_and_page(self, home: Path, folder: Path) -> None:
        make_run(home / "runs", "other", steps=4)
        done = forge("runs", "compare", "trained", "other", "--html", "both.html")
        assert done.exit_code == 0
        assert done.stdout.split()[:3] == ["trained", "other", "status"]
        assert "Loss over steps" in (home / "both.html").read_text()
        printed = forge("runs", "compare", "trained", "other", "-o", "json").stdout
        assert [run["run_id"] for run in json.loads(printed)["runs"]] == ["trained", "other"]

    def test_report__run__writes_and_prints_the_path(self, home: Path, folder: Path) -> None:
        done = forge("runs", "report", "trained")
        assert (done.exit_code, done.stdout) == (0, "runs/trained/report.html\n")
        assert "Repeat it" in (home / "runs" / "trained" / "report.html").read_text()
