"""`forge cluster`: start, see, enter, drain and stop the Ray clusters that runs use."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forge.cli.options import Output, OutputOption

if TYPE_CHECKING:
    from forge.cluster.base import Cluster, ClusterStatus

app = typer.Typer(
    help="Start, see, enter, drain and stop a Ray cluster.", no_args_is_help=True, rich_markup_mode=None
)

_NameArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="NAME", help="A cluster's name, or its file; by default this machine's own.", show_default=False
    ),
]
_YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before money is spent.")]


@app.command()
def up(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="The cluster's file; without one, this machine.", show_default=False),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option("--nodes", min=1, max=64, help="Simulated machines on this one.", show_default=False),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the head here; a free one by default.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be started, and stop.")] = False,
    yes: _YesOption = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Start a cluster; runs use it until it is taken down. What is up is left alone, what is broken is mended.

    Example:  forge cluster up cluster/ssh.yaml
    """
    from forge.cli import display

    cluster = _cluster_of(file, nodes=nodes, port=port)
    if dry_run:
        display.print_text(cluster.to_yaml())
        return
    _confirm_price(cluster, yes=yes)
    try:
        with display.StageScreen() as screen:
            found = cluster.up(on_progress=screen.show)
    except KeyboardInterrupt:
        _after_interrupt(cluster)
        raise
    if output is Output.JSON:
        display.print_json(_record(found))
        return
    cpus = sum(node.num_cpus for node in found.nodes if node.state == "alive")
    alive = sum(node.state == "alive" for node in found.nodes)
    display.message(f"cluster up at {found.address}: {alive} nodes, {cpus:g} CPUs")
    option = "" if found.provider == "local" else f" --cluster {found.name}"
    display.next_command(f"forge train jobs/pretrain.yaml{option}", purpose="use it")


@app.command()
def status(name: _NameArgument = None, output: OutputOption = Output.TABLE) -> None:
    """Show a cluster's machines, its runs, and what it costs now.

    Example:  forge cluster status -o json
    """
    from forge.cli import display
    from forge.cluster.base import list_records
    from forge.cluster.registry import find_cluster

    found = find_cluster(name).status()
    others = [record.name for record in list_records() if record.name != found.name]
    if output is Output.JSON:
        display.print_json(_record(found))
        return
    if found.address is None and not found.nodes:
        if name is None:
            display.message("no cluster is up; forge train starts one for the run and stops it at the end")
            display.next_command("forge cluster up", purpose="start one that stays")
        else:
            display.message(f"the cluster '{found.name}' is not up")
            display.next_command(f"forge cluster down {found.name}", purpose="stop what is left of it")
    else:
        _show(found)
    if others and name is None:
        display.message(f"other clusters that were started from here: {', '.join(others)}")


@app.command()
def down(name: _NameArgument = None) -> None:
    """Stop a cluster and everything that runs on it, and look whether anything is left.

    Example:  forge cluster down
    """
    from forge.cli import display
    from forge.cluster.local.ray_cluster import NAME, stop_local
    from forge.cluster.registry import find_cluster
    from forge.errors import ClusterError

    cluster = find_cluster(name)
    if cluster.name == NAME:
        count = stop_local()
        display.message(f"cluster down: {count} nodes ended" if count else "no cluster is up")
        return
    with display.StageScreen() as screen:
        left = cluster.down(on_progress=screen.show)
    if left:
        listed = "\n".join(f"  {line}" for line in left)
        raise ClusterError(
            f"this is left of '{cluster.name}':\n{listed}\nTry again: forge cluster down {cluster.name}"
        )
    display.message(f"cluster '{cluster.name}' down; nothing of it is left")


@app.command()
def ssh(
    name: _NameArgument = None,
    machine: Annotated[
        str | None, typer.Option(metavar="MACHINE", help="As status names it; the head by default.")
    ] = None,
) -> None:
    """Open a shell on a machine of a cluster.

    Example:  forge cluster ssh aws-spot
    """
    from forge.cluster.registry import find_cluster

    command = find_cluster(name).shell(machine)
    sys.stdout.flush()
    os.execvp(command[0], command)


@app.command()
def drain(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A cluster's name; local for this machine's own.")],
    machine: Annotated[str, typer.Argument(metavar="MACHINE", help="As status names it.")],
    seconds: Annotated[float, typer.Option("--seconds", min=0, help="Until Ray takes it out.")] = 120.0,
) -> None:
    """Announce that a machine goes away: runs leave it without losing a step.

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
        why = "is the head, without which there is no cluster" if chosen and not workers else "is no worker's name"
        raise ArgumentError(f"{machine} {why}; workers of '{cluster.name}': {known or 'none'}")
    ask(cluster, "drain", workers[0].node_id, str(seconds), str(found.address))
    display.message(f"{machine} is being drained; Ray takes it out in {seconds:g} s")
    display.next_command(f"forge cluster status {cluster.name}", purpose="see it go")


def _cluster_of(file: Path | None, *, nodes: int | None, port: int | None) -> Cluster:
    """Raises: JobFileError if the file is wrong; ArgumentError for options that do not go with it."""
    from forge.cluster.local.provider import LocalCluster
    from forge.cluster.local.ray_cluster import NAME
    from forge.cluster.registry import cluster_of
    from forge.config.cluster import LocalSpec
    from forge.config.load import load_cluster
    from forge.errors import ArgumentError

    if file is None:
        return LocalCluster(LocalSpec(name=NAME, provider="local", nodes=nodes or 1, port=port))
    if nodes is not None or port is not None:
        raise ArgumentError("--nodes and --port are for this machine; a cluster's file says both itself")
    return cluster_of(load_cluster(file))


def _confirm_price(cluster: Cluster, *, yes: bool) -> None:
    """Say what a cluster may cost, and have it agreed to. Raises: ArgumentError if nobody can be asked."""
    from forge.cli import display
    from forge.errors import ArgumentError

    price = cluster.price()
    if price is None:
        return
    display.message(f"'{cluster.name}' may cost up to {price:.2f} USD an hour")
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ArgumentError("money is spent only when that was agreed to: --yes")
    if not typer.confirm("Start it?", err=True):
        raise typer.Exit(2)


def _after_interrupt(cluster: Cluster) -> None:
    """What was started until Ctrl-C is stopped, or kept, as the user says."""
    from forge.cli import display
    from forge.cluster.local.ray_cluster import NAME

    if cluster.name == NAME:  # it has cleared up already
        return
    display.warning(
        f"interrupted; what was started of '{cluster.name}' is there, and is found by forge cluster down"
    )
    if sys.stdin.isatty() and sys.stderr.isatty() and typer.confirm("Stop it now?", err=True):
        down(cluster.name)
        return
    display.next_command(f"forge cluster down {cluster.name}", purpose="stop it")


def _show(found: ClusterStatus) -> None:
    from forge.cli import display

    cost = "" if found.usd_per_hour is None else f", {found.usd_per_hour:.2f} USD an hour"
    display.message(f"cluster at {found.address}{cost}")
    rows = [
        [
            node.node_id[:8] or "-",
            node.state,
            node.name,
            node.kind,
            f"{node.free_cpus:g}/{node.num_cpus:g}",
            f"{node.num_gpus:g}",
            "-" if node.usd_per_hour is None else f"{node.usd_per_hour:.2f}",
        ]
        for node in found.nodes
    ]
    display.table(["node", "state", "address", "kind", "#free CPUs", "#GPUs", "#USD/h"], rows)
    if found.runs:
        display.message(f"runs: {', '.join(found.runs)}")
    name = "" if found.provider == "local" else f" {found.name}"
    display.next_command(f"forge cluster down{name}", purpose="stop it")


def _record(found: ClusterStatus) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(found) | {"usd_per_hour": found.usd_per_hour}
