"""`forge plan` with a limit, and `forge scaling`: what they print and write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from forge.cli.app import app
from forge.config.load import load_job
from forge.errors import ArgumentError, PlanError
from forge.events import RunFinished
from forge.plan.scaling import HOFFMANN, ModelScale
from forge.plan.scaling_fit import RunPoint, fit_law
from forge.runs.scaling_runs import write_law
from tests.support.runs import make_run

CLUSTER = """
name: rented
provider: aws
gpu: H100
regions: [us-east-1]
instance_types: [p5.48xlarge]
workers: 0..4
spot: false
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    return tmp_path


def forge(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def law_points(count: int = 4) -> list[RunPoint]:
    scales = [ModelScale(num_parameters=1e5 * 2**step, num_tokens=1e6 * 2**step) for step in range(count)]
    return [
        RunPoint(
            name=f"run-{i}",
            num_parameters=round(scale.num_parameters),
            num_tokens=round(scale.num_tokens),
            loss=HOFFMANN.loss(scale),
        )
        for i, scale in enumerate(scales)
    ]


def test_plan__budget__shows_every_law_and_writes_the_job(folder: Path) -> None:
    done = forge("plan", "--budget", "5000usd")
    assert done.exit_code == 0
    for text in ("approach 3 corrected", "approach 1", "Kaplan 2020", "USD", "time", "loss"):
        assert text in done.stdout
    assert "prices as of" in done.stderr
    (written,) = folder.glob("sized-*.yaml")
    job = load_job(written).job
    assert job.resources.max_usd == 5000
    assert job.training.total_tokens


def test_plan__json__has_the_numbers_of_the_job(folder: Path) -> None:
    done = forge("plan", "--flops", "1e20", "-o", "json", "--write", "mine.yaml")
    found = json.loads(done.stdout)
    assert found["flops"] == pytest.approx(1e20)
    assert found["loss"]["low"] < found["loss"]["likely"] < found["loss"]["high"]
    assert load_job(folder / "mine.yaml").job.training.total_tokens == found["num_tokens"]


def test_plan__hours_on_a_cluster_file__all_its_workers(folder: Path) -> None:
    (folder / "cluster.yaml").write_text(CLUSTER)
    done = forge("plan", "--hours", "12", "--cluster", "cluster.yaml", "-o", "json")
    found = json.loads(done.stdout)
    assert (found["num_gpus"], found["gpu"]) == (32, "H100-80GB")
    assert 10 < found["hours"]["likely"] <= 12.1
    assert "us-east-1" in found["machines"]


def test_plan__more_hours_than_the_largest_model_that_fits__says_so() -> None:
    done = forge("plan", "--hours", "10000", "--gpu", "L4", "--gpus", "1")
    assert "larger models do not fit on these GPUs, so 10,000.0 hours are not used up" in done.stderr


def test_plan__spot_or_not__stands_beside_the_machines(folder: Path) -> None:
    for options, kind in (((), "on demand"), (("--spot",), "spot")):
        done = forge("plan", "--flops", "1e19", "--gpu", "L4", "-o", "json", *options)
        assert f"({json.loads(done.stdout)['num_gpus']} L4), {kind}, " in json.loads(done.stdout)["machines"]


def test_plan__written_again__says_that_the_file_is_replaced(folder: Path) -> None:
    assert "wrote job.yaml" in forge("plan", "--flops", "1e19", "--write", "job.yaml").stderr
    assert "replaced job.yaml" in forge("plan", "--flops", "2e19", "--write", "job.yaml").stderr


def test_plan__law_of_own_runs__used_instead_of_the_published_one(folder: Path) -> None:
    write_law(folder / "law.yaml", fit_law(law_points()), runs=law_points())
    done = forge("plan", "--flops", "1e19", "--law", "law.yaml", "-o", "json")
    assert json.loads(done.stdout)["law"] == "your runs"


def test_plan__file_of_somebody_else__not_overwritten(folder: Path) -> None:
    (folder / "job.yaml").write_text("name: mine\n")
    with pytest.raises(ArgumentError, match="was not written by forge plan"):
        forge("plan", "--flops", "1e20", "--write", "job.yaml")
    assert (folder / "job.yaml").read_text() == "name: mine\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--budget", "5eur"), "'5eur' is not a positive number of USD"),
        (("--budget", "0usd"), "is not a positive number of USD"),
        (("--budget", "nan"), "is not a positive number of USD"),
        (("--flops", "1e999"), "is not a positive number of FLOPs"),
        (("--flops", "1e31"), "up to 1e+30"),
        (("--budget", "1e300usd"), "up to 1e+12"),
        (("--hours", "9999999h", "--gpu", "H100", "--gpus", "8"), "longer than 1,000,000 hours"),
        (("--hours", "24h"), "hours of which GPUs"),
        (("--hours", "soon", "--gpu", "H100", "--gpus", "8"), "is not a duration"),
        (("--budget", "5", "--flops", "1e20"), "give one of"),
        (("--gpu", "H100"), "give a job file"),
        (("--gpus", "8"), "--gpus is for choosing a size; give one of"),
        (("--budget", "5", "--trace", "spot.csv"), "--trace: a size is chosen first"),
        (("--budget", "5", "--candidates", "5"), "--candidates: a size is chosen first"),
        (("--budget", "5", "--set", "data.seq_len=512"), "--set: there is no job FILE"),
        (("--budget", "5", "--gpus", "0"), "at least 1"),
        (("--hours", "1h", "--gpu", "H100", "--gpus", "99999999"), "at most 16,384"),
        (("--budget", "5", "--inference-tokens", "many"), "is not a number"),
        ((), "give a job file"),
    ],
)
def test_plan__wrong_options__usage_error(arguments: tuple[str, ...], problem: str) -> None:
    done = forge("plan", *arguments)
    assert done.exit_code == 2
    assert problem in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--budget", "5usd", "--gpu", "H1000"), "did you mean"),
        (("--budget", "5usd", "--region", "atlantis"), "is sold in the region"),
        (("--budget", "1e-9usd", "--gpu", "L4"), "too little"),
        (("--flops", "1e27", "--gpu", "L4", "--gpus", "8"), "fits on none"),
    ],
)
def test_plan__impossible__error_says_what_would_be_possible(arguments: tuple[str, ...], problem: str) -> None:
    with pytest.raises((ArgumentError, PlanError), match=problem):
        forge("plan", *arguments)


def test_scaling__runs__fits_writes_and_predicts(folder: Path) -> None:
    names = [f"tiny-0101-000000-aaa{i}" for i in range(4)]
    for steps, name in zip((10, 20, 40, 80), names, strict=True):
        make_run(folder / "runs", name, steps=steps, endings=[RunFinished(step=steps)])
    done = forge("scaling", "law.yaml", *names, "-o", "json")
    found = json.loads(done.stdout)
    assert [run["num_tokens"] for run in found["runs"]] == [192 * steps for steps in (10, 20, 40, 80)]
    assert found["held_out"]["name"] == names[-1]
    assert found["predictions"]["next size"]["num_tokens"] == 192 * 160
    assert any("one number of parameters" in note for note in found["notes"])
    again = forge("scaling", "law.yaml", "--parameters", "10M", "--tokens", "1B", "--flops", "1e18")
    assert again.exit_code == 0
    for text in ("next size", "asked for", "best for 1e18 FLOPs", names[0]):
        assert text in again.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("law.yaml",), "there is no file law.yaml"),
        (("law.yaml", "no-such-run"), "no-such-run"),
        (("runs",), "not the file of a law"),
    ],
)
def test_scaling__wrong_arguments__error(arguments: tuple[str, ...], problem: str, folder: Path) -> None:
    (folder / "runs").mkdir()
    with pytest.raises(ArgumentError, match=problem):
        forge("scaling", *arguments)


def test_scaling__run_given_as_file__refused(folder: Path) -> None:
    names = ["runs/tiny-0101-000000-aaaa", "runs/tiny-0101-000000-bbbb"]
    for name in names:
        make_run(folder, name, steps=10, endings=[RunFinished(step=10)])
    with pytest.raises((ArgumentError, PlanError)):
        forge("scaling", *names)
