"""How often a run has lost machines, and its state in memory, from its own recorded events.

Read before each generation from where the last reading ended, so a supervisor that is restarted, or a run that is
resumed, knows what came before.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from forge.plan.checkpoint_interval import ASSUMED_NODE_MTBF_S, CheckpointRisk, posterior_s, state_mtbf_s

_NUM_RECENT = 5
_UNPLANNED = ("loss", "failure", "hang")


class LossHistory:
    """Counts the losses in `events.jsonl`; lines that are not understood are skipped."""

    def __init__(self, events: Path) -> None:
        self._events, self._read_until = events, 0
        self._num_losses = self._num_state_losses = 0
        self._node_s = self._wall_s = 0.0
        self._num_nodes, self._at = 0, math.nan
        self._is_unplanned = False
        self._stalls_s: deque[float] = deque(maxlen=_NUM_RECENT)
        self._every_s: float | None = None

    def risk(self, *, nodes_mtbf_s: Sequence[float | None]) -> CheckpointRisk:
        """Return what the interval between checkpoints of the next generation depends on.

        Args:
            nodes_mtbf_s: of each of its machines the mean time until it is lost; None if it is not known.
        """
        self._read()
        num_nodes = len(nodes_mtbf_s)
        losses_per_s = sum(1 / (mtbf_s or ASSUMED_NODE_MTBF_S) for mtbf_s in nodes_mtbf_s)
        node_s = posterior_s(num_nodes / losses_per_s, seen_s=self._node_s, num_losses=self._num_losses)
        prior_s = state_mtbf_s(num_nodes=num_nodes, node_mtbf_s=node_s, has_replicas=True)
        return CheckpointRisk(
            mtbf_s=posterior_s(prior_s, seen_s=self._wall_s, num_losses=self._num_state_losses),
            cost_s=median(self._stalls_s) if self._stalls_s else None,
            every_s=self._every_s,
        )

    def _read(self) -> None:
        try:
            with self._events.open("rb") as file:
                file.seek(self._read_until)
                lines, _, _ = file.read().rpartition(b"\n")
        except OSError:
            return
        self._read_until += len(lines) + 1 if lines else 0
        for line in lines.splitlines():
            try:
                record = json.loads(line)
                self._take(record, kind=record["event"], at=float(record["time"]))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                continue

    def _take(self, record: Mapping[str, Any], *, kind: str, at: float) -> None:
        if self._num_nodes and at > self._at:
            self._wall_s += at - self._at
            self._node_s += (at - self._at) * self._num_nodes
        self._at = at
        match kind:
            case "GenerationStarted":
                nodes = {rank["node"] for rank in record.get("ranks", ())}
                self._num_nodes, self._is_unplanned = len(nodes) or 1, False
            case "MembershipChangeStarted":
                self._num_losses += record["cause"] == "loss"
                self._is_unplanned = self._is_unplanned or record["cause"] in _UNPLANNED
            case "GenerationStarting":
                # What was written from the copies in memory was not lost.
                self._num_state_losses += self._is_unplanned and record["source"] == "storage"
            case "CheckpointSaved":
                self._is_unplanned = False
                if isinstance(stall_s := record.get("stall_s"), float) and 0 <= stall_s < math.inf:
                    self._stalls_s.append(stall_s)
            case "CheckpointIntervalChanged":
                self._every_s = float(record["seconds"])
            case "RunStopped" | "RunFinished" | "RunFailed":
                self._num_nodes, self._is_unplanned = 0, False
