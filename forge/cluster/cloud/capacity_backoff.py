"""Pause instance types without capacity in Ray's autoscaler; runs on the head of a rented cluster.

python -m forge.cluster.cloud.capacity_backoff

If a cloud has no capacity for an instance type, Ray 2.60's autoscaler requests the same type again and never
another. This process reads the refusals from the autoscaler's log and pauses the type for a while: it limits the
type to the existing nodes in the autoscaler's configuration file, which Ray reads before each decision. So the next
best type is requested, spot before on demand. The same file limits spot and on-demand machines to those that runs
with a deadline want (`forge.cluster.cloud.machine_limits`).
"""

from __future__ import annotations

import copy
import fcntl
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from forge.cluster.cloud.machine_limits import (
    AUTOSCALER_FILE,
    MIN_WORKERS_VARIABLE,
    Kind,
    kind_of,
    limit_types,
    limits_folder,
    wanted_machines,
)
from forge.cluster.cloud.ray_launcher import find_capacity_error
from forge.fs import write_atomic

_PAUSE_S = 120.0
"""After which an instance type is tried again."""
_POLL_S = 0.5
_RECOUNT_S = 30.0
"""How often the machines are counted while runs have a deadline."""
_REFUSAL = re.compile(r"Failed to launch \d+ nodes of type (\S+): (.*)")
"""Source: `ray.autoscaler.v2.instance_manager.node_provider`, of Ray 2.60."""

_log = logging.getLogger(__name__)


def main() -> None:
    """Watch until the head is terminated; a second process on it exits at once."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    file = Path.home() / AUTOSCALER_FILE
    with (Path.home() / ".forge" / "capacity-backoff.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(0)
        folder = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "session_latest" / "logs"
        backoff = CapacityBackoff(
            file=file,
            log=folder / "monitor.log",
            count=_count_nodes,
            limits=limits_folder(Path.home()),
            min_workers=int(os.environ.get(MIN_WORKERS_VARIABLE, "0")),
        )
        while True:
            backoff.poll(time.time())
            time.sleep(_POLL_S)


class CapacityBackoff:
    """Limits instance types without capacity in the autoscaler's file."""

    def __init__(
        self,
        *,
        file: Path,
        log: Path,
        count: Callable[[Mapping[str, Any], str], int],
        limits: Path,
        min_workers: int = 0,
    ) -> None:
        """Args:
        file: the autoscaler's configuration.
        log: the autoscaler's log.
        count: number of existing nodes of a node type, according to the cloud.
        limits: folder with the numbers of machines that runs with a deadline request.
        min_workers: of the cluster file.
        """
        self._min_workers = min_workers
        self._limits, self._counted_at = limits, 0.0
        self._wanted: dict[Kind, int] | None = None
        self._file, self._log_file, self._count = file, log, count
        self._read_until, self._inode = 0, 0
        self._paused_until: dict[str, float] = {}
        """By node type."""
        self._max_workers: dict[str, int] = {}
        """The cluster file's limit of each type that was ever limited."""

    def poll(self, now: float) -> None:
        """Read new refusals and update the autoscaler's file. Errors are logged: the next call tries again."""
        try:
            refused = self._read_refused()
            ended = [node_type for node_type, until in self._paused_until.items() if until <= now]
            for node_type in ended:
                del self._paused_until[node_type]
            self._paused_until |= dict.fromkeys(refused, now + _PAUSE_S)
            wanted = wanted_machines(self._limits, now=now)
            is_recount_due = wanted is not None and now - self._counted_at >= _RECOUNT_S
            if refused or ended or is_recount_due or wanted != self._wanted:
                self._wanted, self._counted_at = wanted, now
                self._write_limits()
        except Exception as error:  # neither the cloud nor the disk may end this process
            _log.warning("trying again: %r", error)

    def _read_refused(self) -> set[str]:
        """Return the node types that were refused since the last call."""
        if not self._log_file.exists():
            return set()
        status = self._log_file.stat()
        if status.st_ino != self._inode or status.st_size < self._read_until:  # a new Ray, or a truncated log
            self._inode, self._read_until = status.st_ino, 0
        with self._log_file.open("rb") as file:
            file.seek(self._read_until)
            lines, _, _ = file.read().rpartition(b"\n")
        self._read_until += len(lines) + 1 if lines else 0
        return refused_types(lines.decode(errors="replace"))

    def _write_limits(self) -> None:
        config = json.loads(self._file.read_text())
        types = config["available_node_types"]
        wanted = [name for name in types if kind_of(name)] if self._wanted is not None else []
        known = [name for name in {*self._paused_until, *self._max_workers, *wanted} if name in types]
        known.sort(key=lambda name: -types[name].get("priority", 0))  # the cheapest first
        for node_type in known:
            self._max_workers.setdefault(node_type, types[node_type]["max_workers"])
        counted = known if self._wanted is not None else [name for name in known if name in self._paused_until]
        existing = {node_type: self._count(config, node_type) for node_type in counted}
        limits = {node_type: self._max_workers[node_type] for node_type in known}
        limits |= {node_type: existing[node_type] for node_type in known if node_type in self._paused_until}
        if self._wanted is not None:
            limits |= limit_types(
                self._wanted, max_workers=limits, existing=existing, min_workers=self._min_workers
            )
        if all(types[node_type]["max_workers"] == limit for node_type, limit in limits.items()):
            return
        _log.info("limits now: %s", limits)
        write_atomic(self._file, json.dumps(with_limits(config, limits)), mode=0o600)


def refused_types(text: str) -> set[str]:
    """The node types in an autoscaler's log for which a cloud had no capacity."""
    return {node_type for node_type, message in _REFUSAL.findall(text) if find_capacity_error(message)}


def with_limits(config: Mapping[str, Any], limits: Mapping[str, int]) -> dict[str, Any]:
    """The autoscaler's configuration with these `max_workers` by node type."""
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    for node_type, count in limits.items():
        changed["available_node_types"][node_type]["max_workers"] = count
    return changed


def _count_nodes(config: Mapping[str, Any], node_type: str) -> int:
    """Ask the cloud through Ray's own provider, which supports all of them."""
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

    provider = _get_node_provider(config["provider"], config["cluster_name"])
    return len(provider.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: node_type}))


if __name__ == "__main__":
    main()
