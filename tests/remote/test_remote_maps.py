"""`forge eval` and `forge generate` on a cluster that shares no files with this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from forge.evaluate.answer_map import answer
from forge.evaluate.run import EvaluationRequest, evaluate
from forge.fs import state_home
from forge.runs.scores import read_scores
from forge.runtime.shard_process import ShardProcess
from forge.units import counted
from tests.support.command import environment, mentioning, wait_for
from tests.support.remote_client import Elsewhere
from tests.support.remote_map_client import request_of
from tests.support.serving import write_causal_lm

pytestmark = pytest.mark.timeout(900)
TASK = """\
name: river
data: {files: DATA}
kind: generate
prompt: question
target: answer
sampling: {max_tokens: 8}
metrics: {bleu: {}, exact_match: {}}
"""


class Recorded(ShardProcess):
    """A process of a test, with what it said."""

    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[dict[str, Any]] = []

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def take_signals(self) -> None:
        """Leave the handlers of the test's process alone."""

    def says(self, text: str) -> bool:
        return any(text in line.get("message", "") for line in self.lines)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_causal_lm(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def write_prompts(path: Path, count: int) -> Path:
    path.write_text(
        "".join(json.dumps({"prompt": f"the cat {number}", "id": number}) + "\n" for number in range(count))
    )
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_evaluate__remote_cluster__scores_as_here(cluster: Elsewhere, there: Path, model: Path, home: Path) -> None:
    data = home / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"train {n}", "answer": str(n)}) + "\n" for n in range(70)))
    tasks = [[str(home / "river.yaml"), TASK.replace("DATA", str(data))]]
    request = {"source": str(model), "tasks": tasks, "limit": 70}
    process = Recorded()
    far = EvaluationRequest(**request, cluster="elsewhere", folder=str(home / "far"))
    found = evaluate(far, process)
    assert process.says("sending tiny") and {"progress": [3, 3]} in process.lines
    again = Recorded()
    evaluate(far, again)
    assert again.says("3 of 3 shards answered before")
    os.environ["FORGE_CACHE"] = str(home / "other")  # restored by `monkeypatch`
    near = EvaluationRequest(**request, folder=str(home / "near"), address=cluster.status().address)
    local = evaluate(near, Recorded())
    assert _comparable(found["scores"]) == _comparable(local["scores"])
    [score] = read_scores(home / "far")
    assert (home / "far" / score.examples).read_text() == (home / "near" / score.examples).read_text()
    assert not list((there / ".forge" / "maps").iterdir()) and not list((state_home() / "maps").iterdir())


def _comparable(scores: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in score.items() if key != "time"} for score in scores]


@pytest.mark.slow
def test_answer__client_killed__next_one_follows_and_fetches(
    cluster: Elsewhere, there: Path, model: Path, home: Path
) -> None:
    prompts, output = write_prompts(home / "prompts.jsonl", 1500), home / "answers.jsonl"
    first = start_client(home, there, model, prompts, output)
    wait_for(lambda: num_results(there) >= 1, timeout_s=300)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not output.exists()
    [driver] = drivers(there)
    process = Recorded()
    found = answer(request_of(model, prompts, output), process)
    assert process.says("which was started on 'elsewhere' before") and not process.says("sending")
    assert found["num_answers"] == 1500 and [line["id"] for line in lines_of(output)] == list(range(1500))
    expected = home / "here.jsonl"
    few = request_of(model, write_prompts(home / "few.jsonl", 40), expected)
    answer(few | {"cluster": None, "address": cluster.status().address}, Recorded())
    assert lines_of(output)[:40] == lines_of(expected)
    assert driver not in drivers(there)


@pytest.mark.slow
def test_answer__stopped__continues_with_what_is_left(
    cluster: Elsewhere, there: Path, model: Path, home: Path
) -> None:
    num_shards = 40  # of 0.1 s; the stop reaches the driver within 3 s, by a command on the head
    prompts = write_prompts(home / "prompts.jsonl", num_shards * 256)
    output = home / "answers.jsonl"
    first = start_client(home, there, model, prompts, output)
    wait_for(lambda: num_results(there) >= 1, timeout_s=300)
    first.send_signal(signal.SIGTERM)  # as `forge generate` does at Ctrl-C
    text, _ = first.communicate(timeout=300)
    assert " left; start it again" in text
    wait_for(lambda: drivers(there) == [], timeout_s=240)
    stored = len(list((home / ".answers.jsonl.shards").glob("*.jsonl")))
    assert 1 <= stored < num_shards and f"{counted(num_shards - stored, 'shard')} left" in text
    found = answer(request_of(model, prompts, output), Recorded())
    assert found["num_reused"] == stored * 256
    assert [line["id"] for line in lines_of(output)] == list(range(num_shards * 256))


def start_client(home: Path, there: Path, model: Path, prompts: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.remote_map_client"]
    command += map(str, (home, there, model, prompts, output))
    env = environment(home, PYTHONPATH=str(Path(__file__).parents[2]))
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def drivers(there: Path) -> list[str]:
    """Command lines of this cluster's drivers of maps; other tests may run some too."""
    lines = mentioning("forge.runtime.map_driver")
    return [line for line in lines if str(there) in line and "setsid" not in line]


def num_results(there: Path) -> int:
    return len(list((there / ".forge" / "maps").glob("map-*/results/*.jsonl")))


@pytest.mark.slow
def test_answer__wrong_prompt__says_which_and_leaves_nothing(cluster: Elsewhere, model: Path, home: Path) -> None:
    (home / "prompts.jsonl").write_text('{"text": "a", "pair": "b"}\n')
    request = request_of(model, home / "prompts.jsonl", home / "answers.jsonl")
    with pytest.raises(Exception, match="prompt 1: a causal-lm model reads one text"):
        answer(request, Recorded())
    assert not list((state_home() / "maps").iterdir())
