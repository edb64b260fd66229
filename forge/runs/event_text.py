"""Membership events of a run as lines of text.

The end of a generation and the start of the next are described in one line: what was lost, and how the run
continues.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from forge.errors import printable
from forge.units import format_bytes, format_date, format_duration

_RAY_ID = re.compile(r"\b([0-9a-f]{4})[0-9a-f]{52}\b")
_MAX_CHARS = 300


class EventDescriber:
    """Describes the events of one run, in their order."""

    def __init__(self) -> None:
        self._reason = ""
        """Why the last generation ended, until the next event says what follows."""
        self._members: set[str] = set()

    def describe(self, event: Mapping[str, Any]) -> str | None:
        """Return one line for an event; None if it is not worth a line of its own."""
        text = self._text(event)
        return text and short(text)

    def _text(self, event: Mapping[str, Any]) -> str | None:
        match event["event"]:
            case "NodeJoined":
                return f"node {event['node']} joined ({event['host']}), with room for {workers(event['num_slots'])}"
            case "NodeLeft":
                # The membership change that follows describes the loss of a node with workers.
                is_described = event["node"] in self._members or event["node"] in self._reason
                return None if is_described else f"node {event['node']} left: {event['reason']}"
            case "PreemptionNoticeReceived":
                if not event.get("is_certain", True):
                    return f"node {event['node']} is at risk of preemption (source: {event['source']})"
                left_s = event["seconds_left"]
                when = "soon" if left_s is None else f"in {format_duration(left_s)}"
                return f"node {event['node']} will be preempted {when} (source: {event['source']})"
            case "KilledForMemory":
                ranks = " and its ranks" if event["process"] == "agent" else ""
                used, limit = (_gib(event[key]) for key in ("used_gib", "limit_gib"))
                where = f"on {event['host']}{ranks}, which used {used} of {limit}"
                return f"Ray's memory monitor killed the {event['process']} {where}"
            case "ForkServerFailed":
                return (
                    f"node {event['node']} could not start workers, and tries again: its process {event['reason']}"
                )
            case "RankHung":
                return _hang_text(event)
            case "MixedDevices" | "SmallGpu" | "StragglerDetected":
                return _device_text(event)
            case "MembershipChangeStarted":
                self._reason, self._members = event["reason"], set()
            case "WaitingForMachines":
                return self._after_reason(f"waiting for machines: {event['have']} of {workers(event['need'])}")
            case "GenerationStarting":
                return self._after_reason(describe_start(event))
            case "GenerationStarted":
                self._members = {rank["node"] for rank in event.get("ranks", ())}
            case "AttentionChosen" | "GradientsNotQuantized" | "LayersCompiled" | "CompileFailed":
                return _speed_text(event)
            case "SnapshotIntervalChanged":
                every = "every step" if event["every"] == 1 else f"every {event['every']} steps"
                cost = f"{format_duration(event['seconds'])} each, {event['share']:.1%} of the time"
                return f"snapshots to memory {every} from now on ({cost})"
            case "CheckpointIntervalChanged":
                return _checkpoints_text(event)
            case "DeadlineForecast":
                return deadline_text(event)
            case "MachinesChosen" | "RegionMoveAdvised" as kind:
                return _machines_text(event) if kind == "MachinesChosen" else _move_text(event)
            case "LengthChanged":
                rates = f"{event['learning_rate']:.3g} at step {event['from_step']}"
                if event["learning_rate_before"] is not None:
                    rates = f"{event['learning_rate_before']:.3g} at step {event['from_step'] - 1}, {rates}"
                steps = f"{event['total_steps_before']:,} to {event['total_steps']:,} steps"
                return f"the length changed from {steps} (it was {event['before']}); learning rate {rates}"
            case "EarlyStopped":
                return _early_stop_text(event)
            case "RunStopped" if event.get("reason"):
                return f"stopped: {event['reason']}"
            case "SupervisorRestarted":
                return "the supervisor died and was restarted; training continued"
        return None

    def _after_reason(self, text: str) -> str:
        reason, self._reason = self._reason, ""
        return f"{reason}; {text}" if reason else text


def _early_stop_text(event: Mapping[str, Any]) -> str:
    best = event["best"]
    since = f"better than {best:.5g} of step {event['best_step']}" if best is not None else "a number"
    return f"stopped early at step {event['step']}: {event['metric']} is no longer {since}"


def _speed_text(event: Mapping[str, Any]) -> str:
    if event["event"] == "AttentionChosen":
        return f"attention: {event['name']} ({event['reason']})"
    if event["event"] == "GradientsNotQuantized":
        return f"gradients are not quantised (training.zero.quantized_gradients): {event['reason']}"
    if event["event"] == "CompileFailed":
        where = f" on node {event['node']}" if event.get("node") else ""
        return f"layers run uncompiled{where} (training.compile): {event['reason']}"
    layers = f"{event['num_layers']} layers compiled in {format_duration(event['seconds'])}"
    return f"{layers}, {event['num_from_cache']} of {event['num_graphs']} graphs from the cache"


def describe_start(event: Mapping[str, Any]) -> str:
    """`starting generation 3 with 2 workers from step 41 (memory)`."""
    text = f"starting generation {event['generation']} with {workers(event['world_size'])}"
    text += f" from step {event['from_step']} ({event['source']})" if event["from_step"] else ""
    if event.get("num_spare"):
        text += f"; {workers(event['num_spare'])} spare: whole groups are faster"
    if split := event.get("num_split_groups"):
        text += f"; {split} group{'' if split == 1 else 's'} on several nodes, which gathers more slowly"
    if (groups := event.get("num_shard_groups", 1)) > 1:
        text += f"; {groups} groups each hold the whole state"
        is_replica = event.get("parts_per_shard")
        text += ", which replaces replicas" if is_replica else ", on too few or too unequal nodes to be replicas"
    return text


def _hang_text(event: Mapping[str, Any]) -> str:
    silent = format_duration(event["silent_s"])
    return f"no progress for {silent}, rank {event['rank']} is behind; every rank's log has its stacks"


def _device_text(event: Mapping[str, Any]) -> str:
    texts = {"MixedDevices": _mixed_text, "SmallGpu": _small_gpu_text, "StragglerDetected": _straggler_text}
    return texts[event["event"]](event)


def _mixed_text(event: Mapping[str, Any]) -> str:
    kinds = ", ".join(f"{count} on {name}" for name, count in sorted(event["num_ranks"].items()))
    return f"the ranks run on different devices ({kinds}): a step takes as long as on the slowest kind"


def _small_gpu_text(event: Mapping[str, Any]) -> str:
    need, has = format_bytes(event["needed_bytes"]), format_bytes(event["memory_bytes"])
    return (
        f"node {event['node']} has {event['gpu']} with {has}, but a rank needs {need} of it at "
        f"{workers(event['world_size'])} by the plan, which is for {event['planned_gpu']}: it may run out of "
        "memory. Take it out of the cluster, or lower training.micro_batch_size"
    )


def _straggler_text(event: Mapping[str, Any]) -> str:
    times = f"{format_duration(event['own_s'])} against {format_duration(event['usual_s'])}"
    text = f"node {event['node']} is slow: {event['ratio']:.1f} times the other ranks' own work in a step ({times})"
    match event["action"]:
        case "requested":
            return f"{text}; another node is requested, and it works until then"
        case "replaced":
            return f"{text}; another node takes its place"
        case "left out":
            return f"{text}; {event['reason']}"
    return f"{text}; it stays: {event['reason']}"


def _gib(size: float | None) -> str:
    return "an unknown amount" if size is None else f"{size:.1f} GiB"


def workers(count: int) -> str:
    """`1 worker`, `2 workers`."""
    return f"{count} worker{'' if count == 1 else 's'}"


def deadline_text(event: Mapping[str, Any]) -> str:
    """Say whether a run meets its deadline or keeps to its hours, and what would be needed."""
    ends_at, date = event["ends_at"], format_date(event["deadline"])
    needed, now = event["needed_workers"], workers(event["num_workers"])
    is_hours = event["limit"] == "max_hours"
    if needed is None:
        likely = "" if ends_at is None else f", likely until {format_date(ends_at)}"
        passed = f"resources.max_hours were over ({date})" if is_hours else f"the deadline {date} has passed"
        return f"{passed} at step {event['step']}; the run goes on{likely}"
    end = f"resources.max_hours are over ({date})" if is_hours else f"its deadline {date}"
    spare_s = math.inf if ends_at is None else (event["deadline"] or 0.0) - ends_at
    if 0 <= spare_s < math.inf:
        return f"with {now} the run ends {format_duration(spare_s)} before {end}"
    late = "" if ends_at is None else f"{format_duration(-spare_s)} "
    text = f"with {now} the run ends {late}after {end}; {workers(needed)} are needed"
    if needed > event["max_workers"]:
        return f"{text}, more than the {event['max_workers']} of resources.workers"
    return text if event["can_rent"] else f"{text}: add machines to the cluster"


def is_late(event: Mapping[str, Any]) -> bool:
    """Whether a `DeadlineForecast` says that the run is not done in time."""
    ends_at = event["ends_at"]
    return event["needed_workers"] is None or ends_at is None or ends_at > (event["deadline"] or 0.0)


def _machines_text(event: Mapping[str, Any]) -> str:
    slack = format_duration(abs(event["slack_s"]))
    spare = f"{slack} to spare" if event["slack_s"] >= 0 else f"{slack} late"
    chosen = f"{event['num_spot']} spot, {event['num_on_demand']} on demand"
    return f"machines until the deadline: {chosen} ({spare} with all of them)"


def _move_text(event: Mapping[str, Any]) -> str:
    missing = f"{event['num_spot']} of {event['num_wanted']} spot machines in {event['here']}"
    traffic = "traffic at an unknown price" if event["move_usd"] is None else f"{event['move_usd']:.2f} USD"
    cost = f"{format_duration(event['pause_s'])} without machines, {traffic}"
    return f"{missing} for {format_duration(event['missing_s'])}; {event['to']} may have more: a move costs {cost}"


def _checkpoints_text(event: Mapping[str, Any]) -> str:
    every, before = (format_duration(event[key]) for key in ("seconds", "before_s"))
    cost, mtbf = (format_duration(event[key]) for key in ("cost_s", "mtbf_s"))
    return f"checkpoints every {every} instead of {before} ({cost} each; state lost every {mtbf})"


def short(text: str) -> str:
    """Put a text on one line, with Ray's ids shortened to 4 characters."""
    return printable(_RAY_ID.sub(r"\1", text), limit=_MAX_CHARS)
