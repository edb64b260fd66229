"""Describe the alerts of a job: who gets them, and what is worth one."""

from __future__ import annotations

from urllib.parse import urlsplit

from forge.config.alerts import ALERT_KINDS
from forge.errors import printable
from forge.plan.plan import DraftPlan

_MAX_CHARS = 60


def alert_facts(plan: DraftPlan) -> list[tuple[str, str]]:
    """Return one row; none if the job has no alerts. The address of a webhook is not shown."""
    alerts = plan.job.alerts
    if alerts is None:
        return []
    receivers = []
    if alerts.webhook is not None:
        address = plan.templates.get("/alerts/webhook") or f"of {urlsplit(alerts.webhook).hostname}"
        receivers.append(f"webhook {printable(address, limit=_MAX_CHARS)}")
    if alerts.command is not None:
        receivers.append(f"command {printable(' '.join(alerts.command), limit=_MAX_CHARS)}")
    if alerts.wandb:
        offline = ", offline: none before wandb sync; tracking.wandb.mode: online sends them at once"
        receivers.append(f"W&B{offline if plan.job.tracking.wandb.mode == 'offline' else ''}")
    kinds = set(alerts.kinds(is_search=plan.job.search is not None))
    kinds -= {"budget"} if plan.job.usd_limit is None else set()
    limits = (plan.job.resources.deadline, plan.job.resources.max_hours)
    kinds -= {"late"} if limits == (None, None) or plan.job.resources.engine != "elastic" else set()
    kinds -= {"preempted"} if plan.job.resources.engine != "elastic" else set()
    return [("alerts", f"{', '.join(receivers)}: {', '.join(kind for kind in ALERT_KINDS if kind in kinds)}")]
