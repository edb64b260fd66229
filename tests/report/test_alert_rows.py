"""The alerts of a run as a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from forge.config.alerts import AlertsSpec
from forge.events import AlertNotSent, AlertSent, event_to_record
from forge.plan.plan import plan_to_json
from forge.report.alert_rows import AlertTable
from forge.report.run_report import write_run_report
from forge.ui.run_view import RunView
from tests.support.jobs import tiny_plan
from tests.support.pages import Elements, own_text
from tests.support.runs import History


def sent(receiver: str, text: str, *, at: float | None = 0.0, reason: str | None = None) -> dict[str, Any]:
    about: dict[str, Any] = {
        "receiver": receiver,
        "kind": "preempted",
        "text": f"r: {text}",
        "count": 1,
        "until": at,
    }
    event = AlertSent(**about) if reason is None else AlertNotSent(**about, reason=reason)
    return {"time": 5.0} | event_to_record(event)


def test_rows__several_receivers__are_one_row_with_each_outcome() -> None:
    table = AlertTable(
        [
            sent("webhook", "node a lost", at=86400.0),
            sent("W&B", "node a lost", at=86400.0),
            sent("command", "node a lost", at=86400.0, reason="page ended with exit status 1"),
            sent("webhook", "node b lost", at=None, reason="x" * 1000),
        ],
        run_id="r",
    )
    rows = table.rows(limit=10)
    outcome = "delivered to webhook, W&B; command: not delivered, page ended with exit status 1"
    assert rows["0"] == ["1970-01-02 00:00:00 UTC", "preempted", "node a lost", outcome]
    assert rows["1"][0] == "-" and len(rows["1"][3]) <= 300
    assert list(table.rows(limit=1)) == ["1"]


def test_rows__very_many_alerts__keep_the_newest_with_their_numbers() -> None:
    table = AlertTable((sent("webhook", f"{number}", at=float(number)) for number in range(1500)), run_id="r")
    assert table.num_alerts == 1500
    assert {number: row[2] for number, row in table.rows(limit=2).items()} == {"1498": "1498", "1499": "1499"}


def with_alerts(folder: Path) -> Path:
    plan = tiny_plan()
    alerts = AlertsSpec.model_validate({"webhook": "http://127.0.0.1:9/s3cr3tpath"})
    job = plan.job.model_copy(update={"alerts": alerts})
    (folder / "plan.json").write_text(plan_to_json(replace(plan, job=job)))
    return folder


def test_report_and_page__job_with_alerts__show_receivers_and_each_alert(tmp_path: Path) -> None:
    history = History()
    history.start()
    page = own_text(write_run_report(with_alerts(history.write(tmp_path, "quiet"))))
    assert "To webhook of 127.0.0.1: " in page and "None so far." in page and "s3cr3tpath" not in page
    history.events.append(sent("webhook", "node a lost", reason="status 404"))
    folder = with_alerts(history.write(tmp_path, "r"))
    assert RunView(folder).state()["alerts"] == {
        "0": ["1970-01-01 00:00:00 UTC", "preempted", "node a lost", "webhook: not delivered, status 404"]
    }
    text = Elements(own_text(write_run_report(folder))).text
    assert "webhook: not delivered, status 404" in text and "None so far" not in " ".join(text)
