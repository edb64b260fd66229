"""`forge cluster move`: end a rented cluster in its region, and continue its runs on machines in another one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forge.cli.launch import confirm
from forge.cli.mover import move_cluster, rented_cluster
from forge.cli.options import YesOption

if TYPE_CHECKING:
    from forge.cluster.cloud.provider import CloudCluster
    from forge.cluster.cloud.region_choice import RegionChoice


def move(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The name of a rented cluster that is up.", show_default=False)
    ],
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="PLACE", help="Region, or zone on gcp; by default the cheapest other one."),
    ] = None,
    yes: YesOption = False,
) -> None:
    """Move a rented cluster and its runs to another region of its file: a checkpoint, new machines, and resume.

    Nothing trains for about a quarter of an hour. If no other region has capacity, it starts where it was.

    Example:  forge cluster move aws-spot --to us-west-2
    """
    from forge.cli import display
    from forge.remote.cluster_runs import find_cluster_runs

    cluster = rented_cluster(name)
    choice = cluster.elsewhere(to=to)
    folders = find_cluster_runs(cluster)
    show_move(cluster, choice, folders=folders)
    confirm("Move it?", yes=yes)
    resumed = move_cluster(cluster, choice, folders=folders)
    display.message(f"cluster '{name}' is in {cluster.place}; runs resumed there: {len(resumed)}")
    for run in resumed:
        display.next_command(f"forge runs watch {run.folder.name}", purpose="follow it")


def show_move(cluster: CloudCluster, choice: RegionChoice, *, folders: Sequence[Path]) -> None:
    """Show where a cluster goes, and what moving its runs costs."""
    from forge.cli import display
    from forge.cli.cluster_table import region_lines
    from forge.plan.move_costs import describe_move, move_costs
    from forge.runs.reader import read_plan

    for line in region_lines(choice):
        display.message(line)
    to = choice.options[0].place
    for folder in folders:
        plan = read_plan(folder)
        costs = move_costs(plan, cloud=cluster.provider, storage_region=cluster.storage_region, to=to)
        display.message(f"{folder.name}: {describe_move(costs)}")
    if not folders:
        display.message(f"no run is on '{cluster.name}'")
