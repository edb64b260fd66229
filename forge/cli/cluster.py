"""`forge cluster`: start, see and stop the Ray cluster that runs use."""

from __future__ import annotations

from typing import Annotated

import typer

from forge.cli.options import Output, OutputOption

app = typer.Typer(help="Start, see and stop a Ray cluster.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def up(
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=64, help="Simulated machines on this one.")] = 1,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the head; a free one by default.")
    ] = None,
) -> None:
    """Start a cluster on this machine; runs use it until it is taken down.

    Example:  forge cluster up --nodes 3
    """
    from forge.cli import display
    from forge.cluster.local import start_local

    cluster = start_local(num_nodes=nodes, port=port)
    cpus = sum(node.num_cpus for node in cluster.nodes)
    display.message(f"cluster up at {cluster.address}: {len(cluster.nodes)} nodes, {cpus} CPUs")
    display.next_command("forge train jobs/pretrain.yaml", purpose="use it")


@app.command()
def status(output: OutputOption = Output.TABLE) -> None:
    """Show the cluster's nodes.

    Example:  forge cluster status -o json
    """
    from forge.cli import display
    from forge.cluster.local import find_local, list_nodes

    cluster = find_local()
    if cluster is None:
        if output is Output.JSON:
            display.print_json({"address": None, "nodes": []})
        else:
            display.message("no cluster is up; forge train starts one for the run and stops it at the end")
            display.next_command("forge cluster up", purpose="start one that stays")
        return
    nodes = list_nodes(cluster)
    if output is Output.JSON:
        display.print_json({"address": cluster.address, "nodes": nodes})
        return
    display.message(f"cluster at {cluster.address}")
    rows = [
        [
            node["node_id"][:8],
            node["state"],
            node["ip"],
            f"{node['free_cpus']:g}/{node['cpus']:g}",
            f"{node['gpus']:g}",
        ]
        for node in nodes
    ]
    display.table(["node", "state", "address", "#free CPUs", "#GPUs"], rows)
    display.next_command("forge cluster down", purpose="stop it")


@app.command()
def down() -> None:
    """Stop the cluster and everything that runs on it.

    Example:  forge cluster down
    """
    from forge.cli import display
    from forge.cluster.local import stop_local

    count = stop_local()
    display.message(f"cluster down: {count} nodes ended" if count else "no cluster is up")
