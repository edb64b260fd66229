"""The commands in this process: what they print, and where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
from typer.testing import CliRunner, Result

from forge.cli.app import app
from forge.errors import ArgumentError, JobFileError
from forge.events import RunFailed, RunFinished
from tests.support.runs import History, make_run

ROOT = typer.main.get_command(app)


def forge(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def commands(command: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command, groups left out."""
    children = getattr(command, "commands", None)
    if children is None:
        yield path
        return
    for name, child in children.items():
        yield from commands(child, (*path, name))


class TestHelp:
    @pytest.mark.parametrize("path", list(commands()), ids=" ".join)
    def test_every_command_shows_an_example_of_itself(self, path: tuple[str, ...]) -> None:
        done = forge(*path, "--help")
        assert done.exit_code == 0
        assert f"Example:  forge {' '.join(path)}" in done.stdout
        assert forge(*path, "-h").stdout == done.stdout

    def test_the_groups_and_the_root_show_what_they_hold(self) -> None:
        assert set(commands()) >= {("train",), ("plan",), ("runs", "list"), ("cluster", "up"), ("doctor",)}
        for arguments in ([], ["--help"]):
            assert "Start here:  forge train jobs/pretrain.yaml" in forge(*arguments).output

    def test_the_version_is_told(self) -> None:
        assert forge("--version").stdout.startswith("forge 0.")


@pytest.mark.usefixtures("home")
class TestPlan:
    @pytest.mark.parametrize("arguments", [("plan", "job.yaml"), ("train", "job.yaml", "--dry-run")])
    def test_it_shows_every_world_size_on_stdout_and_trains_nothing(
        self, home: Path, arguments: tuple[str, ...]
    ) -> None:
        done = forge(*arguments)
        assert done.exit_code == 0
        assert "4 steps" in done.stdout
        assert [line.split()[:3] for line in done.stdout.splitlines()[-2:]] == [["1", "8", "1"], ["2", "4", "1"]]
        assert done.stderr == "train it: forge train job.yaml\n"
        assert not (home / "runs").exists()

    @pytest.mark.parametrize("arguments", [("plan", "job.yaml"), ("train", "job.yaml", "--dry-run")])
    def test_as_json_it_is_the_plan_alone(self, arguments: tuple[str, ...]) -> None:
        done = forge(*arguments, "-o", "json", "--set", "training.total_steps=9")
        draft = json.loads(done.stdout)
        assert json.dumps(draft, sort_keys=True, indent=1) + "\n" == done.stdout
        assert draft["total_steps"] == 9
        assert "corpus" not in draft

    @pytest.mark.slow
    def test_a_length_in_epochs_is_counted_from_the_corpus(self) -> None:
        done = forge("plan", "job.yaml", "--set", "training.total_steps=null", "--set", "training.epochs=2")
        assert done.exit_code == 0
        assert "(2.0" in done.stdout
        assert "reading the corpus" in done.stderr

    def test_a_dry_run_of_a_resumed_run_does_not_train_either(self, home: Path) -> None:
        folder = make_run(home / "runs", "old")
        (folder / "job.yaml").write_text((home / "job.yaml").read_text())
        before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
        done = forge("train", "--resume", "old", "--dry-run")
        assert (done.exit_code, "4 steps" in done.stdout) == (0, True)
        assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before

    def test_train_without_a_file_asks_for_one(self) -> None:
        for arguments in ([], ["--dry-run"]):
            done = forge("train", *arguments)
            assert (done.exit_code, "give a job file, or --resume RUN" in done.stderr) == (2, True)


class TestSchema:
    def test_it_is_a_json_schema_that_the_job_file_follows(self, home: Path) -> None:
        schema = json.loads(forge("schema", "job").stdout)
        jsonschema.Draft202012Validator.check_schema(schema)
        import yaml

        jsonschema.validate(yaml.safe_load((home / "job.yaml").read_text()), schema)


@pytest.mark.usefixtures("home")
class TestRuns:
    @pytest.fixture
    def runs(self, home: Path) -> Path:
        make_run(home / "runs", "done", endings=[RunFinished(step=6)])
        make_run(
            home / "runs", "broken", steps=0, endings=[RunFailed(error="RunError", message="a [red] rank :x:")]
        )
        return home / "runs"

    def test_the_list_has_a_line_for_each(self, runs: Path) -> None:
        header, *rows = forge("runs", "list").stdout.splitlines()
        assert header.split()[:4] == ["run", "status", "step", "loss"]
        assert {row.split()[0]: row.split()[1:5] for row in rows} == {
            "done": ["finished", "3/6", "1.6667", "7.39"],
            "broken": ["failed", "0/6", "-", "-"],
        }

    def test_the_list_as_json_is_json(self, runs: Path) -> None:
        found = json.loads(forge("runs", "list", "-o", "json").stdout)
        assert {(run["run_id"], run["status"], run["failure"]) for run in found} == {
            ("done", "finished", None),
            ("broken", "failed", "a [red] rank :x:"),
        }

    def test_an_empty_list_says_what_to_do(self) -> None:
        done = forge("runs", "list")
        assert (done.exit_code, done.stdout) == (0, "")
        assert done.stderr.splitlines() == ["no runs in runs", "start one: forge train jobs/pretrain.yaml"]
        assert json.loads(forge("runs", "list", "-o", "json").stdout) == []

    def test_one_is_shown_with_its_plan_and_why_it_failed_word_by_word(self, runs: Path) -> None:
        done = forge("runs", "show", "broken")
        assert done.exit_code == 0
        assert "tiny" in done.stdout
        assert "failed at step 0 of 6" in done.stdout
        assert done.stderr == "! a [red] rank :x:\n"

    def test_one_as_json_is_json(self, runs: Path) -> None:
        record = json.loads(forge("runs", "show", "done", "-o", "json").stdout)
        assert (record["status"], record["step"], record["last_step"]["train/loss"]) == ("finished", 3, 5 / 3)
        assert record["last_step"]["speed/mfu"] is None

    def test_where_its_time_went_adds_up_in_words_and_as_json(self, home: Path) -> None:
        history = History()
        history.start()
        history.form(6.0)
        history.step(1, 2.0)
        for step in range(2, 14):
            history.change("loss", reason=f"node {'7e' * 28} lost: number {step}")
            history.form(1.0)
            history.step(step, 2.0)
        history.stop(saving_s=2.0)
        history.write(home / "runs", "spot")
        record = json.loads(forge("runs", "show", "spot", "-o", "json").stdout)["goodput"]
        assert record["seconds"] == dict.fromkeys(record["seconds"], 0) | {
            "training": 26.0,
            "starting": 18.0,
            "saving": 2.0,
        }
        assert (record["wall_s"], record["num_changes"], len(record["changes"])) == (46.0, 12, 12)
        done = forge("runs", "show", "spot")
        lines = [line.split() for line in done.stdout.splitlines()]
        assert ["training", "26.0", "56.5%"] in lines
        assert ["wall", "time", "46.0", "100.0%"] in lines
        assert [line[-1] for line in lines if "lost:" in line] == [str(step) for step in range(4, 14)]
        assert ["41s", "loss", "2", "→", "2", "3s", "node", "7e7e", "lost:", "number", "13"] in lines
        assert "the last 10 of 12 changes" in done.stderr

    def test_the_end_of_a_log_is_printed(self, runs: Path) -> None:
        (runs / "done" / "logs" / "rank-0.log").write_text("".join(f"line {number}\n" for number in range(99)))
        assert forge("runs", "logs", "done", "-n", "2").stdout == "line 97\nline 98\n"
        with pytest.raises(ArgumentError, match=r"rank-7.log does not exist; its logs are: rank-0"):
            forge("runs", "logs", "done", "--file", "rank-7")

    def test_watching_one_that_ended_tells_how(self, runs: Path) -> None:
        done, broken = forge("runs", "watch", "done"), forge("runs", "watch", "broken")
        assert (done.exit_code, broken.exit_code) == (0, 4)
        assert "finished at step 3 of 6" in done.stdout
        assert broken.stderr.splitlines()[0] == "error: a [red] rank :x:"

    def test_stopping_one_that_does_not_run_says_so(self, runs: Path) -> None:
        assert forge("runs", "stop", "done").stderr == "done is not running\n"

    def test_one_that_has_finished_is_not_carried_on(self, runs: Path) -> None:
        done = forge("train", "--resume", "done")
        assert (done.exit_code, "done has already reached its last step" in done.stderr) == (0, True)

    def test_what_to_type_next_names_a_run_so_that_it_is_found(self, home: Path) -> None:
        make_run(home / "elsewhere", "far")
        assert forge("runs", "watch", "far", "--runs", "elsewhere").stderr.endswith("--resume elsewhere/far\n")


@pytest.mark.usefixtures("home")
class TestDoctor:
    def test_the_table_has_a_line_for_everything(self) -> None:
        done = forge("doctor")
        assert done.exit_code == 0
        assert [line.split()[0] for line in done.stdout.splitlines()[1:]].count("broken") == 0
        for what in ("python", "torch", "ray", "gpu", "memory", "shared memory", "wandb key"):
            assert f"  {what} " in done.stdout

    def test_as_json_it_is_json(self) -> None:
        findings = json.loads(forge("doctor", "-o", "json").stdout)
        assert {finding["what"] for finding in findings} >= {"python", "deepspeed", "cluster"}

    def test_something_broken_leaves_with_2_and_the_command_that_mends_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("forge.runtime.doctor._NEEDED", {"torch": "99", "no-such-package": "1"})
        done = forge("doctor")
        assert done.exit_code == 2
        assert "needs 99" in done.stdout
        assert "not installed" in done.stdout
        assert "fix torch: make setup" in done.stderr
        assert "ready" not in done.stderr


class TestErrors:
    def test_they_leave_the_command_as_they_are_for_the_one_place_that_tells_them(self, home: Path) -> None:
        (home / "job.yaml").write_text((home / "job.yaml").read_text().replace("seq_len", "sequence_length"))
        with pytest.raises(JobFileError, match=r"job\.yaml:3: data\.sequence_length: unknown key"):
            forge("plan", "job.yaml")
