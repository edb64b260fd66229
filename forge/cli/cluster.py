"""`forge cluster`: start, show, probe, drain and stop the Ray clusters that runs use, and open a shell on them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forge.cli.cluster_move import move
from forge.cli.cluster_probe import probe
from forge.cli.launch import confirm
from forge.cli.options import Output, OutputOption, YesOption

if TYPE_CHECKING:
    from forge.cluster.base import Cluster, ClusterStatus

app = typer.Typer(help="Start, show, drain and stop a Ray cluster.", no_args_is_help=True, rich_markup_mode=None)

_NameArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="NAME", help="A cluster's name or file; by default the one on this machine.", show_default=False
    ),
]


@app.command()
def up(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="A cluster file; by default this machine.", show_default=False),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option("--nodes", min=1, max=64, help="Simulated nodes on this machine.", show_default=False),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the head on this machine; by default a free one.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be started, and stop.")] = False,
    yes: YesOption = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Start a cluster, or repair one that is up. It stays up until `forge cluster down`.

    Example:  forge cluster up cluster/ssh.yaml
    """
    from forge.cli import display
    from forge.cli.cluster_table import show_access, status_record
    from forge.cli.progress import ClusterScreen

    cluster = _cluster_of(file, nodes=nodes, port=port)
    if dry_run:
        text = cluster.to_yaml()
        _show_regions(cluster, is_live=False)
        display.print_text(text)
        return
    _confirm_price(cluster, yes=yes)
    try:
        with ClusterScreen() as screen:
            found = cluster.up(on_progress=screen.show)
    except KeyboardInterrupt:
        _after_interrupt(cluster)
        raise
    if output is Output.JSON:
        display.print_json(status_record(found, runs={}))
        return
    cpus = sum(node.num_cpus for node in found.nodes if node.state == "alive")
    alive = sum(node.state == "alive" for node in found.nodes)
    display.message(f"cluster up at {found.address}: {alive} nodes, {cpus:g} CPUs")
    show_access(found)
    option = "" if found.provider == "local" else f" --cluster {found.name}"
    display.next_command(f"forge train jobs/pretrain.yaml{option}", purpose="use it")


@app.command()
def status(name: _NameArgument = None, output: OutputOption = Output.TABLE) -> None:
    """Show a cluster's nodes, its runs with the numbers of their nodes, its current cost, and how to reach its Ray.

    Example:  forge cluster status -o json
    """
    from forge.cli import display
    from forge.cli.cluster_table import read_run_nodes, show_cluster, status_record
    from forge.cluster.base import list_records
    from forge.cluster.registry import find_cluster

    found = find_cluster(name).status()
    runs = read_run_nodes(found)
    others = [record.name for record in list_records() if record.name != found.name]
    if output is Output.JSON:
        display.print_json(status_record(found, runs=runs))
        return
    if found.address is None and not found.nodes:
        if name is None:
            display.message("no cluster is up; forge train starts one and stops it at the end of the run")
            display.next_command("forge cluster up", purpose="start one that stays up")
        else:
            display.message(f"the cluster '{found.name}' is not up")
            display.next_command(f"forge cluster down {found.name}", purpose="remove what is left of it")
    else:
        show_cluster(found, runs=runs)
        display.next_command(f"forge cluster down{_argument(found)}", purpose="stop it")
    if others and name is None:
        display.message(f"other clusters started from this machine: {', '.join(others)}")


@app.command()
def down(name: _NameArgument = None) -> None:
    """Stop a cluster and everything on it, and check that nothing is left.

    Example:  forge cluster down
    """
    from forge.cli import display
    from forge.cli.progress import ClusterScreen
    from forge.cluster.local.ray_cluster import NAME, stop_local
    from forge.cluster.registry import find_cluster
    from forge.errors import ClusterError
    from forge.remote.servers import stop_servers_of

    cluster = find_cluster(name)
    stop_servers_of(cluster, on_message=display.message)
    if cluster.name == NAME:
        count = stop_local()
        display.message(f"cluster down: {count} nodes stopped" if count else "no cluster is up")
        return
    with ClusterScreen() as screen:
        left = cluster.down(on_progress=screen.show)
    if left:
        listed = "\n".join(f"  {line}" for line in left)
        raise ClusterError(
            f"could not remove all of '{cluster.name}':\n{listed}\nTry again: forge cluster down {cluster.name}"
        )
    display.message(f"cluster '{cluster.name}' down; nothing is left of it")


app.command()(move)
app.command()(probe)


@app.command()
def ssh(
    name: _NameArgument = None,
    machine: Annotated[
        str | None,
        typer.Option(metavar="MACHINE", help="A node's address as shown by status; by default the head."),
    ] = None,
) -> None:
    """Open a shell on a node of a cluster.

    Example:  forge cluster ssh aws-spot
    """
    from forge.cluster.registry import find_cluster

    command = find_cluster(name).shell(machine)
    sys.stdout.flush()
    os.execvp(command[0], command)


@app.command()
def drain(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A cluster's name; `local` is the one on this machine.")
    ],
    machine: Annotated[str, typer.Argument(metavar="MACHINE", help="A node's address or id as shown by status.")],
    seconds: Annotated[float, typer.Option("--seconds", min=0, help="Until Ray removes the node.")] = 120.0,
) -> None:
    """Drain a node: runs leave it without losing a step, then Ray removes it.

    Example:  forge cluster drain lab 10.0.0.3
    """
    from forge.cli import display
    from forge.cluster.registry import find_cluster
    from forge.errors import ArgumentError, ClusterError
    from forge.remote.mirror import ask

    cluster = find_cluster(name)
    found = cluster.status()
    if found.address is None:
        raise ClusterError(f"the cluster '{cluster.name}' is not up")
    chosen = [node for node in found.nodes if node.state == "alive" and machine in (node.name, node.node_id[:8])]
    workers = [node for node in chosen if node.kind != "head"]
    if len(workers) != 1:
        known = ", ".join(f"{node.name} ({node.node_id[:8]})" for node in found.nodes if node.kind != "head")
        why = "is the head, which cannot be drained" if chosen and not workers else "is not a worker"
        raise ArgumentError(f"{machine} {why}; workers of '{cluster.name}': {known or 'none'}")
    ask(cluster, "drain", workers[0].node_id, str(seconds), str(found.address))
    display.message(f"draining {machine}; Ray removes it in {seconds:g} s")
    display.next_command(f"forge cluster status {cluster.name}", purpose="watch it")


def _cluster_of(file: Path | None, *, nodes: int | None, port: int | None) -> Cluster:
    """Raises: JobFileError if the file is wrong; ArgumentError for options that it excludes."""
    from forge.cluster.local.provider import LocalCluster
    from forge.cluster.local.ray_cluster import NAME
    from forge.cluster.registry import cluster_of_file
    from forge.config.cluster import LocalSpec
    from forge.errors import ArgumentError

    if file is None:
        return LocalCluster(LocalSpec(name=NAME, provider="local", nodes=nodes or 1, port=port))
    if nodes is not None or port is not None:
        raise ArgumentError(
            "--nodes and --port are for a cluster on this machine; set them in the cluster file instead"
        )
    return cluster_of_file(file)


def _confirm_price(cluster: Cluster, *, yes: bool) -> None:
    """Show what a cluster costs, and ask. Raises: ArgumentError without a terminal to ask on."""
    from forge.cli import display

    low = _show_regions(cluster, is_live=True)
    price = cluster.price()
    if price is not None:
        span = f"up to {price:.2f}" if low is None else f"{low:.2f} to {price:.2f}"
        display.message(f"'{cluster.name}' costs {span} USD an hour, up to {24 * price:,.2f} USD a day")
        confirm("Start it?", yes=yes)


def _show_regions(cluster: Cluster, *, is_live: bool) -> float | None:
    """Show where a rented cluster is tried, and why. Returns: the least that it costs in the first place."""
    from forge.cli import display
    from forge.cli.cluster_table import region_lines
    from forge.cluster.cloud.provider import CloudCluster

    if not isinstance(cluster, CloudCluster):
        return None
    choice = cluster.choose(is_live=is_live)
    for line in region_lines(choice):
        display.message(line)
    return choice.options[0].plan.lowest_usd_per_hour


def _after_interrupt(cluster: Cluster) -> None:
    """Offer to stop what was started before Ctrl-C."""
    from forge.cli import display
    from forge.cluster.local.ray_cluster import NAME

    if cluster.name == NAME:  # already removed by `up`
        return
    display.warning(f"interrupted; parts of '{cluster.name}' are up and may cost money until forge cluster down")
    if sys.stdin.isatty() and sys.stderr.isatty() and typer.confirm("Stop it now?", err=True):
        down(cluster.name)
        return
    display.next_command(f"forge cluster down {cluster.name}", purpose="stop it")


def _argument(found: ClusterStatus) -> str:
    return "" if found.provider == "local" else f" {found.name}"
