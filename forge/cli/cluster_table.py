"""A cluster's nodes and runs as `forge cluster status` shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from forge.cli import display
from forge.units import format_duration

_RUNNERS_UP = 4

if TYPE_CHECKING:
    from forge.cluster.base import ClusterNode, ClusterStatus
    from forge.cluster.cloud.region_choice import RegionChoice, RegionOption
    from forge.runs.nodes import RunNode

_GONE_S = 600.0
"""Nodes that left the cluster longer ago are not shown; Ray remembers up to a thousand of them."""

RunNodes = Mapping[str, Sequence["RunNode"]]
"""The nodes of each run whose folder is on this machine, in the order of their numbers."""


def read_run_nodes(found: ClusterStatus) -> RunNodes:
    """Read the nodes of the cluster's runs from their folders; a run that is not known here is left out."""
    from forge.errors import ForgeError
    from forge.runs.nodes import nodes_now
    from forge.runs.reader import find_run, read_run

    nodes: dict[str, Sequence[RunNode]] = {}
    for run in found.runs:
        try:
            if len(Path(run).parts) == 1:  # a name from another machine is no path
                nodes[run] = nodes_now(read_run(find_run(run, root=Path("runs"))).events)
        except ForgeError:
            continue
    return nodes


def show_cluster(found: ClusterStatus, *, runs: RunNodes) -> None:
    """Print a cluster's nodes, its runs with the numbers of their nodes, and how to reach its Ray."""
    cost = "" if found.usd_per_hour is None else f", {found.usd_per_hour:.2f} USD an hour"
    display.message(f"cluster at {found.address}{cost}")
    shown = [node for node in found.nodes if node.gone_s is None or node.gone_s < _GONE_S]
    rows = [
        [
            node.node_id[:8] or "-",
            _state(node, runs),
            node.name,
            node.kind,
            "-" if node.state == "gone" else f"{node.free_cpus:g}/{node.num_cpus:g}",
            "-" if node.state == "gone" else f"{node.free_gpus:g}/{node.num_gpus:g}",
            "-" if node.usd_per_hour is None else f"{node.usd_per_hour:.2f}",
        ]
        for node in shown
    ]
    display.table(["node", "state", "address", "kind", "#free CPUs", "#free GPUs", "#USD/h"], rows)
    num_hidden = len(found.nodes) - len(shown)
    if num_hidden:
        nodes = f"{num_hidden} node{'' if num_hidden == 1 else 's'}"
        display.message(f"{nodes} that left over {format_duration(_GONE_S)} ago: -o json lists them")
    if found.runs:
        display.heading("runs", "with their nodes, by the number that --node takes")
        display.facts([(run, _numbered(runs.get(run), found)) for run in found.runs])
    show_access(found)


def show_access(found: ClusterStatus) -> None:
    """Print how Ray's own command and dashboard reach a cluster on this machine; the token is not shown."""
    if found.dashboard is None:
        return
    from forge.cluster.local.ray_cluster import token_path

    display.message(f"dashboard: {found.dashboard} asks for the token in {token_path()}")
    display.next_command(f"RAY_AUTH_MODE=token ray status --address {found.address}", purpose="Ray's own view")


def status_record(found: ClusterStatus, *, runs: RunNodes) -> dict[str, object]:
    """Return a cluster's status as JSON values."""
    from forge.cluster.local.ray_cluster import token_path

    record = asdict(found) | {"usd_per_hour": found.usd_per_hour}
    record["run_nodes"] = {
        run: [
            {"number": number, "node": node.name, "is_noticed": node.is_noticed, "seconds_left": node.seconds_left}
            for number, node in enumerate(nodes)
        ]
        for run, nodes in runs.items()
    }
    record["token_file"] = str(token_path()) if found.dashboard is not None else None
    return record


def region_lines(choice: RegionChoice) -> list[str]:
    """Say in which region a rented cluster is tried first, what its workers cost there, and which ones are next."""
    first, *others = choice.options
    why = f"the cheapest of {len(choice.options)}" if choice.is_chosen and others else "tried first"
    lines = [f"region {first.place}, {why}: {_worker_price(first)}"]
    if others:
        unit = "USD an hour" if first.usd_per_exaflop is None else "USD per EFLOP"
        shown = ", ".join(f"{one.place} {_in_unit(one)}" for one in others[:_RUNNERS_UP])
        more = len(others) - _RUNNERS_UP
        lines.append(f"if it has no capacity ({unit}): {shown}" + (f" and {more} more" if more > 0 else ""))
    return [*lines, *choice.notes]


def _worker_price(one: RegionOption) -> str:
    if one.usd_per_hour is None:
        return f"{one.machine} at an unknown price"
    text = f"{one.machine} at {one.usd_per_hour:.2f} USD an hour {'as spot' if one.is_spot else 'on demand'}"
    if one.usd_per_exaflop is not None:
        text += f", {one.usd_per_exaflop:.3f} USD per EFLOP"
    return text + (f", and {one.traffic_usd_per_hour:.2f} USD of traffic" if one.traffic_usd_per_hour else "")


def _in_unit(one: RegionOption) -> str:
    price = one.usd_per_hour if one.usd_per_exaflop is None else one.usd_per_exaflop
    return "unknown" if price is None else f"{price:.2f}"


def _state(node: ClusterNode, runs: RunNodes) -> str:
    """The state of a node: also that a run knows of a notice for it, which Ray's dashboard does not show."""
    if node.state == "gone" and node.gone_s is not None:
        return f"gone {format_duration(node.gone_s)} ago"
    noticed = [one for nodes in runs.values() for one in nodes if one.is_noticed and one.is_on(node.node_id)]
    if node.state != "alive" or not noticed:
        return node.state
    left_s = min((one.seconds_left for one in noticed if one.seconds_left is not None), default=None)
    if left_s is None:
        return "notice"
    return f"notice, {format_duration(left_s)} left" if left_s else "notice, overdue"


def _numbered(nodes: Sequence[RunNode] | None, found: ClusterStatus) -> str:
    if nodes is None:
        return "its folder is not on this machine, so the numbers of its nodes are not known"
    names = [next((node.node_id[:8] for node in found.nodes if one.is_on(node.node_id)), one.name) for one in nodes]
    return ", ".join(f"{number}: {name}" for number, name in enumerate(names)) or "none yet"
