"""Move a rented cluster to another region and resume its runs there, when a person or the run itself says so."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forge.cluster.cloud.provider import CloudCluster
    from forge.cluster.cloud.region_choice import RegionChoice
    from forge.plan.plan import Plan
    from forge.runtime.driver_process import RunHandle


class Mover:
    """Moves a run that is followed when the run advises it and its job allows it."""

    def __init__(self, run: RunHandle, plan: Plan) -> None:
        self._run, self._is_allowed = run, plan.job.resources.move_regions
        self._choice: RegionChoice | None = None

    def on_event(self, event: dict[str, Any], note: Callable[[str], None]) -> None:
        """Stop the run with a checkpoint at the event `RegionMoveAdvised`, unless something prevents a move.

        Args:
            note: shows a line.
        """
        from forge.errors import ForgeError

        if event["event"] != "RegionMoveAdvised" or self._choice is not None:
            return
        name = self._cluster_name()
        if not self._is_allowed or name is None:
            command = f"forge cluster move {name or 'NAME'} --to {event['to']}"
            note(f"{command} moves it; resources.move_regions does so by itself")
            return
        try:
            self._choice = self._find(name, to=str(event["to"]))
        except ForgeError as error:
            note(f"the run is not moved: {error}")
            return
        note(f"stopping with a checkpoint, to move to {event['to']} (resources.move_regions)")
        self._run.request_stop()

    def continue_elsewhere(self) -> RunHandle | None:
        """Move the cluster of the run, which has ended, and resume it; None if it did not stop to be moved.

        Raises: ClusterError as `move_cluster`.
        """
        from forge.runs.reader import read_run

        folder, name = self._run.folder, self._cluster_name()
        if self._choice is None or name is None or read_run(folder).status != "stopped":
            return None
        runs = move_cluster(rented_cluster(name), self._choice, folders=[folder])
        return runs[0] if runs else None

    def _cluster_name(self) -> str | None:
        from forge.runs.remote_ref import read_remote_ref

        ref = read_remote_ref(self._run.folder)
        return None if ref is None else ref.cluster

    def _find(self, name: str, *, to: str) -> RegionChoice:
        """Raises: ClusterError if other runs are on the cluster, and as `CloudCluster.elsewhere`."""
        from forge.errors import ClusterError
        from forge.remote.cluster_runs import find_cluster_runs

        cluster = rented_cluster(name)
        others = [one.name for one in find_cluster_runs(cluster) if one.name != self._run.folder.name]
        if others:
            raise ClusterError(
                f"{', '.join(others)} would stop too; to move both: forge cluster move {name} --to {to}"
            )
        return cluster.elsewhere(to=to)


def rented_cluster(name: str) -> CloudCluster:
    """Raises: ArgumentError for a cluster that has no region."""
    from forge.cluster.cloud.provider import CloudCluster
    from forge.cluster.registry import find_known
    from forge.errors import ArgumentError

    cluster = find_known(name)
    if not isinstance(cluster, CloudCluster):
        raise ArgumentError(f"'{name}' has no region: only a cluster on aws, gcp or azure moves")
    return cluster


def move_cluster(cluster: CloudCluster, choice: RegionChoice, *, folders: Sequence[Path]) -> list[RunHandle]:
    """Stop the runs, move the cluster, and resume them there. Returns: those that were resumed.

    Raises: ClusterError if a run does not stop (nothing is moved then), no place has capacity, or a run cannot be
        resumed.
    """
    from forge import api
    from forge.cli import display
    from forge.cli.progress import ClusterScreen
    from forge.errors import ClusterError, ForgeError
    from forge.remote.cluster_runs import stop_runs

    stopped = stop_runs(folders, on_message=display.message)
    commands = "".join(f"\n  {_resume_command(folder)} --cluster {cluster.name}" for folder in stopped)
    try:
        with ClusterScreen() as screen:
            cluster.move(choice, on_progress=screen.show)
    except ForgeError as error:
        hint = f". Checkpoints are written; once the cluster is up again:{commands}" if stopped else ""
        raise ClusterError(f"{error}{hint}") from error
    resumed: list[RunHandle] = []
    problems: list[str] = []
    for folder in stopped:
        try:
            resumed.append(api.start(folder / "job.yaml", cluster=cluster.name, resume=folder))
        except ForgeError as error:
            problems.append(f"{folder.name} was not resumed: {error}. Try again: {_resume_command(folder)}")
    if problems:
        raise ClusterError("\n".join(problems))
    return resumed


def _resume_command(folder: Path) -> str:
    from forge.runs.reader import read_plan

    verb = "train" if read_plan(folder).search is None else "tune"
    return f"forge {verb} --resume {shlex.quote(str(folder))}"
