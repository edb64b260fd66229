"""`alerts:` messages about what happens to a run, to a webhook, a command or W&B."""

from __future__ import annotations

import difflib
import ipaddress
import typing
from collections.abc import Iterator
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from forge.config.resources import ResourcesSpec, TrackingSpec
from forge.config.section import FieldError, Section, Strings

AlertKind = Literal["loss_spike", "nan", "stalled", "budget", "late", "preempted", "finished", "failed"]
ALERT_KINDS: tuple[AlertKind, ...] = typing.get_args(AlertKind)
_OF_SEARCHES = ("budget", "finished", "failed")
"""The other kinds are about the steps and machines of one run."""


class AlertsSpec(Section):
    """Messages about what happens to a run, sent by its recorder beside the training: they never delay or fail it
    (docs/alerts.md). Of a search: about its cost, and when it has finished or failed."""

    webhook: str | None = Field(None, min_length=1, max_length=2000)
    """Where to post `{"text": ...}`, the form of Slack's incoming webhooks; `${env:ALERT_URL}`, because
    anyone with the address can post to the channel. https, or plain http to this machine, which needs no
    variable."""

    command: Strings | None = None
    """A program and its arguments, such as `[/usr/local/bin/page, --team, ml]`: started without a shell on the
    machine of the recorder (the cluster's head) with the alert as JSON on its stdin. It has 30 seconds, and no
    credentials in its environment."""

    wandb: bool = False
    """Send W&B alerts too, from the run that `tracking.wandb` writes: with its mode `online` at once, with
    `offline`, its default, not before `wandb sync`."""

    on: Strings = ALERT_KINDS
    """What is worth a message: `loss_spike`, `nan`, `stalled`, `budget` (50, 80 and 100 % of `resources.max_usd` or
    `search.max_usd`), `late` (it ends after `resources.deadline` or `resources.max_hours`),
    `preempted`, `finished`, `failed`; by default all."""

    def kinds(self, *, is_search: bool) -> frozenset[str]:
        """Return the kinds that are sent."""
        return frozenset(self.on).intersection(_OF_SEARCHES if is_search else ALERT_KINDS)

    @field_validator("command")
    @classmethod
    def _is_a_command(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is None:
            return None
        program = value[0] if value else ""
        if not program or any("\0" in word for word in value):
            raise ValueError("must be a program and its arguments, such as [/usr/local/bin/page, --team, ml]")
        if len(value) == 1 and len(program.split()) > 1:
            raise ValueError(f"must be a list, as no shell reads it: [{', '.join(program.split())}]")
        if "/" in program and not program.startswith("/"):
            raise ValueError("must begin with an absolute path, or with the name of a program in PATH")
        return value

    @field_validator("on")
    @classmethod
    def _are_kinds(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for kind in value:
            if kind not in ALERT_KINDS:
                near = difflib.get_close_matches(kind.lower().replace("-", "_"), ALERT_KINDS, n=1, cutoff=0.5)
                problem = f"has '{kind}'; it must be a list of {', '.join(ALERT_KINDS)}"
                raise FieldError("", problem, nearest=near[0] if near else None)
        if not value:
            raise ValueError("is empty: no alert would ever be sent")
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _goes_somewhere(self) -> AlertsSpec:
        if self.webhook is None and self.command is None and not self.wandb:
            raise FieldError("", "names no receiver: set webhook, command, or wandb: true")
        return self


def alert_problems(
    alerts: AlertsSpec, *, resources: ResourcesSpec, tracking: TrackingSpec, is_search: bool, has_usd_limit: bool
) -> Iterator[FieldError]:
    """Yield what other sections make impossible; where `on` has all kinds, those that can occur are sent."""
    if alerts.wandb and tracking.wandb.mode == "disabled":
        problem = "needs W&B, but tracking.wandb.mode is disabled"
        yield FieldError("alerts.wandb", problem, depends_on=("tracking.wandb.mode",))
    if set(alerts.on) == set(ALERT_KINDS):  # also where a plan has written the default out
        return
    if is_search and (other := [kind for kind in alerts.on if kind not in _OF_SEARCHES]):
        problem = f"has {', '.join(other)}, which are for single runs; a search has {', '.join(_OF_SEARCHES)}"
        yield FieldError("alerts.on", problem, depends_on=("search",))
    elif "budget" in alerts.on and not has_usd_limit:
        key = "search.max_usd" if is_search else "resources.max_usd"
        yield FieldError("alerts.on", f"has budget, but there is none: set {key}", depends_on=(key,))
    elif "late" in alerts.on and resources.deadline is None and resources.max_hours is None:
        keys = ("resources.deadline", "resources.max_hours")
        yield FieldError("alerts.on", f"has late, but there is no limit: set {' or '.join(keys)}", depends_on=keys)
    elif "late" in alerts.on and resources.engine != "elastic":
        problem = "has late, which requires engine: elastic, whose supervisor compares the progress with the limit"
        yield FieldError("alerts.on", problem, depends_on=("resources.engine",))
    elif "preempted" in alerts.on and resources.engine != "elastic":
        problem = "has preempted, which requires engine: elastic, whose supervisor records it"
        yield FieldError("alerts.on", problem, depends_on=("resources.engine",))


def webhook_problem(url: str) -> str | None:
    """Return why nothing may be posted to a URL, without the URL; None if it may be."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "must be a URL: https://HOST/PATH"
    is_plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not host or not is_plain:
        return "must be a URL: https://HOST/PATH"
    if parts.username is not None:
        return "must not contain a user name or password"
    if parts.scheme == "http" and not is_loopback(host):
        return "must be https: anyone on the way could read a plain http address and post to it"
    return None


def is_loopback(host: str) -> bool:
    """Whether a host of a URL is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def webhook_in_file_problem(url: str) -> str | None:
    """Return why a URL must not stand in a job file as it is; None if it may."""
    if problem := webhook_problem(url):
        return problem
    if not is_loopback(urlsplit(url).hostname or ""):
        return (
            "must not be in a file, which forge copies and shows: anyone with the address can post to it; set it "
            "in the environment and write ${env:ALERT_URL}"
        )
    return None
