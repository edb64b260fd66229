"""Watches for notices that this machine will be preempted.

One watcher per source: the metadata services of AWS, GCP and Azure, and the file that
`forge.elastic.preemption.pod_init` writes in a Kubernetes pod. A cloud is polled only where the cluster names it,
`FORGE_CLOUD=aws` or `kubernetes,aws`: elsewhere the address of a metadata service may belong to another machine.
The clouds' own variables `AWS_EC2_METADATA_SERVICE_ENDPOINT` and `GCE_METADATA_HOST` change the address; Azure has
none, `AZURE_METADATA_ENDPOINT` is forge's.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from forge.elastic.preemption.aws import aws_watchers
from forge.elastic.preemption.azure import azure_watchers
from forge.elastic.preemption.gcp import gcp_watchers
from forge.elastic.preemption.notice import Notice, PollInterval, Watcher
from forge.elastic.preemption.pod_init import notice_file
from forge.errors import ClusterError

_log = logging.getLogger(__name__)

_MAX_PAUSE_S = 5.0
"""Between two attempts that fail: the shortest notice is 30 s."""
_KUBERNETES_PAUSE_S = 0.2
_INTERVAL = PollInterval()


class _BuildWatchers(Protocol):
    def __call__(self, environment: Mapping[str, str], *, interval: PollInterval) -> list[Watcher]: ...


async def watch(
    environment: Mapping[str, str],
    on_notice: Callable[[Notice], None],
    *,
    interval: PollInterval = _INTERVAL,
) -> None:
    """Call `on_notice` once per notice, forever; return only if there is nothing to watch.

    If a watcher or `on_notice` raises, it is called again after a pause that doubles from failure to failure.

    Raises: ClusterError, before anything is polled, if `FORGE_CLOUD` names an unknown cloud.
    """
    async with asyncio.TaskGroup() as tasks:
        for watcher in watchers(environment, interval=interval):
            tasks.create_task(_poll_forever(watcher, on_notice))


def watchers(environment: Mapping[str, str], *, interval: PollInterval = _INTERVAL) -> list[Watcher]:
    """Build the watchers that `FORGE_CLOUD` names; nothing is polled yet.

    Raises: ClusterError if it names an unknown cloud.
    """
    chosen = []
    for cloud in filter(None, (name.strip().lower() for name in environment.get("FORGE_CLOUD", "").split(","))):
        if cloud not in _CLOUDS:
            raise ClusterError(
                f"FORGE_CLOUD names {cloud!r}, which has no preemption watcher; known: {', '.join(_CLOUDS)}"
            )
        chosen += _CLOUDS[cloud](environment, interval=interval)
    return chosen


async def _poll_forever(watcher: Watcher, on_notice: Callable[[Notice], None]) -> None:
    reported: set[str] = set()
    pause_s = watcher.pause_s
    while True:
        try:
            for key, notice in (await watcher.poll()).items():
                if key not in reported:
                    on_notice(notice)
                    reported.add(key)
            pause_s = watcher.pause_s
        except Exception as error:  # an unexpected answer must not end the watch
            if pause_s == watcher.pause_s:
                _log.warning(
                    "preemption notices of %s: the request failed and is repeated: %r", watcher.source, error
                )
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
        await asyncio.sleep(pause_s)


def _kubernetes_watchers(environment: Mapping[str, str], *, interval: PollInterval) -> list[Watcher]:
    poll = partial(_read_notice, notice_file(environment))
    return [Watcher(source="kubernetes", poll=poll, pause_s=min(_KUBERNETES_PAUSE_S, interval.pause_s))]


async def _read_notice(file: Path) -> Mapping[str, Notice]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    return {text: Notice(source="kubernetes", deadline=json.loads(text)["deadline"])}


_CLOUDS: Mapping[str, _BuildWatchers] = {
    "aws": aws_watchers,
    "gcp": gcp_watchers,
    "azure": azure_watchers,
    "kubernetes": _kubernetes_watchers,
}
