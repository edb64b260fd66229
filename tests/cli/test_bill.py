"""The cost of a job in `forge plan`, and what `forge train` and `forge cluster up` ask with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner, Result

from forge.cli import display
from forge.cli.app import app
from forge.cli.bill_table import bill_record, plot_lines, show_bill
from forge.cli.cluster import _confirm_price
from forge.cluster.registry import cluster_of_file
from forge.errors import ArgumentError
from forge.plan.bill import Bill
from forge.pricing import offers
from tests.cli.test_narrow import console, printed
from tests.plan.test_bill import bill
from tests.support.offers import offer

OFFERS = (
    offer(),
    offer(instance="Standard_NC24ads_A100_v4", cloud="azure", region="uaenorth", gpu="A100-80GB", usd_per_hour=3.6),
    offer(instance="p4d.24xlarge", gpu="A100-40GB", num_gpus=8),
    offer(instance="free", usd_per_hour=0.0, spot_usd_per_hour=0.0),
)
RANGE = {
    "type": "object",
    "required": ["low", "likely", "high"],
    "additionalProperties": False,
    "properties": {name: {"type": "number", "minimum": 0} for name in ("low", "likely", "high")},
}
CANDIDATE = {
    "type": "object",
    "required": ["cloud", "region", "instance", "gpu", "num_machines", "is_spot", "observed", "usd_parts"],
    "properties": {
        "hours": RANGE,
        "uninterrupted_hours": RANGE,
        "usd": RANGE,
        "interruptions": RANGE,
        "restarts": RANGE,
        "usd_parts": {
            "type": "object",
            "required": ["machines", "head", "disks", "storage", "egress"],
            "additionalProperties": {"type": ["number", "null"], "minimum": 0},
        },
    },
}
SCHEMA = {
    "type": "object",
    "required": [
        *("max_hours", "max_usd", "choices", "num_candidates", "candidates", "not_listed", "left_out", "notes")
    ],
    "properties": {
        "choices": {"items": {"properties": {"candidate": {"anyOf": [CANDIDATE, {"type": "null"}]}}}},
        "candidates": {"type": "array", "items": CANDIDATE},
        "not_listed": {"items": {"required": ["reason", "num_candidates"]}},
        "left_out": {"items": {"required": ["reason", "num_offers", "examples"]}},
        "notes": {"items": {"type": "string"}},
    },
}


def forge(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def shown(found: Bill, monkeypatch: pytest.MonkeyPatch, *, width: int = 60, **options: Any) -> str:
    terminal = console(width)
    monkeypatch.setattr(display, "OUT", terminal)
    monkeypatch.setattr(display, "ERR", terminal)
    show_bill(found, title="on rented GPUs", **options)
    return printed(terminal)


def test_show_bill__sixty_columns__no_line_of_table_and_plot_is_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(bill(*OFFERS), monkeypatch)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 60, [line for line in lines if len(line) > 60]
    assert "cheapest" in text and "fastest" in text
    assert any(line.lstrip().startswith("USD |") for line in lines) and " time " in text
    assert "left out: 1 offer: no price is known (free in us-east-1)" in " ".join(text.split())
    assert "+: without disks, storage, whose price there is unknown" in " ".join(text.split())


def test_show_bill__limits_that_cannot_be_met__says_what_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bill(*OFFERS, resources__max_hours=0.001, resources__max_usd=0.001)
    text = " ".join(shown(found, monkeypatch).split())
    assert "no candidate is likely to take at most 3.6s; the fastest takes" in text
    assert "no candidate is likely to cost at most 0.001 USD; the cheapest takes" in text


def test_show_bill__num_rows__lists_the_cheapest(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bill(*OFFERS)
    text = shown(found, monkeypatch, width=120, num_rows=4)
    assert text.count("x g5.2xlarge ") + text.count("x Standard_NC24ads_A100_v4 ") >= 4
    assert "--candidates" not in text


def test_show_bill__no_candidates__says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(bill(OFFERS[3]), monkeypatch, width=100)
    assert "0 candidates" in text and "no price is known" in text
    assert "! no offer can run this job\n" in text
    text = shown(bill(OFFERS[2]), monkeypatch, width=100)
    assert "! no offer can run this job; it may be possible with other numbers of resources.workers" in text


def test_plot_lines__marks_the_frontier_and_keeps_to_the_width() -> None:
    found = bill(*OFFERS)
    for width in (40, 60, 76):
        lines = plot_lines(found.candidates, frontier=found.frontier, width=width)
        assert max(map(len, lines)) <= width
        assert sum(line.count("o") for line in lines[:-1]) >= 1


def test_bill_record__thousands_of_candidates__lists_the_frontier_and_the_cheapest_and_counts_the_rest() -> None:
    places = [offer(region=f"region-{number}", usd_per_hour=1.0 + number / 100) for number in range(400)]
    alone = {"cloud": "lambda", "instance": "one", "spot_usd_per_hour": None, "usd_per_hour": 0.01}
    found = bill(*places, offer(**alone))  # without a head, one machine costs less than four
    record = bill_record(found, num_candidates=1)
    assert len(found.candidates) == record["num_candidates"] > 1000
    listed = record["candidates"]
    assert listed[0]["usd"]["likely"] == found.candidates[0].usd.likely
    assert [one["hours"]["likely"] for one in listed if one["is_on_frontier"]] == [
        one.hours.likely for one in found.frontier
    ]
    assert {one["is_on_frontier"] for one in listed} == {True} and len(listed) > 1
    [rest] = record["not_listed"]
    assert rest["num_candidates"] + len(listed) == record["num_candidates"]
    assert rest["reason"] == "neither on the frontier nor among the cheapest (1)"
    assert len(json.dumps(bill_record(found))) < 40_000


def test_bill_record__follows_its_schema_and_has_every_candidate_of_a_few() -> None:
    found = bill(*OFFERS)
    record = json.loads(json.dumps(bill_record(found)))
    jsonschema.validate(record, SCHEMA)
    assert len(record["candidates"]) == len(found.candidates)
    assert sum(one["is_on_frontier"] for one in record["candidates"]) == len(found.frontier)
    [unknown, *_] = [one for one in record["candidates"] if one["cloud"] == "azure"]
    assert unknown["usd_parts"]["storage"] is None


@pytest.mark.usefixtures("home")
class TestPlan:
    def test_plan__gpu_auto__shows_cost_with_the_age_of_the_prices_and_asks_no_cloud(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(offers, "_refresh", lambda *_, **__: pytest.fail("a cloud was asked"))
        done = forge("plan", "job.yaml", "--set", "resources.gpu=auto", "--set", "resources.max_usd=50")
        assert done.exit_code == 0
        assert "on rented GPUs" in done.stdout and "fastest for at most 50.00 USD" in done.stdout
        assert "days old" in done.stderr and "left out: " in done.stderr

    def test_plan__json__has_the_bill(self) -> None:
        done = forge("plan", "job.yaml", "-o", "json", "--set", "resources.gpu=L4")
        record = json.loads(done.stdout)["bill"]
        jsonschema.validate(record, SCHEMA)
        assert {one["gpu"] for one in record["candidates"]} == {"L4"}

    def test_plan__json_candidates__are_so_many_or_all(self) -> None:
        arguments = ("plan", "job.yaml", "-o", "json", "--set", "resources.gpu=L4", "--candidates")
        few, every = (json.loads(forge(*arguments, count).stdout)["bill"] for count in ("2", "all"))
        assert len(few["candidates"]) < len(every["candidates"]) == every["num_candidates"]
        assert (len(few["not_listed"]), every["not_listed"]) == (1, [])
        for wrong in ("0", "-3", "some", "1.5", "\u0663"):
            assert forge(*arguments, wrong).exit_code == 2

    def test_plan__cpu_job__is_not_priced(self) -> None:
        done = forge("plan", "job.yaml")
        assert "on rented GPUs" not in done.stdout
        assert "resources.gpu: none is not priced on rented machines" in done.stderr
        assert json.loads(forge("plan", "job.yaml", "-o", "json").stdout)["bill"] is None

    def test_plan__trace__is_named_and_a_wrong_one_refused(self, home: Path) -> None:
        (home / "spot.csv").write_text("0,add,a\n0,add,b\n3600000,remove,a\n7200000,add,a\n")
        arguments = ("plan", "job.yaml", "--set", "resources.gpu=auto", "--trace")
        done = forge(*arguments, "spot.csv")
        assert "interruptions by spot.csv" in done.stderr
        with pytest.raises(ArgumentError, match=r"missing\.csv"):
            forge(*arguments, "missing.csv")

    def test_plan__machines_asked_for__are_the_only_ones_priced(self, home: Path) -> None:
        base = ("plan", "job.yaml", "-o", "json", "--set", "resources.gpu=auto")
        found = json.loads(forge(*base, "--region", "eu", "--spot", "--gpu", "L4").stdout)["bill"]["candidates"]
        assert {(one["gpu"], one["is_spot"]) for one in found} == {("L4", True)}
        assert all("eu" in one["region"] for one in found)
        (home / "aws.yaml").write_text(
            "name: spot\nprovider: aws\ngpu: L4\nworkers: 0..1\nregions: us-east-1\n"
            "usd_per_hour: {g6.xlarge: 9.0}\n"
        )
        found = json.loads(forge(*base, "--cluster", "aws.yaml").stdout)["bill"]["candidates"]
        assert {(one["region"], one["num_machines"], one["is_spot"]) for one in found} == {("us-east-1", 1, True)}
        assert {one["usd_per_hour"] for one in found if one["instance"] == "g6.xlarge"} == {9.0}
        with pytest.raises(ArgumentError, match="Sold are"):
            forge(*base, "--gpu", "H101")
        (home / "lab.yaml").write_text("name: lab\nprovider: ssh\nmachines: [a]\n")
        with pytest.raises(ArgumentError, match="rents no machines"):
            forge(*base, "--cluster", "lab.yaml")

    def test_plan__max_hours_of_zero__is_refused_with_its_line(self) -> None:
        done = CliRunner().invoke(app, ["plan", "job.yaml", "--set", "resources.max_hours=0"])
        assert "resources.max_hours" in str(done.exception) and "greater than 0" in str(done.exception)


def test_cluster_up__rented__shows_the_price_of_a_day_and_asks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gcp.yaml"
    file.write_text(
        "name: spot\nprovider: gcp\nproject: p-123456\ngpu: L4\nworkers: 0..4\nregions: us-central1-a\n"
    )
    cluster = cluster_of_file(file)
    with pytest.raises(ArgumentError, match="without confirmation"):
        _confirm_price(cluster, yes=False)
    text = capsys.readouterr().err
    assert re.search(r"'spot' costs [\d.]+ to [\d.]+ USD an hour, up to [\d.,]+ USD a day", text)
    assert "prices as of" in text
    _confirm_price(cluster, yes=True)
