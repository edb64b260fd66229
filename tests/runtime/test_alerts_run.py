"""Alerts of a real run: receivers get them, no file has their address, and those of a lost recorder are sent."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from forge.config.alerts import AlertsSpec
from forge.errors import RunError
from forge.plan.plan import plan_from_json
from forge.runs.reader import read_plan
from forge.runs.trials import trial_folder
from forge.runtime.driver import Driver
from tests.support.command import environment, forge
from tests.support.pages import own_text
from tests.support.price_server import Answer, serve_prices
from tests.support.runs import make_run

_USD_PER_HOUR = 1440
"""Its budget is spent 10 s after the agent has joined: enough for its imports and the first steps."""
_JOB = """\
name: alerts
model: {architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
data: {files: "corpus/*.txt", seq_len: 32, tokenizer: {vocab_size: 300}, held_out: 0}
training: {total_steps: 100000, global_batch_size: 4, optimizer: {lr: 1.0e-2}}
resources: {workers: 1, gpu: none, max_usd: 4}
tracking: {wandb: {mode: disabled}}
alerts: {webhook: "${env:ALERT_URL}", command: [COMMAND]}
"""


@pytest.mark.slow
def test_forge_train__with_alerts__sends_them_and_writes_no_address(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("the cat sat on a mat and saw one dog run past. " * 400)
    page = tmp_path / "page"
    page.write_text(f"#!/bin/sh\ncat >> {tmp_path / 'pages.jsonl'}\n")
    page.chmod(0o755)
    (tmp_path / "job.yaml").write_text(_JOB.replace("COMMAND", str(page)))
    bodies: list[bytes] = []

    def reply(_: str, __: dict[str, str], body: bytes) -> Answer:
        bodies.append(body)
        return 200, {}, b"ok"

    with serve_prices(reply) as server:
        variables = {"ALERT_URL": f"{server.url}/s3cr3tpath", "FORGE_USD_PER_HOUR": str(_USD_PER_HOUR)}
        env = environment(tmp_path, **variables)
        planned = forge("plan", "job.yaml", cwd=tmp_path, env=env)
        done = forge("train", "job.yaml", "-o", "json", cwd=tmp_path, env=env)
    assert f"webhook ${{env:ALERT_URL}}, command {str(tmp_path)[:20]}" in " ".join(planned.stdout.split())
    assert done.returncode == 4, done.stderr
    run = json.loads(done.stdout)
    texts = [json.loads(body)["text"] for body in bodies]
    name = Path(run["folder"]).name
    assert any(text.startswith(f"{name}: the run has cost 4.") and "100%" in text for text in texts)
    assert any(text.startswith(f"{name}: stopped") and "it has cost 4." in text for text in texts), texts
    paged = [json.loads(line) for line in (tmp_path / "pages.jsonl").read_text().splitlines()]
    assert sorted(message["text"] for message in paged) == sorted(texts)
    folder = tmp_path / run["folder"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    sent = [(event["receiver"], event["kind"]) for event in events if event["event"] == "AlertSent"]
    assert sorted(sent) == sorted((one, kind) for one in ("webhook", "command") for kind in ("budget", "finished"))
    for output in (planned.stdout, planned.stderr, done.stdout, done.stderr):
        assert "s3cr3tpath" not in output
    for path in folder.rglob("*"):
        assert not path.is_file() or b"s3cr3tpath" not in path.read_bytes(), path


@pytest.mark.slow
def test_forge_tune__at_its_cost_limit__sends_the_alerts_of_the_search(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("the cat sat on a mat and saw one dog run past. " * 400)
    page = tmp_path / "page"
    page.write_text(f"#!/bin/sh\ncat >> {tmp_path / 'pages.jsonl'}\n")
    page.chmod(0o755)
    job = _JOB.replace("held_out: 0", "held_out: 5%").replace(", max_usd: 4", "").replace("COMMAND", str(page))
    job = job.replace('webhook: "${env:ALERT_URL}", ', "").replace("1.0e-2}", "1.0e-2}, evaluate_every: 1000 steps")
    space = "{training.optimizer.lr: {choice: [0.01, 0.02]}}"
    search = f"search: {{max_usd: 8, max_trials: 2, trials_at_once: 1, space: {space}}}"
    (tmp_path / "job.yaml").write_text(f"{job}{search}\n")
    env = environment(tmp_path, FORGE_USD_PER_HOUR=str(_USD_PER_HOUR))
    done = forge("tune", "job.yaml", "-o", "json", cwd=tmp_path, env=env)
    assert done.returncode == 4, done.stderr
    paged = [json.loads(line) for line in (tmp_path / "pages.jsonl").read_text().splitlines()]
    assert {message["kind"] for message in paged} == {"budget", "finished"}
    texts = [message["text"] for message in paged if message["kind"] == "budget"]
    assert "the search has cost" in texts[-1] and "100% of search.max_usd (8.00 USD)" in texts[-1]
    folder = next((tmp_path / "runs").iterdir())
    assert "delivered to command" in own_text(folder / "report.html")
    assert read_plan(Path(trial_folder(str(folder), 1))).job.alerts is None


def test_driver__without_a_recorder__sends_the_failure_itself(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    bodies: list[bytes] = []

    def reply(_: str, __: dict[str, str], body: bytes) -> Answer:
        bodies.append(body)
        return 200, {}, b"ok"

    with serve_prices(reply) as server:
        driver = Driver(folder, address=None)
        plan = plan_from_json((folder / "plan.json").read_text())
        alerts = AlertsSpec.model_validate({"webhook": server.url})
        driver._plan = dataclasses.replace(plan, job=plan.job.model_copy(update={"alerts": alerts}))
        driver._fail(RunError("lost the recorder: 'text of a customer'"))
    assert [json.loads(body)["text"] for body in bodies] == [f"{folder.name}: failed after step 3: RunError"]
    last = json.loads((folder / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["kind"]) == ("AlertSent", "failed")
