"""`forge cluster probe`: measure the links between a cluster's nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from forge.cli.options import Output, OutputOption

if TYPE_CHECKING:
    from forge.plan.measured_links import MeasuredLinks

_TIMEOUT_S = 300.0


def probe(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="A cluster's name or file; by default the one on this machine.", show_default=False
        ),
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Measure the links between a cluster's nodes in about ten seconds; plans for the cluster then count with them.

    Example:  forge cluster probe lab
    """
    from dataclasses import asdict

    from forge.cli import display
    from forge.cluster.base import read_record
    from forge.cluster.local.ray_cluster import NAME
    from forge.cluster.registry import find_cluster, running_spec
    from forge.errors import ArgumentError, ClusterError
    from forge.plan.measured_links import keep_links, links_from
    from forge.remote.mirror import ask

    cluster = find_cluster(name)
    status = cluster.status()
    if status.address is None:
        raise ClusterError(f"the cluster '{cluster.name}' is not up; start it: forge cluster up")
    if status.runs:
        raise ArgumentError(
            f"{', '.join(status.runs)} on '{cluster.name}' would be disturbed, and the links seem slower than they "
            f"are; wait for the end, or stop it: forge runs stop {status.runs[0]}"
        )
    if output is Output.TABLE:
        display.message(f"measuring the links of '{cluster.name}'")
    answer = ask(cluster, status.address, module="forge.runtime.link_probe", timeout_s=_TIMEOUT_S)
    try:
        links = links_from(answer)
    except (KeyError, TypeError, ValueError) as error:
        raise ClusterError(f"the head of '{cluster.name}' gave no links: {error}") from None
    spec = None if cluster.name == NAME or read_record(cluster.name) is None else running_spec(cluster.name)
    if spec is not None:
        keep_links(links, spec=spec)
    if output is Output.JSON:
        display.print_json(asdict(links) | {"warnings": links.warnings(), "is_kept": spec is not None})
        return
    _show(links)
    if spec is not None:
        display.message(f"kept for plans on '{cluster.name}', until its file changes")


def _show(links: MeasuredLinks) -> None:
    from forge.cli import display
    from forge.plan.measured_links import gbps

    def shown(rate: float | None) -> str:
        return "-" if rate is None else gbps(rate)

    rows = [
        [
            node.node,
            node.device,
            str(node.num_ranks),
            shown(node.within_bytes_per_s),
            shown(node.between_bytes_per_s),
        ]
        for node in links.nodes
    ]
    display.table(["node", "device", "#ranks", "#within", "#between"], rows)
    display.message("Gbit/s of each rank within its node, and of the node to and from a neighbour at once")
    if links.all_gather_bytes_per_s is not None:
        display.message(f"all-gather over all ranks: {gbps(links.all_gather_bytes_per_s)} Gbit/s for each")
    for warning in links.warnings():
        display.warning(warning)
