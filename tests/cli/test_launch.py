"""What `forge train` and `forge tune` ask before they start a run that costs money."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forge.cli.app import app
from forge.cli.launch import Request, confirm_plan
from forge.cli.options import Output
from forge.cli.plan_table import show_plan
from forge.cluster.local.provider import LocalCluster
from forge.errors import ArgumentError
from forge.plan.durations import ClusterCost, Forecast
from forge.plan.throughput import Estimate
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


@pytest.mark.slow
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


def test_confirm_plan__cost_of_the_cluster__is_shown_with_the_limits_that_it_exceeds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cost = ClusterCost(
        machines="2 x g5.xlarge",
        hours=Estimate(low=1.0, likely=2.0, high=3.0),
        usd=Estimate(low=5.0, likely=10.0, high=20.0),
        usd_per_hour=3.5,
    )
    made = tiny_plan(resources__max_usd=4, resources__max_hours=1.5)
    made = replace(made, forecast=Forecast(worlds=(), notes=(), cost=cost))
    confirm_plan(made, target(PricedCluster()), request(yes=True))
    text = " ".join(capsys.readouterr().err.split())
    assert "cost: 10.00 USD (5.00 to 20.00) in 2h 00m (1h 00m to 3h 00m), on 2 x g5.xlarge" in text
    assert "resources.max_usd: 4 will stop it at about 40% of its steps" in text
    assert "likely to take longer than resources.max_hours: 1.5" in text


def test_confirm_plan__this_machine__costs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    confirm_plan(tiny_plan(), None, request(yes=False))
    assert "cost: nothing is rented, it runs on this machine" in capsys.readouterr().err
