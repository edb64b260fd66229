"""The commands in this process: what they print, and where."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
from typer.testing import CliRunner, Result

from forge.cli.app import app
from forge.config.dump import dump_job
from forge.config.load import load_job
from forge.errors import ArgumentError, DataError, JobFileError
from forge.events import RunFailed, RunFinished
from tests.support.jobs import tiny_job, tiny_plan
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
    def test_help__every_command__has_an_example(self, path: tuple[str, ...]) -> None:
        done = forge(*path, "--help")
        assert done.exit_code == 0
        assert f"Example:  forge {' '.join(path)}" in done.stdout
        assert all(line.count("Example:") < 2 for line in done.stdout.splitlines())
        assert forge(*path, "-h").stdout == done.stdout

    def test_help__groups_and_root__list_their_commands(self) -> None:
        assert set(commands()) >= {("train",), ("plan",), ("runs", "list"), ("cluster", "up"), ("doctor",)}
        for arguments in ([], ["--help"]):
            assert "Start here:  forge train jobs/pretrain.yaml" in forge(*arguments).output

    def test_version__prints_it(self) -> None:
        assert forge("--version").stdout.startswith("forge 0.")


@pytest.mark.usefixtures("home")
class TestPlan:
    @pytest.mark.parametrize("arguments", [("plan", "job.yaml"), ("train", "job.yaml", "--dry-run")])
    def test_plan__table__shows_every_world_size_and_starts_nothing(
        self, home: Path, arguments: tuple[str, ...]
    ) -> None:
        done = forge(*arguments)
        assert done.exit_code == 0
        assert "4 steps" in done.stdout
        table, _, examples = done.stdout.partition("\n\n")
        assert [line.split()[:3] for line in table.splitlines()[-2:]] == [["1", "8", "1"], ["2", "4", "1"]]
        assert examples.count("\nexample ") == 3 and "\nloss │ " in examples
        assert done.stderr.endswith("train it: forge train job.yaml\n")
        assert not (home / "runs").exists()

    @pytest.mark.parametrize("arguments", [("plan", "job.yaml"), ("train", "job.yaml", "--dry-run")])
    def test_plan__json__is_the_plan_alone(self, arguments: tuple[str, ...]) -> None:
        done = forge(*arguments, "-o", "json", "--set", "training.total_steps=9")
        draft = json.loads(done.stdout)
        assert json.dumps(draft, sort_keys=True, indent=1) + "\n" == done.stdout
        assert draft["total_steps"] == 9
        assert draft["files"]["patterns"][0]["kinds"] == {"text": 8}

    @pytest.mark.parametrize(
        ("files", "problem"),
        [
            ("nowhere/*.txt", "matches no file"),
            ("corpus", "is a folder; name the files in it"),
            ("keyless.jsonl", "keyless.jsonl:1: no key 'text'"),
            ("[corpus/*.txt, pointer.jsonl]", "is a pointer of Git LFS"),
        ],
    )
    def test_plan__corpus_that_cannot_be_read__is_refused(self, home: Path, files: str, problem: str) -> None:
        (home / "keyless.jsonl").write_text('{"body": "a"}\n')
        (home / "pointer.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n")
        with pytest.raises(DataError, match=problem):
            forge("plan", "job.yaml", "--set", f"data.files={files}")

    @pytest.mark.parametrize("command", [("plan",), ("train", "--dry-run")])
    def test_plan__next_command__keeps_what_was_set(self, command: tuple[str, ...]) -> None:
        arguments = ["job.yaml", "--set", "training.total_steps=9", "--set", "data.files=[corpus/*.txt]"]
        done = forge(*command, *arguments)
        last = done.stderr.splitlines()[-1]
        assert last.startswith("train it: forge train ")
        assert shlex.split(last.partition("forge train ")[2]) == arguments

    def test_plan__screen_and_json__say_what_is_read_and_skipped(self, home: Path) -> None:
        (home / "corpus/.ipynb_checkpoints").mkdir()
        (home / "corpus/.ipynb_checkpoints/a.txt").write_text("copy")
        (home / "corpus/empty.txt").touch()
        (home / "corpus/8.txt").write_text('{"text": "a record"}\n')
        shown = " ".join(forge("plan", "job.yaml", "--set", "data.files=corpus/**/*.txt").stdout.split())
        assert "corpus/**/*.txt: 9 files" in shown and "8 text, 1 JSON lines" in shown
        assert "1x a folder of copies that Jupyter keeps" in shown and "1x an empty file" in shown
        assert "special tokens ordinary characters" in shown

    def test_plan__batch_larger_than_the_corpus__is_warned_of(self) -> None:
        changes = ["training.total_steps=null", "training.epochs=1", "training.global_batch_size=4096"]
        done = forge("plan", "job.yaml", *(word for change in changes for word in ("--set", change)))
        shown = " ".join(done.stderr.split())
        assert "fewer than one batch of 4,096" in shown and "training.epochs: 1 is" in shown

    @pytest.mark.slow
    def test_plan__epochs__counts_steps_from_the_corpus(self) -> None:
        done = forge("plan", "job.yaml", "--set", "training.total_steps=null", "--set", "training.epochs=2")
        assert done.exit_code == 0
        assert "(2.0" in done.stdout
        assert "reading the corpus" in done.stderr

    def test_resume__dry_run__changes_nothing(self, home: Path) -> None:
        folder = make_run(home / "runs", "old")
        (folder / "job.yaml").write_text((home / "job.yaml").read_text())
        before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
        done = forge("train", "--resume", "old", "--dry-run")
        assert (done.exit_code, "4 steps" in done.stdout) == (0, True)
        assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before

    def test_train__without_file__exits_2(self) -> None:
        for arguments in ([], ["--dry-run"]):
            done = forge("train", *arguments)
            assert (done.exit_code, "give a job file, or --resume RUN" in done.stderr) == (2, True)


class TestSchema:
    def test_schema__job__validates_the_job_file(self, home: Path) -> None:
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

    def test_list__table__one_line_per_run(self, runs: Path) -> None:
        header, *rows = forge("runs", "list").stdout.splitlines()
        assert header.split()[:4] == ["run", "status", "step", "loss"]
        assert {row.split()[0]: row.split()[1:5] for row in rows} == {
            "done": ["finished", "3/6", "1.6667", "7.39"],
            "broken": ["failed", "0/6", "-", "-"],
        }

    def test_list__json__one_object_per_run(self, runs: Path) -> None:
        found = json.loads(forge("runs", "list", "-o", "json").stdout)
        assert {(run["run_id"], run["status"], run["failure"]) for run in found} == {
            ("done", "finished", None),
            ("broken", "failed", "a [red] rank :x:"),
        }

    def test_list__no_runs__names_the_next_command(self) -> None:
        done = forge("runs", "list")
        assert (done.exit_code, done.stdout) == (0, "")
        assert done.stderr.splitlines() == [
            f"no runs in {Path('runs').absolute()}",
            "start one: forge train jobs/pretrain.yaml",
        ]
        assert json.loads(forge("runs", "list", "-o", "json").stdout) == []

    def test_show__failed_run__prints_plan_and_reason_unchanged(self, runs: Path) -> None:
        done = forge("runs", "show", "broken")
        assert done.exit_code == 0
        assert "tiny" in done.stdout
        assert "failed at step 0 of 6" in done.stdout
        assert done.stderr == "! a [red] rank :x:\n"

    def test_show__json__has_the_last_step(self, runs: Path) -> None:
        record = json.loads(forge("runs", "show", "done", "-o", "json").stdout)
        assert (record["status"], record["step"], record["last_step"]["train/loss"]) == ("finished", 3, 5 / 3)
        assert record["last_step"]["speed/mfu"] is None

    def test_show__goodput__adds_up_in_table_and_json(self, home: Path) -> None:
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

    def test_logs__last_lines__are_printed(self, runs: Path) -> None:
        (runs / "done" / "logs" / "rank-0.log").write_text("".join(f"line {number}\n" for number in range(99)))
        assert forge("runs", "logs", "done", "--file", "rank-0", "-n", "2").stdout == "line 97\nline 98\n"
        with pytest.raises(ArgumentError, match=r"rank-7.log does not exist; its logs are: rank-0"):
            forge("runs", "logs", "done", "--file", "rank-7")

    def test_watch__ended_run__prints_its_summary(self, runs: Path) -> None:
        done, broken = forge("runs", "watch", "done"), forge("runs", "watch", "broken")
        assert (done.exit_code, broken.exit_code) == (0, 4)
        assert "finished at step 3 of 6" in done.stdout
        assert broken.stderr.splitlines()[0] == "error: a [red] rank :x:"

    def test_stop__run_that_is_not_running__says_so(self, runs: Path) -> None:
        assert forge("runs", "stop", "done").stderr == "done is not running\n"

    def test_resume__finished_run__says_so(self, runs: Path) -> None:
        (runs / "done" / "job.yaml").write_text(dump_job(tiny_job()))
        done = forge("train", "--resume", "done")
        assert (done.exit_code, "done has already reached its last step" in done.stderr) == (0, True)

    @pytest.mark.parametrize(
        ("key", "value", "said"),
        [
            ("training.optimizer.lr", "0.5", "training.optimizer.lr changed from 0.01 to 0.5"),
            ("data.seed", "9", "data.seed changed from 1 to 9"),
            ("model.hidden_size", "64", "model.hidden_size changed from 32 to 64"),
            ("checkpoint.to", "s3://bucket/runs", "them looked for in s3://bucket/runs/"),
        ],
    )
    @pytest.mark.parametrize("run", ["done", "broken"])
    @pytest.mark.parametrize("way", ["--set", "FILE"])
    def test_resume__key_that_changes_the_curve__is_refused_by_name(
        self, runs: Path, run: str, way: str, key: str, value: str, said: str
    ) -> None:
        job = dump_job(tiny_job())
        (runs / run / "job.yaml").write_text(job)
        arguments = ["--set", f"{key}={value}"]
        if way == "FILE":
            changed = load_job(runs / run / "job.yaml", overrides=[f"{key}={value}"]).job
            (runs.parent / "other.yaml").write_text(dump_job(changed))
            arguments = [str(runs.parent / "other.yaml")]
        with pytest.raises(ArgumentError, match=f"cannot resume {run}: .*{said}"):
            forge("train", "--resume", str(runs / run), *arguments)

    @pytest.mark.parametrize(("steps", "said"), [(2, "already reached step 3"), (40, "")])
    def test_resume__other_length__is_planned_unless_the_run_is_past_it(
        self, runs: Path, monkeypatch: pytest.MonkeyPatch, steps: int, said: str
    ) -> None:
        (runs / "done" / "job.yaml").write_text(dump_job(tiny_job()))
        plan = tiny_plan(training__total_steps=steps)
        monkeypatch.setattr("forge.api.plan_job", lambda *_, **__: plan)
        arguments = ["train", "--resume", "done", "--set", f"training.total_steps={steps}", "--dry-run"]
        if said:
            with pytest.raises(ArgumentError, match=f"cannot resume done: total_steps: {steps} is .*{said}"):
                forge(*arguments)
            return
        done = forge(*arguments)
        assert f"done: training.total_steps changed from 6 to {steps}" in done.stderr
        assert f"{steps} steps instead of 6; from step 4 on" in " ".join(done.stdout.split())

    def test_resume__finished_run_with_another_interval__says_what_changed_and_that_it_has_ended(
        self, runs: Path
    ) -> None:
        (runs / "done" / "job.yaml").write_text(dump_job(tiny_job()))
        done = forge("train", "--resume", "done", "--set", "checkpoint.keep=7")
        assert done.exit_code == 0
        assert "done: checkpoint.keep changed from 3 to 7" in done.stderr
        assert "done has already reached its last step" in done.stderr

    def test_next_command__run_in_another_folder__has_its_path(self, home: Path) -> None:
        make_run(home / "elsewhere", "far")
        assert forge("runs", "watch", "far", "--runs", "elsewhere").stderr.endswith("--resume elsewhere/far\n")


@pytest.mark.usefixtures("home")
class TestDoctor:
    def test_doctor__table__one_line_per_check(self) -> None:
        done = forge("doctor")
        assert done.exit_code == 0
        assert [line.split()[0] for line in done.stdout.splitlines()[1:]].count("broken") == 0
        for what in ("python", "torch", "ray", "gpu", "memory", "shared memory", "wandb key"):
            assert f"  {what} " in done.stdout

    def test_doctor__json__one_object_per_check(self) -> None:
        findings = json.loads(forge("doctor", "-o", "json").stdout)
        assert {finding["what"] for finding in findings} >= {"python", "deepspeed", "cluster"}

    def test_doctor__broken__exits_2_with_the_fix(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("forge.runtime.doctor._NEEDED", {"torch": "99", "no-such-package": "1"})
        done = forge("doctor")
        assert done.exit_code == 2
        assert "needs 99" in done.stdout
        assert "not installed" in done.stdout
        assert "fix torch: make setup" in done.stderr
        assert "ready" not in done.stderr

    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({"HOME": "/proc", "FORGE_CACHE": ""}, "/proc/.cache/forge cannot be written; set HOME or FORGE_CACHE"),
            ({"HOME": "/proc", "FORGE_STATE": ""}, "forge cannot be written; set HOME or FORGE_STATE"),
            ({"HOME": "/proc", "RAY_AUTH_TOKEN_PATH": ""}, "/proc/.ray cannot be written; set HOME"),
            ({"RAY_TMPDIR": "/" + "x" * 90}, "its path has 91 bytes"),
        ],
    )
    def test_doctor__folders_that_cannot_be_used__not_ready(
        self, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        done = forge("doctor")
        assert done.exit_code == 2
        assert message in " ".join(done.stdout.split())
        assert "ready" not in done.stderr

    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({"TMPDIR": "/" + "x" * 90}, "Ray's are in /tmp"),
            ({"RAY_ADDRESS": "auto"}, "forge uses none of another Ray job"),
            ({"RAY_AUTH_MODE": "disabled"}, "Ray's ports ask for no token"),
        ],
    )
    def test_doctor__variables_that_are_ignored_or_weaken_a_cluster__are_named(
        self, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        done = forge("doctor")
        assert done.exit_code == 0
        assert message in " ".join(done.stdout.split())

    def test_doctor__limits_of_a_container__are_what_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("forge.runtime.doctor.usable_cpus", lambda: 1)
        monkeypatch.setattr("forge.runtime.doctor.usable_memory_bytes", lambda: 2**30)
        monkeypatch.setattr("forge.runtime.doctor.free_memory_bytes", lambda: 2**29)
        monkeypatch.setattr("resource.getrlimit", lambda _: (256, 256))
        shown = " ".join(forge("doctor").stdout.split())
        assert "1 core of " in shown
        assert "512 MiB free of 1.00 GiB, the container's limit" in shown
        assert "broken open files at most 256, want 4096" in shown


class TestErrors:
    def test_errors__from_a_command__reach_main_unchanged(self, home: Path) -> None:
        (home / "job.yaml").write_text((home / "job.yaml").read_text().replace("seq_len", "sequence_length"))
        with pytest.raises(JobFileError, match=r"job\.yaml:3: data\.sequence_length: unknown key"):
            forge("plan", "job.yaml")


@pytest.mark.usefixtures("home")
class TestData:
    def test_prepare_and_inspect__table__show_numbers_and_examples(self) -> None:
        done = forge("data", "prepare", "job.yaml")
        assert done.exit_code == 0 and "training tokens" in done.stdout
        done = forge("data", "inspect", "job.yaml", "-n", "2", "--split", "held_out")
        assert done.exit_code == 0
        assert done.stdout.count("example ") == 2 and "(held out)" in done.stdout
        assert "tokens carry loss (100.0%)" in done.stdout
        assert "\nloss │ " in done.stdout

    def test_inspect__json__is_the_view_alone(self) -> None:
        view = json.loads(forge("data", "inspect", "job.yaml", "--index", "1", "-n", "2", "-o", "json").stdout)
        assert [example["index"] for example in view["examples"]] == [1, 2]
        assert view["num_sampled_records"] is None and view["lengths"]["count"] == 8
        assert {span["has_loss"] for span in view["examples"][0]["spans"]} == {True, False}

    def test_inspect__data_without_a_job__takes_its_settings_from_set(self, home: Path) -> None:
        (home / "more.jsonl").write_text("".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(40)))
        settings = ["data.text_key=body", "data.packing=examples", "data.tokenizer.vocab_size=300"]
        done = forge("data", "inspect", "more.jsonl", *(word for one in settings for word in ("--set", one)))
        assert done.exit_code == 0 and "examples in" in done.stdout
        with pytest.raises(DataError, match="no key 'text'"):
            forge("data", "inspect", "more.jsonl")
        with pytest.raises(JobFileError, match=r"data\.format"):
            forge("data", "inspect", "more.jsonl", "--set", "data.format=chats")
        with pytest.raises(DataError, match=r"^data\.files: none\.jsonl matches no file"):
            forge("data", "inspect", "none.jsonl")
        (home / "bad.jsonl").write_text('{"text": "a"}\nno JSON\n')
        with pytest.raises(DataError, match=r"^/\S*bad\.jsonl:2: not a line of JSON"):
            forge("data", "inspect", "bad.jsonl")

    def test_inspect__no_such_example__says_which_there_are(self) -> None:
        with pytest.raises(ArgumentError, match="no number 100,000 among the train sequences"):
            forge("data", "inspect", "job.yaml", "--index", "100000")
