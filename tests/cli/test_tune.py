"""`forge tune` and `forge runs` on searches, in this process: what they print, where, and how they leave."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import forge as public
from forge import api
from forge.cli.app import app
from forge.errors import ArgumentError, JobFileError, RunError
from forge.events import CostUpdated, Event, RunFailed, RunFinished, RunStarted, RunStopped, event_to_record
from forge.runs import create
from forge.runs.reader import driver_pid
from forge.runtime import driver_process
from forge.runtime import resolve as resolving
from forge.runtime.driver_process import LocalRun
from tests.cli.conftest import JOB
from tests.support.command import wait_for
from tests.support.jobs import synthetic_corpus
from tests.support.runs import make_run
from tests.support.tuning import LR, WARMUP, begun, ended, make_search, search_plan

TUNE = (
    JOB
    + """\
search:
  space:
    training.optimizer.lr: {loguniform: [1.0e-4, 1.0e-2]}
    training.schedule.warmup_steps: {int: [0, 3]}
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

CARRIER = """
import fcntl, json, os, signal, sys, time
folder = sys.argv[1]
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
lock = open(folder + "/.lock", "a+")
fcntl.flock(lock, fcntl.LOCK_EX)
lock.write(str(os.getpid()))
lock.flush()
signal.sigwait([signal.SIGTERM])
with open(folder + "/events.jsonl", "a") as events:
    events.write(json.dumps({"time": 2e6, "event": "RunStopped", "step": 0, "reason": ""}) + "\\n")
"""
"""As `forge.runtime.driver` holds a run, and ends it when it is asked to stop."""

pytestmark = pytest.mark.usefixtures("home")


def forge(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.fixture
def tune_file(home: Path) -> str:
    (home / "tune.yaml").write_text(TUNE)
    return "tune.yaml"


@dataclass(frozen=True)
class Ended:
    """A search whose carrier has told everything and gone."""

    folder: Path

    def is_alive(self) -> bool:
        return False

    def request_stop(self) -> None:
        """Too late."""

    def wait(self) -> None:
        """It has ended."""

    def connection_messages(self) -> list[str]:
        return []


@pytest.fixture
def carrier(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """What the next search tells at once; its plan is made without a look at corpus and machine."""
    corpus = synthetic_corpus(home / "cache", num_tokens=400, num_held_out=100)
    (home / "cache" / "tokenizer").mkdir()
    told: list[Event] = []

    def resolve(loaded: Any, **_: Any) -> Any:
        return replace(search_plan(), job=loaded.job, corpus=corpus)

    def carry(folder: Path) -> Ended:
        records = [RunStarted(run_id=folder.name, total_steps=6, resumed_from_step=0), *told]
        with (folder / "events.jsonl").open("a") as file:
            for at, event in enumerate(records):
                file.write(json.dumps({"time": 2_000_000.0 + at} | event_to_record(event)) + "\n")
        return Ended(folder)

    for module, name, fake in ((resolving, "resolve", resolve), (driver_process, "start_driver", carry)):
        monkeypatch.setattr(module, name, fake)
        monkeypatch.setattr(api, name, fake)
    return told


class TestThePlan:
    @pytest.mark.parametrize("arguments", [("plan", "tune.yaml"), ("tune", "tune.yaml", "--dry-run")])
    def test_it_says_what_is_searched_and_starts_nothing(
        self, home: Path, tune_file: str, arguments: tuple[str, ...]
    ) -> None:
        done = forge(*arguments)
        assert done.exit_code == 0
        lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
        assert lines[0][1].startswith("each trial: ")
        assert lines[0][1].endswith(" 3 steps")
        assert ["searched", "training.optimizer.lr           0.0001 to 0.01, log-uniform"] in lines
        assert ["training.schedule.warmup_steps", "0 to 3, whole numbers"] in lines
        assert ["limits", "8 hours"] in lines
        assert ["judged", "by   eval/loss, less is better"] in lines
        assert done.stderr == "search: forge tune tune.yaml\n"
        assert not (home / "runs").exists()

    def test_as_json_it_is_the_plan_alone(self, tune_file: str) -> None:
        done = forge("tune", tune_file, "--dry-run", "-o", "json", "--set", "search.max_trials=7")
        draft = json.loads(done.stdout)
        assert json.dumps(draft, sort_keys=True, indent=1) + "\n" == done.stdout
        assert draft["search"]["num_trials"] == 7
        assert "corpus" not in draft

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
    def test_a_job_of_the_other_kind_is_named_with_the_command_for_it(
        self, home: Path, tune_file: str, arguments: tuple[str, ...], message: str
    ) -> None:
        with pytest.raises(JobFileError, match=message) as raised:
            forge(*arguments)
        assert raised.value.exit_code == 2
        assert not (home / "runs").exists()

    def test_from_python_too(self, tune_file: str) -> None:
        with pytest.raises(JobFileError, match="use forge tune"):
            public.train_job(tune_file)
        with pytest.raises(JobFileError, match="use forge train"):
            public.tune_job("job.yaml")

    def test_without_a_file_it_asks_for_one(self) -> None:
        done = forge("tune")
        assert (done.exit_code, "give a job file, or --resume SEARCH" in done.stderr) == (2, True)


class TestASearch:
    def test_its_news_are_lines_on_a_pipe_and_its_end_a_summary(
        self, home: Path, tune_file: str, carrier: list[Event]
    ) -> None:
        carrier += [*THREE, CostUpdated(usd=1.5, usd_per_hour=3.0), RunFinished(step=0)]
        done = forge("tune", tune_file)
        folder = next((home / "runs").iterdir())
        told = done.stderr.splitlines()
        assert done.exit_code == 0
        assert told[0] == f"search {folder.name} in runs/{folder.name}"
        assert "trial 1 started in 1.2s: lr=0.001 warmup_steps=1" in told
        assert "trial 1 step 6 eval/loss 5.5000" in told
        assert "trial 2 stopped by asha at step 2, eval/loss 7.0000" in told
        assert told[-1] == f"train the best: forge train runs/{folder.name}/best.yaml"
        assert f"{folder.name}  finished after 3 of 4 trials" in done.stdout
        assert "trial 3, eval/loss 5.2500 at step 6: lr=0.003 warmup_steps=3" in done.stdout
        assert "1.50 USD" in done.stdout
        assert "█" in done.stdout
        assert (folder / "best.yaml").exists()
        assert (folder / "report.html").exists()

    def test_as_json_its_record_stands_alone_on_stdout(self, tune_file: str, carrier: list[Event]) -> None:
        carrier += [*THREE, RunFinished(step=0)]
        record = json.loads(forge("tune", tune_file, "-o", "json").stdout)
        assert (record["status"], record["best"]["trial"]) == ("finished", 3)

    def test_detached_it_is_not_followed(self, tune_file: str, carrier: list[Event]) -> None:
        done = forge("tune", tune_file, "--detach")
        assert (done.exit_code, "trial" in done.stderr) == (0, False)
        assert "follow it: forge runs watch tiny-" in done.stderr

    @pytest.mark.parametrize(
        ("events", "code", "told"),
        [
            (
                [*BAD, RunFinished(step=0)],
                4,
                "none of 3 trials came to a value of eval/loss; of 2 the reason is: the loss is no number",
            ),
            ([*THREE, RunStopped(step=0)], 130, "go on: forge tune --resume tiny-"),
            ([RunStopped(step=0)], 130, "try again: forge tune --resume tiny-"),
            ([*THREE, RunStopped(step=0, reason="8 hours are over")], 0, "! stopped: 8 hours are over"),
            ([*BAD, RunStopped(step=0, reason="8 hours are over")], 4, "none of 3 trials"),
            ([*THREE, RunFailed(error="ClusterError", message="Ray went away")], 3, "error: Ray went away"),
            ([], 4, "the run's process ended without a word"),
        ],
    )
    def test_how_it_leaves_says_how_it_ended(
        self, tune_file: str, carrier: list[Event], events: Sequence[Event], code: int, told: str
    ) -> None:
        carrier += events
        done = forge("tune", tune_file)
        assert done.exit_code == code
        assert told in done.stderr

    def test_from_python_it_gives_the_best_trial(self, home: Path, tune_file: str, carrier: list[Event]) -> None:
        carrier += [*THREE, RunFinished(step=0)]
        heard: list[Any] = []
        found = public.tune_job(tune_file, on_record=heard.append)
        assert found.best is not None
        assert (found.best.number, found.best.values) == (3, {LR: 0.003, WARMUP: 3})
        assert (found.run.status, len(found.book.trials), len(heard)) == ("finished", 3, len(carrier) + 1)
        assert (found.run.folder / "best.yaml").exists()

    def test_from_python_one_without_a_good_trial_is_an_error(self, tune_file: str, carrier: list[Event]) -> None:
        carrier += [*BAD, RunFinished(step=0)]
        with pytest.raises(RunError, match="of 2 the reason is: the loss is no number"):
            public.tune_job(tune_file)


class TestWhileItGoesOn:
    @pytest.fixture
    def carried(self, home: Path) -> Iterator[LocalRun]:
        """A search that a process carries until it is asked to stop."""
        make_search(home / "runs", "searched", events=[*ended(1, value=5.5), *begun(2)], trial_runs=[2])
        folder = Path("runs", "searched")
        process = subprocess.Popen([sys.executable, "-c", CARRIER, str(folder)], start_new_session=True)
        wait_for(lambda: driver_pid(folder) == process.pid)
        yield LocalRun(folder=folder, pid=process.pid)
        process.kill()
        process.wait()

    def test_ctrl_c_stops_its_trials_with_checkpoints(
        self, tune_file: str, carrier: list[Event], carried: LocalRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        presses = [signal.SIGINT]

        def press_ctrl_c(_: LocalRun) -> list[str]:
            while presses:
                signal.raise_signal(presses.pop())
            return []

        monkeypatch.setattr(LocalRun, "connection_messages", press_ctrl_c)
        monkeypatch.setattr(driver_process, "start_driver", lambda folder: carried)
        monkeypatch.setattr(create, "create_run", lambda plan, root: Path("runs", "searched"))
        done = forge("tune", tune_file)
        assert done.exit_code == 130
        assert "stopping every trial after its step, with a checkpoint; Ctrl-C again" in done.stderr
        assert done.stderr.endswith("go on: forge tune --resume searched\n")
        assert "1 finished, 1 unfinished" in done.stdout

    def test_it_is_seen_to_run_and_so_are_its_trials_and_it_stops_when_asked(self, carried: LocalRun) -> None:
        with pytest.raises(ArgumentError, match=rf"searched is still being carried, by process {carried.pid}"):
            forge("tune", "--resume", "searched")
        assert json.loads(forge("runs", "show", "searched-0002", "-o", "json").stdout)["status"] == "running"
        assert "1 finished, 1 running" in forge("runs", "show", "searched").stdout
        done = forge("runs", "stop", "searched")
        assert done.stderr.splitlines() == [
            "the trials of searched stop after their current steps, with checkpoints",
            "go on: forge tune --resume searched",
        ]
        assert json.loads(forge("runs", "show", "searched-0002", "-o", "json").stdout)["status"] == "died"


class TestResuming:
    def test_the_latest_is_the_newest_of_its_kind(self, home: Path, carrier: list[Event]) -> None:
        make_search(home / "runs", "searched", events=[*THREE, RunStopped(step=0)])
        make_run(home / "runs", "trained", endings=[RunFinished(step=6)])
        carrier += [*ended(4, value=1.0), RunFinished(step=0)]
        done = forge("tune", "--resume", "latest")
        assert done.exit_code == 0
        assert "searched  finished after 4 of 4 trials" in done.stdout
        assert "trial 3 step" not in done.stderr
        assert "trained has reached its last step already" in forge("train", "--resume", "latest").stderr

    @pytest.mark.parametrize(
        ("verb", "name", "message"),
        [
            ("train", "searched", "searched is a search; go on with it: forge tune --resume searched"),
            ("tune", "trained", "trained is no search; go on with it: forge train --resume trained"),
            ("tune", "searched-0002", "is a trial of a search, .*: forge tune --resume searched$"),
            ("train", "searched-0002", "is a trial of a search, .*: forge tune --resume searched$"),
            ("tune", "nobody", "no run 'nobody' under runs"),
        ],
    )
    def test_what_cannot_be_resumed_so_is_told(self, home: Path, verb: str, name: str, message: str) -> None:
        make_search(home / "runs", "searched", events=[*THREE, RunStopped(step=0)], trial_runs=[2])
        make_run(home / "runs", "trained")
        with pytest.raises(ArgumentError, match=message):
            forge(verb, "--resume", name)

    def test_where_there_is_none_of_the_kind_that_is_said(self, home: Path) -> None:
        make_run(home / "runs", "trained")
        with pytest.raises(ArgumentError, match="there is no search under runs"):
            forge("tune", "--resume", "latest")

    @pytest.mark.parametrize(
        "change", ["max_trials=9", "max_hours=1", "max_usd=3", "trials_at_once=1"], ids=lambda text: text
    )
    def test_for_how_long_it_goes_on_may_change(self, home: Path, carrier: list[Event], change: str) -> None:
        make_search(home / "runs", "searched", events=[*THREE, RunStopped(step=0)])
        carrier += [RunFinished(step=0)]
        assert forge("tune", "--resume", "searched", "--set", f"search.{change}").exit_code == 0

    @pytest.mark.parametrize(
        ("change", "blamed"),
        [
            ("search.metric=train/loss", "search.metric"),
            ("search.mode=max", "search.mode"),
            ("search.searcher.seed=2", "search.searcher"),
            ("search.scheduler.grace_steps=3", "search.scheduler"),
            ("search.space={training.optimizer.lr: {choice: [0.001]}}", "search.space"),
            ("search.proxy={training.total_steps: 3}", "search.proxy"),
            ("training.total_steps=9", "model, data or training section"),
        ],
    )
    def test_what_its_trials_have_in_common_may_not(
        self, home: Path, carrier: list[Event], change: str, blamed: str
    ) -> None:
        folder = make_search(home / "runs", "searched", events=[*THREE, RunStopped(step=0)])
        before = (folder / "plan.json").read_text()
        with pytest.raises(ArgumentError, match=f"cannot resume searched: .*{blamed}"):
            forge("tune", "--resume", "searched", "--set", change)
        assert (folder / "plan.json").read_text() == before

    def test_one_with_all_its_trials_is_not_carried_on_unless_more_are_asked_for(
        self, home: Path, carrier: list[Event]
    ) -> None:
        events = [*THREE, *ended(4, value=9.0), RunFinished(step=0)]
        make_search(home / "runs", "searched", events=events)
        carrier += [*ended(5, value=0.5), RunFinished(step=0)]
        done = forge("tune", "--resume", "searched")
        assert (done.exit_code, "searched has made all its trials already" in done.stderr) == (0, True)
        more = forge("tune", "--resume", "searched", "--set", "search.max_trials=5")
        assert "trial 5, eval/loss 0.5000" in more.stdout


class TestRuns:
    @pytest.fixture
    def folder(self, home: Path) -> Path:
        make_run(home / "runs", "trained", endings=[RunFinished(step=6)])
        events = [*THREE, *begun(4, values={2: 6.0}), RunStopped(step=0)]
        return make_search(home / "runs", "searched", events=events, trial_runs=[1, 3])

    def test_the_list_counts_trials_and_names_no_trial(self, folder: Path) -> None:
        rows = {row.split()[0]: row.split() for row in forge("runs", "list").stdout.splitlines()[1:]}
        assert rows["searched"][1:6] == ["stopped", "3/4", "trials", "5.2500", "10.50"]
        assert rows["trained"][1:3] == ["finished", "3/6"]
        assert len(rows) == 2

    def test_the_list_as_json_counts_them_too(self, folder: Path) -> None:
        found = json.loads(forge("runs", "list", "-o", "json").stdout)
        trials = {run["run_id"]: run["trials"] for run in found}
        assert trials == {"searched": {"total": 4, "over": 3}, "trained": None}

    def test_one_is_shown_with_a_line_for_each_trial(self, folder: Path) -> None:
        done = forge("runs", "show", "searched")
        lines = [line.split() for line in done.stdout.splitlines()]
        assert done.exit_code == 0
        assert ["4", "unfinished", "2/6", "6.0000", "lr=0.004", "warmup_steps=4", "-"] in lines
        assert ["*3", "finished", "6/6", "5.2500", "lr=0.003", "warmup_steps=3", "3s"] in lines
        assert [line[0] for line in lines if len(line) == 7 and line[2].endswith("/6")] == ["4", "*3", "2", "1"]

    def test_one_as_json_is_its_record(self, folder: Path) -> None:
        assert json.loads(forge("runs", "show", "searched", "-o", "json").stdout)["best"]["trial"] == 3

    def test_a_trial_is_a_run_of_its_own(self, folder: Path) -> None:
        record = json.loads(forge("runs", "show", "searched-0003", "-o", "json").stdout)
        assert (record["run_id"], record["step"]) == ("searched-0003", 3)
        watched = forge("runs", "watch", "searched-0003")
        assert watched.stderr.endswith("see its search: forge runs show searched\n")
        with pytest.raises(ArgumentError, match="stops as a whole: forge runs stop searched"):
            forge("runs", "stop", "searched-0003")
        with pytest.raises(ArgumentError, match="no run 'searched-0002' under runs"):
            forge("runs", "show", "searched-0002")

    def test_watching_one_that_ended_tells_how(self, folder: Path) -> None:
        done = forge("runs", "watch", "searched")
        assert done.exit_code == 130
        assert "searched  stopped after 3 of 4 trials" in done.stdout
        assert done.stderr.endswith("go on: forge tune --resume searched\n")

    def test_its_log_is_that_of_the_run(self, folder: Path) -> None:
        (folder / "logs" / "run.log").write_text("hello\n")
        assert forge("runs", "logs", "searched").stdout == "hello\n"

    def test_its_page_is_written_anew_and_named(self, folder: Path) -> None:
        done = forge("runs", "report", "latest")
        assert (done.exit_code, done.stdout) == (0, "runs/searched/report.html\n")
        assert (folder / "report.html").exists()

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("trained", "trained is no search; see it with: forge runs show trained"),
            ("new", "new has no trial yet"),
        ],
    )
    def test_what_has_no_page_says_so(self, home: Path, folder: Path, name: str, message: str) -> None:
        make_search(home / "runs", "new")
        with pytest.raises(ArgumentError, match=message):
            forge("runs", "report", name)
