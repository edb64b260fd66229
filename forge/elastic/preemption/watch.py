"""Hears the announcement that this machine will be taken away, and calls back.

One watcher for each way in which it is announced: the metadata services of AWS, GCP and Azure, the file
that `forge.elastic.preemption.pod_init` writes in a pod, and what Ray says of its nodes. The clouds are asked
only where
the cluster names them, `FORGE_CLOUD=aws` or `kubernetes,aws`: on any other machine the address of the
metadata services is somebody else's. Their own variables may move them, `AWS_EC2_METADATA_SERVICE_ENDPOINT`
and `GCE_METADATA_HOST`; Azure has none, `AZURE_METADATA_ENDPOINT` is forge's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from forge.elastic.preemption.metadata import Announced, Aws, Azure, Gcp
from forge.elastic.preemption.pod_init import notice_file
from forge.errors import ClusterError

_log = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 5.0
"""Between two tries that fail: the shortest notice is 30 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """This machine will be taken away."""

    source: str
    """Who said so: `aws`, `gcp`, `azure`, `kubernetes`, `ray`."""
    deadline: float | None
    """When it goes, in seconds since the epoch by this machine's clock; None if that was not told."""
    is_certain: bool = True
    """False for AWS's rebalance recommendation, which tells of a higher risk only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PollInterval:
    """How often is asked, how long is waited, and by which clock."""

    pause_s: float = 0.5
    """Between two questions, so that a notice is heard within a second."""
    timeout_s: float = 3.0
    """For one answer."""
    clock: Callable[[], float] = time.time
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watcher:
    """One place where notices are announced."""

    place: str
    ask: Callable[[], Awaitable[Mapping[str, Notice]]]
    """What is announced now, each under a name that stays the same from one answer to the next."""
    pause_s: float


_PACE = PollInterval()


def watchers(environment: Mapping[str, str], *, pace: PollInterval = _PACE) -> list[Watcher]:
    """The watchers that the environment asks for; nothing is asked yet.

    Raises: ClusterError if `FORGE_CLOUD` names what is not known.
    """
    chosen = []
    for cloud in filter(None, (name.strip().lower() for name in environment.get("FORGE_CLOUD", "").split(","))):
        if cloud not in _CLOUDS:
            known = ", ".join(_CLOUDS)
            raise ClusterError(f"FORGE_CLOUD names {cloud!r}, of which no notice could be heard; known: {known}")
        chosen += _CLOUDS[cloud](environment, pace)
    return chosen


async def watch(
    environment: Mapping[str, str],
    on_notice: Callable[[Notice], None],
    *,
    pace: PollInterval = _PACE,
) -> None:
    """Tell every notice once, for ever; returns only where there is nothing to watch.

    A watcher that fails, or a notice that `on_notice` fails to take, is tried again after a growing pause.

    Raises: ClusterError, before anything is watched, if `FORGE_CLOUD` names what is not known.
    """
    chosen = watchers(environment, pace=pace)
    async with asyncio.TaskGroup() as tasks:
        for watcher in chosen:
            tasks.create_task(_follow(watcher, on_notice))


async def _follow(watcher: Watcher, on_notice: Callable[[Notice], None]) -> None:
    told: set[str] = set()
    pause_s = watcher.pause_s
    while True:
        try:
            for name, notice in (await watcher.ask()).items():
                if name not in told:
                    on_notice(notice)
                    told.add(name)
            pause_s = watcher.pause_s
        except Exception as error:  # whatever a service answers, the watch outlives it
            if pause_s == watcher.pause_s:
                _log.warning("notices of %s: no answer, trying on: %r", watcher.place, error)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        await asyncio.sleep(pause_s)


def _watch_aws(environment: Mapping[str, str], pace: PollInterval) -> list[Watcher]:
    endpoint = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"
    aws = Aws(endpoint=endpoint.rstrip("/"), timeout_s=pace.timeout_s, clock=pace.clock)
    return [
        _watch_cloud("aws", aws.interruption, pace),
        _watch_cloud("aws", aws.rebalance, pace, is_certain=False),
    ]


def _watch_gcp(environment: Mapping[str, str], pace: PollInterval) -> list[Watcher]:
    host = environment.get("GCE_METADATA_HOST") or "metadata.google.internal"
    # A machine with a GPU is told of its maintenance an hour ahead, another one a minute, and neither when:
    # the minute is safe. Source: Compute Engine documentation, "Handle GPU host maintenance events".
    announcements = {"preempted": ("TRUE", 30), "maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE", 60)}
    keys = [
        Gcp(
            url=f"http://{host}/computeMetadata/v1/instance/{key}",
            value=value,
            notice_s=notice_s,
            timeout_s=pace.timeout_s,
            clock=pace.clock,
        )
        for key, (value, notice_s) in announcements.items()
    ]
    return [_watch_cloud("gcp", key.ask, pace) for key in keys]


def _watch_azure(environment: Mapping[str, str], pace: PollInterval) -> list[Watcher]:
    endpoint = environment.get("AZURE_METADATA_ENDPOINT") or "http://169.254.169.254"
    azure = Azure(endpoint=endpoint.rstrip("/"), timeout_s=pace.timeout_s, clock=pace.clock)
    return [_watch_cloud("azure", azure.ask, pace)]


def _watch_cloud(
    source: str, ask: Callable[[], Awaitable[Announced]], pace: PollInterval, *, is_certain: bool = True
) -> Watcher:
    async def ask_for_notices() -> Mapping[str, Notice]:
        return {
            name: Notice(source=source, deadline=deadline, is_certain=is_certain)
            for name, deadline in (await ask()).items()
        }

    return Watcher(place=source, ask=ask_for_notices, pause_s=pace.pause_s)


def _watch_kubernetes(environment: Mapping[str, str], pace: PollInterval) -> list[Watcher]:
    ask = partial(_read_notice, notice_file(environment))
    return [Watcher(place="kubernetes", ask=ask, pause_s=min(0.2, pace.pause_s))]


async def _read_notice(file: Path) -> Mapping[str, Notice]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    return {text: Notice(source="kubernetes", deadline=json.loads(text)["deadline"])}


_CLOUDS: Mapping[str, Callable[[Mapping[str, str], PollInterval], list[Watcher]]] = {
    "aws": _watch_aws,
    "gcp": _watch_gcp,
    "azure": _watch_azure,
    "kubernetes": _watch_kubernetes,
}
