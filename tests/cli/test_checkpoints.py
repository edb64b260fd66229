"""`forge checkpoints` in this process, on checkpoints of a made-up model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

from forge.api import load_run
from forge.checkpoint.intervals import Interval
from forge.checkpoint.manifest import state_bytes
from forge.cli.app import app
from forge.errors import ArgumentError, CheckpointError
from tests.support.checkpoints import SHAPES, model_shape, progress, values, write
from tests.support.runs import make_run


def forge(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["checkpoints", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with the checkpoints of steps 10, 20 and 30."""
    monkeypatch.chdir(tmp_path)
    folder = make_run(tmp_path / "runs")
    for step in (10, 20, 30):
        write(str(folder / "checkpoints"), step)
    return folder


def spoil(run: Path, step: int) -> None:
    part = next((run / "checkpoints" / f"step-{step:08d}").glob("part-00001-*"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)


@pytest.mark.parametrize("name", ["latest", "tiny", "runs/tiny-0101-000000-abcd"])
def test_list__run__newest_first(run: Path, name: str) -> None:
    lines = forge("list", name).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["step-00000030", "step-00000020", "step-00000010"]
    assert all(line.endswith("complete") for line in lines[1:])


@pytest.fixture
def scored(run: Path) -> Path:
    """A run whose best checkpoint is that of step 20, by accuracy."""
    for step, value in ((10, 0.5), (20, 0.75), (30, 0.25)):
        body = replace(progress(step), metric="eval/accuracy", metric_value=value, metric_direction="max")
        folder = run / "checkpoints" / f"step-{step:08d}"
        shutil.rmtree(folder)
        write(str(run / "checkpoints"), step, state=state_bytes(body, model_shape()).decode())
    return run


def test_list__evaluated_steps__marks_the_best(scored: Path) -> None:
    lines = [line for line in forge("list").stdout.splitlines() if line.endswith("complete")]
    assert ["(best)" in line for line in lines] == [False, True, False]
    assert "eval/accuracy 0.7500 (best)" in lines[1]
    found = json.loads(forge("list", "-o", "json").stdout)
    assert [(entry["step"], entry["is_best"], entry["metric_value"]) for entry in found] == [
        (30, False, 0.25),
        (20, True, 0.75),
        (10, False, 0.5),
    ]


def test_verify__step_best__is_the_best(scored: Path) -> None:
    done = forge("verify", "--step", "best", "-o", "json")
    assert [entry["name"] for entry in json.loads(done.stdout)] == ["step-00000020"]


def test_verify__step_best_of_steps_without_evaluation__says_how_to_have_one(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no best checkpoint.*keep_best: 1"):
        forge("verify", "--step", "best")


@pytest.mark.parametrize("step", ["0", "-1", "worst", "1e3", "٣"])
def test_verify__step_that_is_none__is_a_usage_error(run: Path, step: str) -> None:
    done = forge("verify", "--step", step)
    assert (done.exit_code, "neither a step from 1 on nor best" in done.output) == (2, True)


def test_best_checkpoint__run_of_the_api__is_the_one_that_the_list_marks(scored: Path) -> None:
    found = load_run(scored).best_checkpoint()
    assert found is not None
    assert (found.name, found.metric) == ("step-00000020", "eval/accuracy")


def test_list__folder_of_checkpoints__is_accepted(run: Path) -> None:
    assert forge("list", run / "checkpoints").stdout == forge("list").stdout


def test_list__json__has_every_field(run: Path) -> None:
    found = json.loads(forge("list", "-o", "json").stdout)
    assert [entry["step"] for entry in found] == [30, 20, 10]
    assert found[0]["num_parts"] == 2
    assert found[0]["num_tokens"] == 3000
    assert found[0]["problem"] is None
    assert found[0]["size_bytes"] > 0


def test_verify__flipped_byte__is_found(run: Path) -> None:
    spoil(run, 20)
    assert "broken" not in forge("list").output
    with pytest.raises(CheckpointError, match=r"1 of 3 checkpoints in .* are broken; a run resumes from step-0*30"):
        forge("verify")
    assert forge("verify", "--step", "30").exit_code == 0


def test_verify__json_with_broken_checkpoint__is_complete(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(run, 30)
    done = CliRunner().invoke(app, ["checkpoints", "verify", "-o", "json"])
    assert isinstance(done.exception, CheckpointError)
    problems = [entry["problem"] for entry in json.loads(done.stdout)]
    assert problems[1:] == [None, None]
    assert "part-00001" in problems[0]


def test_list__unreadable_checkpoint__has_its_reason(run: Path) -> None:
    (run / "checkpoints" / "step-00000020" / "manifest.json").write_text("{")
    line = next(line for line in forge("list").stdout.splitlines() if line.startswith("step-00000020"))
    assert "broken: manifest.json cannot be read" in line


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["list", "nothing"], ArgumentError, "no run 'nothing'"),
        (["verify", "latest", "--step", "15"], ArgumentError, "no checkpoint of step 15; it has steps: 30, 20, 10"),
        (["list", "nonsense://place"], CheckpointError, "nonsense"),
    ],
)
def test_checkpoints__missing_run_or_step__raises(
    run: Path, arguments: list[str], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        forge(*arguments)


def test_checkpoints__none_yet__says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs")
    assert "no checkpoints in" in forge("list").stderr
    with pytest.raises(CheckpointError, match="no checkpoints in"):
        forge("verify")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "out", "--shard-size", "much"], "--shard-size"),
        ([], "--to"),
        (["--to", "out", "--dtype", "fp8"], "--dtype"),
    ],
)
def test_export__invalid_options__are_refused(run: Path, arguments: list[str], message: str) -> None:
    done = forge("export", "latest", *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert not Path("out").exists()


@pytest.mark.slow
def test_export__user_model__writes_its_state_dict_and_says_how_to_load_it(run: Path) -> None:
    tied = {"head.weight": "embedding.weight"}
    write(str(run / "checkpoints"), 40, state=state_bytes(progress(40), replace(model_shape(), tied=tied)).decode())
    done = forge("export", "latest", "--to", "out", "--dtype", "fp32")
    assert "no config.json: model.safetensors holds its state dict" in done.stderr
    assert 'safetensors.torch.load_file("out/model.safetensors")' in done.output
    assert not Path("out/config.json").exists()
    written = load_file("out/model.safetensors")
    assert {name: array.shape for name, array in written.items()} == SHAPES | {"head.weight": (10, 6)}
    for name, array in written.items():
        whole = Interval(kind="master", name=tied.get(name, name), start=0, stop=array.size, dtype="F32")
        np.testing.assert_array_equal(array.ravel(), values(whole, step=40))
