"""Keeps Ray's autoscaler from asking for ever for what is not to be had: `python -m
forge.cluster.cloud.capacity_backoff`.

Ray 2.60's autoscaler, told at once that there is no room for a machine type, asks for the same type again, and
never for another. This runs beside it on the head. It reads in the autoscaler's log what was refused, and closes
that type for a while: in the autoscaler's own file, which it reads before each of its decisions, no more of the
type are allowed than are there. So the next best type is asked for, spot before on-demand.
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

from forge.cluster.cloud.ray_launcher import no_capacity

_CLOSED_S = 120.0
"""After so long a type is tried again."""
_POLL_S = 0.5
_REFUSAL = re.compile(r"Failed to launch \d+ nodes of type (\S+): (.*)")
"""Source: `ray.autoscaler.v2.instance_manager.node_provider`, of Ray 2.60."""

_log = logging.getLogger(__name__)


def main() -> None:
    """Watch for as long as this machine lives; one of these is enough."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    file = Path.home() / "ray_bootstrap_config.yaml"
    with (Path.home() / ".forge" / "market.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(0)
        folder = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "session_latest" / "logs"
        market = CapacityBackoff(file=file, log=folder / "monitor.log", count=_count)
        while True:
            market.look(time.time())
            time.sleep(_POLL_S)


class CapacityBackoff:
    """What is to be had now."""

    def __init__(self, *, file: Path, log: Path, count: Callable[[Mapping[str, Any], str], int]) -> None:
        """Args:
        file: the autoscaler's.
        log: what the autoscaler says.
        count: how many machines of a node type are there, by the cloud's word.
        """
        self._file, self._log_file, self._count = file, log, count
        self._read_until, self._inode = 0, 0
        self._closed: dict[str, float] = {}
        """Until when, by node type."""
        self._wanted: dict[str, int] = {}
        """What the cluster's file allows of each type that was ever closed."""

    def look(self, now: float) -> None:
        """Read what is new, and have the autoscaler's file say it. A look that fails is followed by the next."""
        try:
            refused = self._news()
            ended = [node_type for node_type, until in self._closed.items() if until <= now]
            for node_type in ended:
                del self._closed[node_type]
            self._closed |= dict.fromkeys(refused, now + _CLOSED_S)
            if refused or ended:
                self._tell()
        except Exception as error:  # whatever the cloud or the disk answers, the watch outlives it
            _log.warning("trying on: %r", error)

    def _news(self) -> set[str]:
        """The types that were refused since the last look."""
        if not self._log_file.exists():
            return set()
        status = self._log_file.stat()
        if status.st_ino != self._inode or status.st_size < self._read_until:  # another Ray, or a log begun anew
            self._inode, self._read_until = status.st_ino, 0
        with self._log_file.open("rb") as file:
            file.seek(self._read_until)
            lines, _, _ = file.read().rpartition(b"\n")
        self._read_until += len(lines) + 1 if lines else 0
        return refused_types(lines.decode(errors="replace"))

    def _tell(self) -> None:
        config = json.loads(self._file.read_text())
        types = config["available_node_types"]
        known = [node_type for node_type in {*self._closed, *self._wanted} if node_type in types]
        for node_type in known:
            self._wanted.setdefault(node_type, types[node_type]["max_workers"])
        allowed = {
            node_type: self._count(config, node_type) if node_type in self._closed else self._wanted[node_type]
            for node_type in known
        }
        _log.info("allowed now: %s", allowed)
        draft = self._file.with_suffix(".draft")
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(with_limits(config, allowed)))
        draft.replace(self._file)


def refused_types(text: str) -> set[str]:
    """The node types for which there was no room, by the autoscaler's log."""
    return {node_type for node_type, words in _REFUSAL.findall(text) if no_capacity(words)}


def with_limits(config: Mapping[str, Any], allowed: Mapping[str, int]) -> dict[str, Any]:
    """The autoscaler's configuration, with these numbers of machines by node type."""
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    for node_type, count in allowed.items():
        changed["available_node_types"][node_type]["max_workers"] = count
    return changed


def _count(config: Mapping[str, Any], node_type: str) -> int:
    """By Ray's own way of asking the cloud, which knows all of them."""
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

    provider = _get_node_provider(config["provider"], config["cluster_name"])
    return len(provider.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: node_type}))


if __name__ == "__main__":
    main()
