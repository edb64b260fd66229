"""`alerts:` in a job file: what is accepted, what is refused, and that an address is in no file and no message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge.config.dump import dump_job
from forge.config.load import LoadedJob, load_job
from forge.config.overrides import trial_job
from forge.errors import JobFileError, UserCodeError
from forge.plan.plan import plan_from_json, plan_to_json
from forge.report.alerts_text import alert_facts
from forge.runs.alerts.check_command import command_digest, require_command
from tests.support.jobs import tiny_plan

_JOB = """\
name: small
model: {architecture: llama}
data: {source: python-stdlib, seq_len: 64}
training: {total_steps: 10}
"""
_SECRET = "https://hooks.example.com/services/T000/B000/s3cr3tpath"


def load(folder: Path, alerts: str) -> LoadedJob:
    path = folder / "job.yaml"
    path.write_text(f"{_JOB}{alerts}\n")
    return load_job(path)


def refused(folder: Path, alerts: str) -> JobFileError:
    with pytest.raises(JobFileError) as error:
        load(folder, alerts)
    return error.value


def plan_of(loaded: LoadedJob) -> Any:
    import dataclasses

    plan = tiny_plan()
    job = plan.job.model_copy(update={"alerts": loaded.job.alerts, "tracking": loaded.job.tracking})
    return dataclasses.replace(plan, job=job, templates=loaded.templates)


def test_webhook__of_the_environment__in_no_file_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALERT_URL", _SECRET)
    loaded = load(tmp_path, 'alerts: {webhook: "${env:ALERT_URL}"}')
    assert loaded.job.alerts is not None and loaded.job.alerts.webhook == _SECRET
    plan = plan_of(loaded)
    written = [dump_job(loaded.job, templates=loaded.templates), plan_to_json(plan, is_file=True)]
    for text in [*written, str(alert_facts(plan))]:
        assert "${env:ALERT_URL}" in text and "s3cr3tpath" not in text


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/s3cr3tpath",
        "ftp://hooks.example.com/s3cr3tpath",
        "https:///s3cr3tpath",
        "https://hooks.example.com:port/s3cr3tpath",
        "https://[::1/s3cr3tpath",
        "https://me:s3cr3tpath@hooks.example.com/x",
        "https://hooks.example.com/s3cr3tpath\r\nHost: evil",
        "s3cr3tpath",
    ],
)
def test_webhook__not_an_https_url__is_refused_without_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("ALERT_URL", url)
    error = refused(tmp_path, 'alerts:\n  webhook: "${env:ALERT_URL}"')
    assert (error.key, error.line) == ("alerts.webhook", 6)
    assert "s3cr3tpath" not in str(error)


def test_webhook__written_into_the_file__is_refused_but_for_loopback(tmp_path: Path) -> None:
    error = refused(tmp_path, f"alerts:\n  webhook: {_SECRET}")
    assert error.line == 6 and "${env:ALERT_URL}" in str(error) and "s3cr3tpath" not in str(error)
    assert "s3cr3tpath" not in str(refused(tmp_path, f"alerts: {{webhook: [{_SECRET}]}}"))
    for host in ("127.0.0.1:9", "localhost:9", "[::1]:9"):
        assert load(tmp_path, f'alerts: {{webhook: "http://{host}/x"}}').job.alerts is not None
    problem = refused(tmp_path, 'alerts: {webhook: "${env:NOT_SET_ANYWHERE}"}').problem
    assert "NOT_SET_ANYWHERE is not set" in problem


@pytest.mark.parametrize(
    ("alerts", "key", "problem", "nearest"),
    [
        ("alerts: {}", "alerts", "names no receiver", None),
        ("alerts: {on: [nan]}", "alerts", "names no receiver", None),
        ("alerts: {webhok: x}", "alerts.webhok", "", "webhook"),
        ("alerts: {wandb: true, on: [loss-spike]}", "alerts.on", "'loss-spike'", "loss_spike"),
        ("alerts: {wandb: true, on: [preemption]}", "alerts.on", "must be a list of", "preempted"),
        ("alerts: {wandb: true, on: []}", "alerts.on", "is empty", None),
        ("alerts: {wandb: 1}", "alerts.wandb", "must be true or false", None),
        ("alerts: {command: []}", "alerts.command", "must be a program", None),
        ("alerts: {command: [1]}", "alerts.command[0]", "must be text", None),
        ("alerts: {command: notify-send forge}", "alerts.command", "must be a list", None),
        ("alerts: {command: [./page]}", "alerts.command", "absolute path", None),
        ("alerts: {wandb: true, on: [budget]}", "alerts.on", "resources.max_usd", None),
        (
            "alerts: {wandb: true}\ntracking: {wandb: {mode: disabled}}",
            "alerts.wandb",
            "tracking.wandb.mode is disabled",
            None,
        ),
        ("alerts: {wandb: true, on: [late]}", "alerts.on", "set resources.deadline or resources.max_hours", None),
        (
            "alerts: {wandb: true, on: [late]}\nresources: {engine: ray-train, max_hours: 3}",
            "alerts.on",
            "requires engine: elastic",
            None,
        ),
        (
            "alerts: {wandb: true, on: [preempted]}\nresources: {engine: ray-train}",
            "alerts.on",
            "requires engine: elastic",
            None,
        ),
        (
            "alerts: {wandb: true, on: [budget]}\nsearch: {space: {training.optimizer.lr: {uniform: [0.1, 0.2]}}}",
            "alerts.on",
            "set search.max_usd",
            None,
        ),
        (
            "alerts: {wandb: true, on: [nan]}\nsearch: {space: {training.optimizer.lr: {uniform: [0.1, 0.2]}}}",
            "alerts.on",
            "for single runs",
            None,
        ),
    ],
)
def test_alerts__that_cannot_be__are_refused_with_their_line(
    tmp_path: Path, alerts: str, key: str, problem: str, nearest: str | None
) -> None:
    error = refused(tmp_path, alerts)
    assert (error.key, error.line, error.nearest) == (key, 5, nearest)
    assert problem in str(error)


def test_plan__with_alerts__lists_receivers_and_the_kinds_that_can_occur(tmp_path: Path) -> None:
    alerts = "alerts: {wandb: true, command: [/bin/cat], webhook: 'http://127.0.0.1:9/s3cr3tpath'}"
    loaded = load(tmp_path, f"{alerts}\ntracking: {{wandb: {{mode: online}}}}")
    ((name, text),) = alert_facts(plan_of(loaded))
    assert name == "alerts"
    assert text == (
        "webhook of 127.0.0.1, command /bin/cat, W&B: loss_spike, nan, stalled, preempted, finished, failed"
    )


def test_plan__with_wandb_alerts_of_an_offline_run__says_that_none_is_sent_before_the_upload(
    tmp_path: Path,
) -> None:
    ((_, text),) = alert_facts(plan_of(load(tmp_path, "alerts: {wandb: true}")))
    assert text.startswith("W&B, offline: none before wandb sync; tracking.wandb.mode: online sends them at once: ")


def test_plan__with_alerts_of_every_kind_and_no_budget__is_read_back(tmp_path: Path) -> None:
    plan = plan_of(load(tmp_path, "alerts: {command: [/bin/cat]}"))
    assert plan_from_json(plan_to_json(plan)).job.alerts == plan.job.alerts


def test_alerts__of_a_search__are_those_of_its_cost_and_not_of_its_trials(tmp_path: Path) -> None:
    search = "search: {max_usd: 5, space: {training.optimizer.lr: {uniform: [0.1, 0.2]}}}"
    job = load(tmp_path, f"alerts: {{command: [/bin/cat], on: [budget]}}\n{search}\nresources: {{max_usd: 7}}").job
    assert job.alerts is not None and job.alerts.kinds(is_search=True) == {"budget"}
    assert job.usd_limit == ("search.max_usd", 5)
    values = {"training.optimizer.lr": 0.1}
    best = trial_job(job, values, is_proxied=False)
    assert best.alerts == job.alerts and best.usd_limit == ("resources.max_usd", 7)
    assert trial_job(job, values).alerts is None
    alone = load(tmp_path, f"alerts: {{command: [/bin/cat], on: [budget]}}\n{search}").job
    best = trial_job(alone, values, is_proxied=False)
    assert best.alerts is not None and best.alerts.on == ("finished", "failed")


def test_command__that_a_run_folder_brings__needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    loaded = load(tmp_path, "alerts: {command: [/bin/cat, x]}")
    with pytest.raises(UserCodeError, match=command_digest(("/bin/cat", "x"))):
        require_command(loaded, resume=tmp_path, is_local=True)
    monkeypatch.setenv("FORGE_TRUST_CODE", command_digest(("/bin/cat", "x")))
    require_command(loaded, resume=tmp_path, is_local=True)
    monkeypatch.delenv("FORGE_TRUST_CODE")
    require_command(loaded, resume=tmp_path, is_local=True)  # it was used before
    with pytest.raises(UserCodeError):
        require_command(load(tmp_path, "alerts: {command: [/bin/cat, y]}"), resume=tmp_path, is_local=True)


def test_command__without_its_program__is_refused_on_this_machine_only(tmp_path: Path) -> None:
    loaded = load(tmp_path, "alerts: {command: [/no/such/program]}")
    require_command(loaded, resume=None, is_local=False)
    with pytest.raises(JobFileError, match="no program of this machine"):
        require_command(loaded, resume=None, is_local=True)
