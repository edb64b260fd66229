"""How often the machines of a spot trace are lost, and how many of them there are, for a bill."""

from __future__ import annotations

import math

from forge.chaos.trace import Trace
from forge.errors import ArgumentError
from forge.plan.interruptions import Interruptions
from forge.plan.throughput import Estimate

_Z = 1.28
"""Quantile of the normal distribution: 80 % of the values lie within as many standard deviations."""


def trace_interruptions(trace: Trace, *, name: str) -> Interruptions:
    """Return losses in an hour of a machine, with the range of a count of so many, and the mean share of machines.

    Args:
        name: of the trace, for messages.

    Raises: ArgumentError if the trace has no duration.
    """
    present, since_s, machine_s, losses = 0, 0.0, 0.0, 0
    for change in trace.changes:
        machine_s += present * (change.at_s - since_s)
        since_s = change.at_s
        losses += len(change.removed)
        present += len(change.added) - len(change.removed)
    machine_s += present * (trace.duration_s - since_s)
    if machine_s <= 0:
        raise ArgumentError(f"{name} has no time between its changes, so it says nothing about interruptions")
    hours = machine_s / 3600
    spread = _Z * math.sqrt(max(1, losses))
    return Interruptions(
        per_machine_hour=Estimate(
            low=max(0.0, losses - spread) / hours, likely=losses / hours, high=(losses + spread) / hours
        ),
        available=machine_s / (trace.max_nodes * trace.duration_s),
        basis=name,
    )
