"""Alerts of a recorder: to a real server, at a bounded rate, across failures and kills."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import wandb

from forge.config.alerts import AlertsSpec
from forge.events import MembershipChangeStarted, RunFailed, RunFinished, RunStarted
from forge.plan.plan import Plan
from forge.runs.alerts import delivery, run_alerts
from forge.runs.alerts.delivery import AlertDelivery
from forge.runs.alerts.detect import Alert
from forge.runs.alerts.receivers import AlertMessage
from forge.runs.recorder import Recorder
from forge.runs.trackers.wandb_log import log_files, read_log
from tests.support.jobs import tiny_plan
from tests.support.price_server import Answer, serve_prices
from tests.support.runs import metrics, open_recorder

_WAIT_S = 20.0


def plan_with(**alerts: Any) -> Plan:
    plan = tiny_plan()
    job = plan.job.model_copy(update={"alerts": AlertsSpec.model_validate(alerts)})
    return dataclasses.replace(plan, job=job)


class Hook:
    """A webhook on loopback, and the texts that it was sent."""

    def __init__(self, *answers: int) -> None:
        self._answers = list(answers)
        """Statuses of the first requests; then 200."""
        self.texts: list[str] = []
        self.pause_s = 0.0
        self.url = ""

    def reply(self, _: str, __: dict[str, str], body: bytes) -> Answer:
        time.sleep(self.pause_s)
        status = self._answers.pop(0) if self._answers else 200
        if status == 200:
            self.texts.append(json.loads(body)["text"])
        return status, {}, b""


@contextmanager
def hook(*answers: int) -> Iterator[Hook]:
    found = Hook(*answers)
    with serve_prices(found.reply) as server:
        found.url = server.url
        yield found


@contextmanager
def recorder_of(folder: Path, plan: Plan, **trackers: Any) -> Iterator[Recorder]:
    recorder = open_recorder(folder, **trackers)
    recorder.start_alerts(plan)
    yield recorder
    recorder.close(exit_code=0)


def events_of(folder: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == name]


def until(is_true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def loss_of(node: str) -> MembershipChangeStarted:
    return MembershipChangeStarted(generation=1, cause="loss", reason=f"node {node} lost", seconds_since_cause=0.0)


_STARTED = RunStarted(run_id="tiny-1", total_steps=6, resumed_from_step=0)


def test_storm_of_preemptions__is_one_message_and_one_with_their_number(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-1"
    with hook() as received, recorder_of(folder, plan_with(webhook=received.url)) as recorder:
        recorder.event(_STARTED)
        recorder.event(loss_of("n0"))
        until(lambda: received.texts)
        for number in range(1, 501):
            recorder.event(loss_of(f"n{number}"))
        recorder.event(RunFinished(step=0))
        recorder.close(exit_code=0)
        first, *rest = received.texts
    assert first == "tiny-1: node n0 lost"
    storm, finished = sorted(rest, key=lambda text: "finished" in text)
    assert storm.startswith("tiny-1: 500 times in ") and storm.endswith("the last: node n500 lost")
    assert finished == "tiny-1: finished"
    counts = {(event["kind"], event["count"]) for event in events_of(folder, "AlertSent")}
    assert counts == {("preempted", 1), ("preempted", 500), ("finished", 1)}


def test_run_that_goes_on__is_not_sent_old_alerts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tiny-1"
    with hook() as received:
        plan = plan_with(webhook=received.url)
        for number in range(3):
            with recorder_of(folder, plan) as recorder:
                recorder.event(_STARTED)
                recorder.step(metrics(number + 1))
                if number == 0:
                    recorder.event(loss_of("a"))
                    recorder.event(RunFailed(error="RunError", message="secret text of the corpus"))
        assert sorted(received.texts) == [
            "tiny-1: failed after step 1: RunError",
            "tiny-1: node a lost after step 1",
        ]
        # What was recorded and never sent, because everything was killed, is sent later, unless it is old.
        recorder = open_recorder(folder)
        recorder.event(loss_of("b"))
        recorder.close(exit_code=0)
        with monkeypatch.context() as patch:
            patch.setattr(run_alerts, "MAX_AGE_S", -1.0)
            with recorder_of(folder, plan):
                pass
        assert len(received.texts) == 2
        for _ in range(2):
            with recorder_of(folder, plan):
                pass
        assert received.texts[2:] == ["tiny-1: node b lost after step 3"]


def test_slow_server__delays_no_record_and_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_alerts.RunAlerts.close, "__kwdefaults__", {"timeout_s": 0.5})
    folder = tmp_path / "tiny-1"
    with hook() as received, recorder_of(folder, plan_with(webhook=received.url)) as recorder:
        received.pause_s = 3.0
        recorder.event(loss_of("a"))
        began = time.monotonic()
        for step in range(1, 101):
            recorder.step(metrics(step))
        assert time.monotonic() - began < 1.0
        recorder.event(RunFinished(step=100))
        recorder.close(exit_code=0)
        assert time.monotonic() - began < 2.5
    failed = events_of(folder, "AlertNotSent")
    assert {event["kind"] for event in failed} == {"preempted", "finished"}
    assert {event["reason"] for event in failed} == {"it took too long when the run ended"}


def test_server_that_fails_twice__gets_the_message_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AlertDelivery.__init__, "__kwdefaults__", {"pause_s": 600.0, "retry_s": (0.02, 0.02)})
    with hook(500, 503) as received, recorder_of(tmp_path / "tiny-1", plan_with(webhook=received.url)) as recorder:
        recorder.event(loss_of("a"))
        until(lambda: received.texts)
    assert received.texts == ["tiny-1: node a lost"]
    assert not events_of(tmp_path / "tiny-1", "AlertNotSent")


def test_message_that_cannot_be_sent__is_one_event_without_address_or_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "hidden-value-123")
    folder = tmp_path / "tiny-1"
    with hook(404, 404) as received:
        plan = plan_with(webhook=f"{received.url}/s3cr3tpath", command=["/bin/false"], on=["preempted"])
        monkeypatch.setattr(AlertDelivery.__init__, "__kwdefaults__", {"pause_s": 600.0, "retry_s": ()})
        for _ in range(2):  # the second start does not try again
            with recorder_of(folder, plan) as recorder:
                if not events_of(folder, "AlertNotSent"):
                    recorder.event(loss_of("hidden-value-123"))
    failed = events_of(folder, "AlertNotSent")
    assert {event["receiver"]: event["reason"] for event in failed} == {
        "webhook": "127.0.0.1 answered with status 404",
        "command": "false ended with exit status 1",
    }
    assert len(failed) == 2 and not received.texts
    assert {event["text"] for event in failed} == {"tiny-1: node *** lost"}
    assert "s3cr3tpath" not in (folder / "events.jsonl").read_text()


def test_killed_recorder__sends_what_the_event_does_not_say_was_sent(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-1"
    with hook() as received:
        received.pause_s = 1.5
        code = (
            "import sys, time; from pathlib import Path; from tests.runs.alerts.test_run_alerts import *; "
            "recorder = open_recorder(Path(sys.argv[1])); recorder.start_alerts(plan_with(webhook=sys.argv[2])); "
            "recorder.event(loss_of('a')); print('recorded', flush=True); time.sleep(60)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder), received.url], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "recorded\n"
        os.kill(process.pid, signal.SIGKILL)  # before the answer
        process.wait()
        process.stdout.close()
        assert not events_of(folder, "AlertSent")
        received.pause_s = 0.0
        with recorder_of(folder, plan_with(webhook=received.url)):
            until(lambda: events_of(folder, "AlertSent"))
    assert set(received.texts) == {"tiny-1: node a lost"}  # once, or twice if the request was complete


@pytest.mark.slow
def test_wandb_alert__is_in_the_file_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    folder = tmp_path / "tiny-1"
    with recorder_of(folder, plan_with(wandb=True), mode="offline") as recorder:
        recorder.step(metrics(1))
        recorder.event(loss_of("a"))
        recorder.event(RunFailed(error="RunError", message="x"))
    (path,) = log_files(folder, run_id="tiny-1")
    alerts = [record.message().alert for record in read_log(path) if record.message().HasField("alert")]
    assert [(alert.title, alert.text, alert.level) for alert in alerts] == [
        ("preempted", "tiny-1: node a lost after step 1", "WARN"),
        ("failed", "tiny-1: failed after step 1: RunError", "ERROR"),
    ]
    assert len(events_of(folder, "AlertSent")) == 2


class _Receiver:
    name = "fake"

    def __init__(self) -> None:
        self.messages: list[AlertMessage] = []

    def send(self, message: AlertMessage) -> None:
        self.messages.append(message)


@pytest.mark.parametrize(("kind", "is_sent"), [("preempted", False), ("finished", True)])
def test_delivery__after_a_restart__keeps_the_pause_of_repeated_kinds(kind: Any, is_sent: bool) -> None:
    receiver = _Receiver()
    sender = AlertDelivery(receiver, run_id="r", record=lambda _: None, sent_at={kind: time.time() - 1})
    sender.post(Alert(kind=kind, text="x", step=1, at=2.0))
    if is_sent:
        until(lambda: receiver.messages)
    else:
        time.sleep(0.2)
    assert bool(receiver.messages) == is_sent
    sender.begin_end(timeout_s=5.0)
    sender.wait_for_end()
    assert len(receiver.messages) == 1
    assert delivery.PAUSE_S == 600.0
