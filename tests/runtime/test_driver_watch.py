"""What ends a run from outside: its folder is removed, or Ray's memory monitor kills its processes."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from forge.events import KilledForMemory
from forge.process import start_ticks
from forge.runs.lock import driver_pid
from forge.runs.reader import read_run
from forge.runtime.driver_process import LocalRun
from forge.runtime.memory_watch import MAX_ROUNDS, QUIET_S, DeadWorker, MemoryWatch, describe_kill
from tests.support.command import environment, family, start_forge, survivors, wait_for

JOB = """\
name: watched
model: {architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
data: {files: "corpus/*.txt", seq_len: 32, tokenizer: {vocab_size: 300}, held_out: 0}
training: {total_steps: 100000, global_batch_size: 4, optimizer: {lr: 1.0e-2}}
resources: {workers: 1, gpu: none}
tracking: {wandb: {mode: disabled}}
"""
DETAIL = """\
2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: 00fc) was \
3.38GB used / 23.54GB limit (0.143518)
OOM kill reason: Memory usage 3627954176B exceeded threshold of 505530208B (2.0% of 25276510208B limit)
Ray killed 2 worker(s) based on the killing policy
Considered workers: [
Selected to kill: (Actor(ffe6): job ID=01000000, lease ID=0100, task name=recorder-tiny-1:RecorderActor.__init__, \
required resources={node:__internal_head__: 0.001}, pid=28552, actual memory used=0.04GB, worker ID=d39f)
Selected to kill: (Actor(e43b): lease ID=0000, task name=agent-tiny-1-00fc-42:AgentActor.__init__, req\
uired resources={}, pid=28551, actual memory used=0.04GB, worker ID=fd09)
"""
"""Ray 2.60's text about a kill, without the statistics of its object store."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("the cat sat on a mat and saw one dog run past. " * 400)
    return tmp_path


def dead(worker_id: str, *, detail: str = DETAIL) -> DeadWorker:
    return DeadWorker(worker_id=worker_id, host="192.0.2.2", detail=detail)


def test_describe_kill__actors_of_the_run__says_which_and_how_much_memory() -> None:
    assert describe_kill(dead("fd09"), run_id="tiny-1") == KilledForMemory(
        process="agent", node="00fc-42", host="192.0.2.2", pid=28551, used_gib=3.38, limit_gib=23.54
    )
    recorder = describe_kill(dead("d39f"), run_id="tiny-1")
    assert recorder is not None and (recorder.process, recorder.node) == ("recorder", "")


@pytest.mark.parametrize(("worker_id", "run_id"), [("fd09", "tiny"), ("fd09", "tiny-12"), ("0000", "tiny-1")])
def test_describe_kill__of_another_run_or_program__is_none(worker_id: str, run_id: str) -> None:
    killed = describe_kill(dead(worker_id), run_id=run_id)
    assert killed is None or killed.node == "1-00fc-42"  # `tiny-1` may be the node 1 of the run `tiny`


class TestMemoryWatch:
    @pytest.fixture(autouse=True)
    def watch(self) -> None:
        self.dead: list[DeadWorker] = []
        self.now, self.steps = 0.0, 0
        self.memory = MemoryWatch(
            "tiny-1", read=lambda: self.dead, num_steps=lambda: self.steps, clock=lambda: self.now
        )

    def kill(self, *, after_s: float, steps: int) -> None:
        self.now, self.steps = self.now + after_s, self.steps + steps
        worker_id = f"{len(self.dead):04x}"
        self.dead.append(dead(worker_id, detail=DETAIL.replace("fd09", worker_id)))
        assert len(self.memory.look()) == 1
        assert self.memory.look() == []

    def test_kills_in_a_row__without_steps__end_the_run(self) -> None:
        for _ in range(MAX_ROUNDS - 1):
            self.kill(after_s=2 * QUIET_S, steps=0)
        assert not self.memory.is_over
        self.kill(after_s=2 * QUIET_S, steps=0)
        assert self.memory.is_over

    def test_kills_in_a_row__fast_steps_between_them__end_the_run(self) -> None:
        for _ in range(MAX_ROUNDS):
            self.kill(after_s=QUIET_S / 2, steps=1000)
        assert self.memory.is_over

    def test_kills__far_apart_with_progress__never_end_the_run(self) -> None:
        for _ in range(5 * MAX_ROUNDS):
            self.kill(after_s=2 * QUIET_S, steps=1)
            assert not self.memory.is_over

    def test_kills__of_one_moment__are_one_round(self) -> None:
        for _ in range(5 * MAX_ROUNDS):
            self.kill(after_s=0.0, steps=0)
        assert not self.memory.is_over


@pytest.mark.slow
def test_train__memory_monitor_kills_all_the_time__ends_with_the_reason(home: Path) -> None:
    # Below the memory that any machine uses, so Ray kills each worker as soon as it sees it.
    env = environment(home, RAY_memory_usage_threshold="0.005")
    client = start_forge("train", "job.yaml", cwd=home, env=env)
    _, err = client.communicate(timeout=120)
    assert client.returncode == 4, err
    assert f"Ray's memory monitor killed processes of this run {MAX_ROUNDS} times in a row" in err
    (folder,) = (home / "runs").iterdir()
    run = read_run(folder)
    assert run.status == "failed"
    kills = [event for event in run.events if event["event"] == "KilledForMemory"]
    assert len(kills) >= MAX_ROUNDS
    assert 0 < kills[0]["used_gib"] < kills[0]["limit_gib"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["forming", "training"])
def test_train__run_folder_removed__ends_within_seconds_and_says_so(home: Path, moment: str) -> None:
    client = start_forge("train", "job.yaml", cwd=home)
    folder = wait_for(lambda: client.poll() or next(home.glob("runs/*/events.jsonl"), None)).parent
    if moment == "training":
        wait_for(lambda: (folder / "metrics.jsonl").exists() and read_run(folder).step > 2)
    driver = driver_pid(folder)
    assert driver is not None
    processes = [psutil.Process(driver), *family(driver)]
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
    _, err = client.communicate(timeout=40)
    assert client.returncode == 4, err
    assert f"the run folder {folder.relative_to(home)} was removed or moved while the run was in progress" in err
    assert survivors(processes) == []


def test_request_stop__run_folder_removed__still_signals_the_driver(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as driver:
        LocalRun(folder=tmp_path / "gone", pid=driver.pid).request_stop()  # it may be any process
        with pytest.raises(subprocess.TimeoutExpired):
            driver.wait(timeout=0.2)
        LocalRun(folder=tmp_path / "gone", pid=driver.pid, started_at=start_ticks(driver.pid)).request_stop()
        assert driver.wait(timeout=10) == -signal.SIGTERM
