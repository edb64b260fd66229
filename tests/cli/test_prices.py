"""`forge prices`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from forge.cli.app import app
from forge.errors import ArgumentError


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))


def prices(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["prices", *arguments])


def test_prices__gpu__table_with_places_and_the_day() -> None:
    result = prices("H100", "--spot", "--region", "eu", "--max-interruption", "10%")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "H100-80GB  spot"
    assert lines[1].split()[:3] == ["cloud", "region", "machine"] and lines[1].endswith("as of")
    assert lines[2].split()[:5] == ["aws", "eu-north-1", "(eun1-az3)", "p5.48xlarge", "8"]
    assert lines[2].endswith("2026-04-01")
    assert "CO2" not in lines[1], "no grid is known there"
    assert "aws: prices as of 2025-06-28" in result.stderr and "days old" in result.stderr


def test_prices__without_gpu__each_gpu_once() -> None:
    result = prices("-o", "json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    gpus = [offer["gpu"] for offer in found["offers"]]
    assert len(gpus) == len(set(gpus)) >= 12
    per_hour = [offer["usd_per_gpu_hour"] for offer in found["offers"]]
    assert per_hour == sorted(per_hour)
    assert any("prices as of" in note for note in found["notes"])


def test_prices__limit__says_how_many_more() -> None:
    result = prices("L4", "--limit", "2")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 4
    assert "more places: --limit" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("H101",), "no cloud that forge knows sells the GPU 'H101'"),
        (("H100", "--spot", "--max-interruption", "often"), "--max-interruption 'often' is not a fraction"),
        (("H100", "--spot", "--max-interruption", "10"), "10 is 1,000%, more than all; write it like 10% or 0.1"),
        (("H100", "--region", " "), "the region is empty"),
        (("H100", "--max-interruption", "10%"), "add --spot"),
    ],
)
def test_prices__bad_input__is_an_argument_error(arguments: tuple[str, ...], message: str) -> None:
    result = prices(*arguments)
    assert isinstance(result.exception, ArgumentError)
    assert message in str(result.exception)


def test_prices__max_interruption__says_whose_are_unknown() -> None:
    result = prices("H100", "--spot", "--max-interruption", "10%", "-o", "json")
    found = json.loads(result.stdout)
    assert {offer["cloud"] for offer in found["offers"]} == {"aws"}
    assert any("whose interruptions are not published (gcp)" in note for note in found["notes"])
