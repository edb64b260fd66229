"""Where the wall time of a run went.

Every second is in one bucket:

    training     steps done for the first time
    repeated     steps done again, and the unfinished part of an interrupted step
    evaluating   measuring the held-out loss
    saving       training waited for a checkpoint, or the run for its last checkpoint
    sampling     generating the sample of text at the end of the run; most of it is importing torch and transformers
    stalled      from the last progress of a hung rank until the hang was detected
    starting     from the start of the driver, which starts Ray, or the end of a generation, until the first step of
                 the next one begins
    waiting      too few machines
    other        the rest: between steps, and from the last step to the end of the run, without its sample
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Bucket = Literal[
    "training", "repeated", "evaluating", "saving", "sampling", "stalled", "starting", "waiting", "other"
]
BUCKETS: tuple[Bucket, ...] = get_args(Bucket)


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipChange:
    """The change from one generation to the next."""

    time: float
    """When it began, in seconds since the epoch."""
    cause: str
    reason: str
    after_s: float
    """Wall time of the run until it began, in seconds."""
    seconds_since_cause: float
    """Seconds from its cause to its start; 0 if unknown."""
    seconds: float | None = None
    """Until the first step of the next generation ended; None if none did."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each part of starting the next generation."""
    from_world_size: int | None = None
    to_world_size: int | None = None
    from_step: int | None = None
    source: str | None = None
    """Where the state came from: `memory`, `storage`."""

    @property
    def has_ended(self) -> bool:
        """Whether a step was completed after it."""
        return self.seconds is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodputReport:
    """Where the wall time of a run went."""

    wall_s: float
    """Of all sessions; the time between them does not count."""
    num_sessions: int
    """The times that the run was started or resumed."""
    between_s: float
    """Time between its sessions, in seconds."""
    tokens_per_s: float
    """Mean over first-time steps, as is `mfu`; nan before the first."""
    mfu: float
    seconds: Mapping[Bucket, float]
    """Per bucket; they add up to the wall time."""
    ideal_step_s: float
    """Median of new steps at the largest world size of the run; nan before the first."""
    goodput: float
    """New steps × ideal step time / wall time; above 1 if fewer workers were faster. nan before the first step."""
    node_goodput: float
    """Node-seconds of first-time steps / node-seconds available; 0 to 1, or nan."""
    num_steps: int
    """First-time steps."""
    num_repeated_steps: int
    num_preemptions: int
    """Notices, and machines lost without one."""
    num_failures: int
    """Changes caused by a rank that hung or failed."""
    num_nodes: int
    """Nodes now, or at the end of the run."""
    num_nodes_joined: int
    """Nodes on which an agent began to serve the run."""
    num_nodes_left: int
    """Nodes that left it; one that had no workers is no preemption."""
    changes: tuple[MembershipChange, ...]

    @property
    def num_changes(self) -> int:
        return len(self.changes)

    def share(self, bucket: Bucket) -> float:
        """Return the share of a bucket in the wall time, 0 to 1."""
        return self.seconds[bucket] / self.wall_s if self.wall_s else 0.0

    def as_record(self) -> dict[str, Any]:
        """Return the report as JSON values; unknown numbers become None."""
        record = asdict(self) | {
            "seconds": {bucket: round(seconds, 6) for bucket, seconds in self.seconds.items()},
            "num_changes": self.num_changes,
            "changes": [asdict(change) for change in self.changes],
        }
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value for key, value in record.items()
        }
