"""What `forge train` and `forge tune` ask before they start a run that costs money."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from forge.cli.app import app
from forge.cli.launch import Request, confirm_plan
from forge.cli.options import Output
from forge.cli.plan_table import show_plan
from forge.cluster.local.provider import LocalCluster
from forge.errors import ArgumentError
from forge.remote.submit import RemoteTarget
from tests.support.jobs import tiny_plan


class PricedCluster(LocalCluster):
    def price(self) -> float | None:  # type: ignore[override]
        return 3.5


def request(*, yes: bool) -> Request:
    return Request(
        file=None,
        overrides=[],
        is_search=False,
        dry_run=False,
        resume=None,
        cluster=None,
        detach=False,
        yes=yes,
        output=Output.TABLE,
    )


def target(cluster: LocalCluster) -> RemoteTarget:
    return RemoteTarget(cluster=cluster, python="python", gpu=None, storage="")


def test_confirm_plan__priced_cluster_without_terminal__refuses() -> None:
    with pytest.raises(ArgumentError, match="refusing to spend money without confirmation; pass --yes"):
        confirm_plan(tiny_plan(), target(PricedCluster()), request(yes=False))


@pytest.mark.parametrize(("cluster", "yes"), [(PricedCluster(), True), (LocalCluster(), False)])
def test_confirm_plan__yes_or_free_cluster__does_not_ask(
    cluster: LocalCluster, yes: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    confirm_plan(tiny_plan(), target(cluster), request(yes=yes))
    shown = "".join(capsys.readouterr())
    assert "Start the run?" not in shown
    assert ("costs up to 3.50 USD an hour" in shown) == (cluster.price() is not None)
    assert shown.rstrip().endswith(f"sending the run to the cluster '{cluster.name}'")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("command", ["train", "plan"])
def test_dry_run__yes__is_accepted(home: Path, command: str) -> None:
    arguments = [command, "job.yaml"] + (["--dry-run", "--yes"] if command == "train" else [])
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert not (home / "runs").exists()


def test_show_plan__many_numbers_of_workers__lists_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(tiny_plan(resources__workers="3..100", training__global_batch_size=100))
    text = capsys.readouterr()
    listed = [
        int(line.split()[0])
        for line in text.out.splitlines()
        if line.strip()[:1].isdigit() and "further" not in line
    ]
    assert listed == [3, 4, 8, 16, 32, 64, 100]
    assert "91 further numbers of workers: see -o json" in text.out + text.err
