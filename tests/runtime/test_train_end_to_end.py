"""`forge train` with real Ray and two ranks, undisturbed and interrupted.

One run is undisturbed. Another one of the same job is stopped by Ctrl-C, loses a rank under Ray Train (which fails
the run), loses its driver, and is resumed each time: its loss curve must equal the first one's bit for bit. Faults
that the elastic engine survives without ending the run are in tests/elastic.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.tracking import MlflowClient
from ray.util import get_node_ip_address
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import forge
from forge.errors import RunError
from forge.runs.lock import driver_pid
from forge.runs.reader import read_metrics, read_run
from forge.runs.trackers.wandb_log import log_files
from tests.support.command import environment, family, mentioning, start_forge, survivors, wait_for
from tests.support.command import forge as run_forge
from tests.support.pages import Elements, own_text
from tests.support.ports import answers, open_ports
from tests.support.wandb_file import read_history

TOTAL_STEPS = 240
JOB = f"""\
name: tiny
model: {{architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}}
data: {{files: "corpus/*.txt", seq_len: 32, tokenizer: {{vocab_size: 300}}, held_out: 10%}}
training:
  total_steps: {TOTAL_STEPS}
  global_batch_size: 8
  optimizer: {{lr: 1.0e-2}}
  schedule: {{warmup: 5}}
  evaluate_every: 120 steps
checkpoint: {{every: 25 steps}}
resources: {{workers: 2, gpu: none}}
tracking: {{wandb: {{mode: offline}}, tensorboard: true}}
"""
TEXT = "the cat sat on a mat and saw one dog run past his old red barn while rain fell down hard"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of a tiny model on a tiny corpus, with a cache of its own."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "job.yaml").write_text(JOB)
    (folder / "corpus").mkdir()
    chance = random.Random(0)
    for number in range(40):
        (folder / "corpus" / f"{number}.txt").write_text(" ".join(chance.choices(TEXT.split(), k=400)))
    return folder


@dataclass
class Execution:
    """One `forge train` process and what it left."""

    process: subprocess.Popen[str]
    folder: Path
    driver: int
    processes: list[psutil.Process] = field(default_factory=list)
    code: int = -1
    out: str = ""
    err: str = ""
    left: list[str] = field(default_factory=list)
    shown: dict[str, list[str]] = field(default_factory=dict)
    """What the ports of Ray's processes answered without the token while the run trained."""
    status: str = ""
    step: int = 0

    def reach(self, step: int) -> None:
        """Wait until a step is recorded, then note every process of the run."""
        wait_for(lambda: last_step(self.folder) >= step or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.communicate()
        self.processes = family(self.driver)

    def ask_ports(self) -> None:
        """Ask every port of Ray's processes; ranks have others, which only the cluster's network protects."""
        ray = [one for one in self.processes if one.name().startswith(("raylet", "gcs_server", "ray::"))]
        ports = open_ports(ray, host=get_node_ip_address())
        self.shown = {f"{port} of {name}": answers(*port) for port, name in ports.items()}

    def end(self) -> Execution:
        """Wait for the end, and note which processes are left."""
        self.out, self.err = self.process.communicate(timeout=120)
        self.code = self.process.returncode
        run = read_run(self.folder)
        self.status, self.step = run.status, run.step
        self.left = survivors(self.processes) + mentioning(self.folder.name, f"_{self.driver}/")
        return self


def begin(home: Path, *arguments: str, runs: str) -> Execution:
    """Start `forge train ARGUMENTS`; the run is the only one under `runs`."""
    process = start_forge("train", *arguments, cwd=home, env=environment(home))

    def driving() -> tuple[Path, int] | None:
        for folder in (home / runs).glob("tiny-*"):
            pid = driver_pid(folder)
            if pid is not None:
                return folder, pid
        assert process.poll() is None, process.communicate()
        return None

    folder, pid = wait_for(driving)
    return Execution(process=process, folder=folder, driver=pid)


def last_step(folder: Path) -> int:
    steps = read_metrics(folder)
    return int(steps[-1]["step"]) if steps else 0


def losses(folder: Path) -> list[float]:
    return [record["train/loss"] for record in read_metrics(folder)]


@pytest.fixture(scope="module")
def whole(home: Path) -> Execution:
    """The undisturbed run."""
    execution = begin(home, "job.yaml", "--set", "checkpoint.to=peace", runs="peace")
    execution.reach(5)
    execution.ask_ports()
    return execution.end()


@pytest.fixture(scope="module")
def disturbed(home: Path) -> dict[str, Execution]:
    """The interrupted run, resumed from its newest checkpoint each time."""
    setting = ("--set", "checkpoint.to=trouble")

    interrupted = begin(home, "job.yaml", *setting, "--set", "tracking.mlflow.experiment=tiny", runs="trouble")
    interrupted.reach(20)
    interrupted.process.send_signal(signal.SIGINT)
    interrupted.end()
    resume = ("--resume", str(interrupted.folder))

    rank_killed = begin(home, *resume, "--set", "resources.engine=ray-train", runs="trouble")
    rank_killed.reach(interrupted.step + 40)
    next(process for process in rank_killed.processes if "RayTrainWorker" in "".join(process.cmdline())).kill()
    rank_killed.end()

    driver_killed = begin(home, *resume, "--set", "resources.engine=elastic", runs="trouble")
    driver_killed.reach(rank_killed.step + 40)
    psutil.Process(driver_killed.driver).kill()
    driver_killed.end()

    finished = begin(home, *resume, runs="trouble")
    finished.reach(driver_killed.step + 1)
    finished.end()
    return {
        "interrupted": interrupted,
        "rank killed": rank_killed,
        "driver killed": driver_killed,
        "finished": finished,
    }


class TestUndisturbed:
    def test_output__finished__reports_step_and_perplexity(self, whole: Execution) -> None:
        assert (whole.code, whole.status, whole.step) == (0, "finished", TOTAL_STEPS), whole.err
        assert f"finished at step {TOTAL_STEPS} of {TOTAL_STEPS}" in whole.out
        assert "(a unigram model of the same tokens has " in whole.out
        assert "a sample of its answers" in whole.out
        assert f"try it: forge generate peace/{whole.folder.name}" in whole.err

    def test_loss__finished__has_halved(self, whole: Execution) -> None:
        run = read_run(whole.folder)
        evaluated = run.newest("Evaluated", weights="current")
        assert evaluated is not None
        assert evaluated["step"] == TOTAL_STEPS
        assert evaluated["metrics"]["perplexity"] < run.plan.corpus.unigram_perplexity / 2
        assert losses(whole.folder)[-1] < losses(whole.folder)[0] / 2

    def test_output__pipe__is_plain_lines_in_order(self, whole: Execution) -> None:
        assert "\x1b" not in whole.out + whole.err
        lines = whole.err.splitlines()
        order = [
            "reading the corpus",
            "run tiny-",
            "starting the workers",
            "training on 2 workers (cpu)",
            f"step      1/{TOTAL_STEPS}",
            "step     25  checkpoint",
            f"step    {TOTAL_STEPS}/{TOTAL_STEPS}",
        ]
        numbers = [next(number for number, line in enumerate(lines) if line.startswith(what)) for what in order]
        assert numbers == sorted(numbers)

    def test_metrics__finished__has_every_step_once_and_complete(self, whole: Execution) -> None:
        records = read_metrics(whole.folder)
        assert [record["step"] for record in records] == list(range(1, TOTAL_STEPS + 1))
        assert all(None not in record.values() for record in records)
        assert [record["train/tokens"] for record in records] == [256 * step for step in range(1, TOTAL_STEPS + 1)]

    def test_events__finished__say_what_was_read(self, whole: Execution) -> None:
        (read,) = [event for event in read_run(whole.folder).events if event["event"] == "CorpusRead"]
        (pattern,) = read["patterns"]
        assert (read["num_documents"], read["warnings"]) == (40, [])
        assert pattern == {"pattern": "corpus/*.txt", "num_files": 40, "kinds": {"text": 40}, "skipped": {}}

    def test_report__finished__has_every_step_and_the_environment(self, whole: Execution) -> None:
        wait_for((whole.folder / "report.html").exists)  # written after the command has ended
        page = Elements(own_text(whole.folder / "report.html"))
        training, held_out = page.figures["loss"]["data"]
        assert training["y"] == losses(whole.folder)
        assert held_out["x"] == [120, 240]
        assert f"torch {version('torch')}, " in " ".join(page.text)
        command = " ".join(page.text).partition("forge train")[2].splitlines()[0].strip()
        assert command == str(whole.folder.resolve() / "job.yaml")

    def test_wandb__finished__has_the_same_losses(self, whole: Execution) -> None:
        (record,) = whole.folder.glob("wandb/offline-run-*/run-*.wandb")
        history = [row for row in read_history(record) if "train/loss" in row]
        assert [row["train/loss"] for row in history] == losses(whole.folder)

    def test_run_folder__finished__has_all_files_and_logs(self, whole: Execution) -> None:
        there = {path.name for path in whole.folder.iterdir()}
        assert there >= {"job.yaml", "plan.json", "events.jsonl", "metrics.jsonl", "checkpoints"}
        assert there >= {"wandb", "tensorboard"}
        logs = {path.stem for path in (whole.folder / "logs").iterdir()}
        agents = {name for name in logs if name.startswith("agent-")}
        assert logs - agents == {"driver", "recorder", "supervisor", "fork-server", "rank-0", "rank-1"}
        assert len(agents) == 1
        for log in (whole.folder / "logs").iterdir():
            assert "Traceback" not in log.read_text()

    def test_ports__of_ray_while_training__show_nothing_without_the_token(self, whole: Execution) -> None:
        assert len(whole.shown) >= 3
        assert {port: shown for port, shown in whole.shown.items() if shown} == {}

    def test_processes__after_the_end__none_left(self, whole: Execution) -> None:
        assert len(whole.processes) > 5
        assert whole.left == []

    def test_forge_runs__finished__list_and_show_agree(self, whole: Execution, home: Path) -> None:
        runs = ("--runs", "peace")
        (listed,) = json.loads(run_forge("runs", "list", *runs, "-o", "json", cwd=home).stdout)
        shown = json.loads(run_forge("runs", "show", *runs, "-o", "json", cwd=home).stdout)
        assert listed == shown
        assert (shown["run_id"], shown["status"]) == (whole.folder.name, "finished")
        assert shown["unigram_perplexity"] > shown["held_out_perplexity"]
        assert Path(shown["checkpoint"]).is_dir()
        assert run_forge("runs", "logs", *runs, "--file", "rank-1", cwd=home).returncode == 0

    @pytest.mark.slow
    def test_forge_generate__longer_than_seq_len__is_reproducible(self, whole: Execution, home: Path) -> None:
        arguments = ("generate", "--runs", "peace", "--prompt", "the cat", "--max-tokens", "80", "-o", "json")
        first, again = (run_forge(*arguments, cwd=home) for _ in range(2))
        assert first.returncode == 0, first.stderr
        answer, same = json.loads(first.stdout), json.loads(again.stdout)
        assert (answer["prompt"], answer["step"]) == ("the cat", TOTAL_STEPS)
        assert len(set(answer["text"].split()) & set(TEXT.split())) > 5
        times = ("load_s", "generate_s")
        assert all(answer.pop(name) > 0 and same.pop(name) > 0 for name in times)
        assert answer == same


@pytest.mark.slow
class TestInterrupted:
    def test_ctrl_c__once__checkpoints_and_prints_how_to_resume(self, disturbed: dict[str, Execution]) -> None:
        run = disturbed["interrupted"]
        assert (run.code, run.status) == (130, "stopped"), run.err
        assert 20 <= run.step < TOTAL_STEPS
        assert f"step {run.step:>6}  checkpoint of " in run.err
        assert "stopping after this step, with a checkpoint" in run.err
        assert f"resume: forge train --resume trouble/{run.folder.name}" in run.err

    def test_ray_train__rank_killed__fails_with_one_message(self, disturbed: dict[str, Execution]) -> None:
        run = disturbed["rank killed"]
        assert (run.code, run.status) == (4, "failed"), run.err
        (message,) = [line for line in run.err.splitlines() if line.startswith("error:")]
        assert "worker" in message
        assert str(run.folder.name) in message  # where the logs are
        assert "Traceback" not in run.err

    def test_driver__killed__is_reported(self, disturbed: dict[str, Execution]) -> None:
        run = disturbed["driver killed"]
        assert (run.code, run.status) == (4, "died"), run.err
        assert "error: the driver of the run died without recording why; its log is" in run.err
        assert "resume: forge train --resume" in run.err

    @pytest.mark.parametrize("which", ["interrupted", "rank killed", "driver killed", "finished"])
    def test_processes__after_the_end__none_left(self, disturbed: dict[str, Execution], which: str) -> None:
        assert len(disturbed[which].processes) > 5
        assert disturbed[which].left == []

    def test_losses__interrupted_and_resumed__equal_the_undisturbed_run_bit_for_bit(
        self, disturbed: dict[str, Execution], whole: Execution
    ) -> None:
        run = disturbed["finished"]
        assert (run.code, run.status) == (0, "finished"), run.err
        assert [record["step"] for record in read_metrics(run.folder)] == list(range(1, TOTAL_STEPS + 1))
        assert losses(run.folder) == losses(whole.folder)

    def test_trackers__interrupted_and_resumed__every_step_once(self, disturbed: dict[str, Execution]) -> None:
        folder, steps = disturbed["finished"].folder, Counter(range(1, TOTAL_STEPS + 1))
        files = log_files(folder, run_id=folder.name)
        assert 2 <= len(files) <= 4, "a killed start may have left none"
        assert Counter(row["step"] for path in files for row in read_history(path)) == steps
        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
        assert Counter(event.step for event in events.Scalars("train/loss")) == steps
        client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
        (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
        assert Counter(value.step for value in client.get_metric_history(run.info.run_id, "train/loss")) == steps
        assert run.info.status == "FINISHED" and "worker" in run.data.tags["forge.events"]

    def test_repeated_steps__after_resuming__have_the_same_losses(
        self, disturbed: dict[str, Execution], whole: Execution
    ) -> None:
        repeated = [
            event for event in read_run(disturbed["finished"].folder).events if event["event"] == "StepRepeated"
        ]
        assert len(repeated) < 2 * 50
        expected = losses(whole.folder)
        assert [event["loss"] for event in repeated] == [expected[event["step"] - 1] for event in repeated]


class TestFromPython:
    @pytest.fixture(autouse=True)
    def _at_home(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(home)
        for name, value in environment(home).items():
            monkeypatch.setenv(name, value)

    @pytest.mark.slow
    def test_train_job__small_job__finishes_and_reports_records(self) -> None:
        job = forge.load_job(
            "job.yaml",
            [
                "training.total_steps=6",
                "checkpoint.to=python",
                "resources.workers=1",
                "tracking.wandb.mode=online",
            ],
        )
        records: list[dict[str, Any]] = []
        run = forge.train_job(job, on_record=records.append)
        assert (run.status, run.step) == ("finished", 6)
        assert [record["step"] for record in records if "event" not in record] == [1, 2, 3, 4, 5, 6]
        assert [record["event"] for record in records if "event" in record][-1] == "RunFinished"
        degraded = run.newest("TrackingDegraded")  # online, but there is no key
        assert degraded is not None
        assert "WANDB_API_KEY" in degraded["reason"]

    @pytest.mark.slow
    def test_train_job__loss_not_finite__raises_and_names_the_step(self) -> None:
        job = forge.load_job(
            "job.yaml",
            [
                "training.optimizer={lr: 1.0e+30, grad_clip: 0}",
                "training.schedule={kind: constant}",
                "checkpoint.to=spoilt",
                "tracking.wandb.mode=disabled",
            ],
        )
        with pytest.raises(RunError, match=r"step \d+: the loss is .*Lower training\.optimizer\.lr"):
            forge.train_job(job)
        assert not mentioning("/spoilt/")
