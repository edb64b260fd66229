"""forge.api: what a run gives back to Python users. `tests/cli` and `tests/runtime` start runs."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forge
from forge import api
from forge.config.dump import dump_job
from forge.errors import ArgumentError
from forge.events import Evaluated, RunFinished, RunStopped, event_to_record
from forge.inference.answer_request import AnswerConfig
from tests.support.checkpoints import write
from tests.support.jobs import tiny_job
from tests.support.runs import make_run, metrics


def evaluated(step: int, loss: float) -> Evaluated:
    return Evaluated(
        step=step, loss=loss, metrics={"perplexity": math.exp(loss)}, num_tokens=100, weights="current", seconds=0.1
    )


def test_metrics__recorded_steps__one_float_array_per_metric(tmp_path: Path) -> None:
    make_run(tmp_path, "run", steps=3, endings=[RunFinished(step=3)])
    arrays = forge.load_run("run", root=tmp_path).metrics()
    assert arrays["step"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(arrays["train/loss"], [5.0, 2.5, 5 / 3])
    assert np.isnan(arrays["speed/mfu"]).all()  # recorded as null
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float64)}


@pytest.mark.parametrize(
    ("evaluations", "best"),
    [
        ([evaluated(10, 2.5), evaluated(20, 1.5), evaluated(30, 2.0)], 20),
        ([evaluated(5, 0.5), evaluated(20, 1.5)], 20),  # step 5 has no checkpoint
        ([], 30),  # the newest, if none was evaluated
    ],
)
def test_best_checkpoint__evaluations__lowest_held_out_loss(
    tmp_path: Path, evaluations: list[Evaluated], best: int
) -> None:
    folder = make_run(tmp_path, "run", steps=0, endings=evaluations)
    for step in (10, 20, 30):
        write(str(folder / "checkpoints"), step)
    found = forge.load_run("run", root=tmp_path).best_checkpoint()
    assert found is not None
    assert found.step == best


def test_best_checkpoint__broken_checkpoint__is_skipped(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "run", steps=0, endings=[evaluated(10, 2.0), evaluated(20, 1.0)])
    for step in (10, 20):
        write(str(folder / "checkpoints"), step)
    next((folder / "checkpoints").glob("step-*20/*.safetensors")).unlink()
    found = forge.load_run("run", root=tmp_path).best_checkpoint()
    assert found is not None
    assert found.step == 10


def test_best_checkpoint__no_checkpoints__is_none(tmp_path: Path) -> None:
    make_run(tmp_path, "run")
    assert forge.load_run("run", root=tmp_path).best_checkpoint() is None


def test_load_run__unknown_name__lists_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))  # the runs of other tests are in no index
    make_run(tmp_path, "run")
    with pytest.raises(ArgumentError, match="its runs are run"):
        forge.load_run("other", root=tmp_path)


class _Ended:
    """A handle of a run whose driver ends while it is followed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def is_alive(self) -> bool:
        return False

    def wait(self) -> None:
        return None


def test_resume_run__stopped__starts_it_again_and_passes_on_new_records_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path, "run", steps=3, endings=[RunStopped(step=3)])
    (folder / "job.yaml").write_text(dump_job(tiny_job()))
    started: dict[str, Any] = {}

    def start(loaded: Any, **options: Any) -> _Ended:
        started.update(options)
        with (folder / "events.jsonl").open("a") as file:
            record = {"time": time.time()} | event_to_record(RunFinished(step=6))
            file.write(json.dumps(record) + "\n")
        return _Ended(folder)

    monkeypatch.setattr(api, "start", start)
    records: list[dict[str, Any]] = []
    run = forge.resume_run("run", root=tmp_path, on_record=records.append)
    assert started["resume"] == folder
    assert [record["event"] for record in records] == ["RunFinished"]
    assert run.status == "finished"


@pytest.mark.parametrize("overrides", [["training.optimizer.lr=0.5"], ["data.seed=99"]])
def test_resume_run__other_loss_curve__raises(tmp_path: Path, overrides: list[str]) -> None:
    folder = make_run(tmp_path, "run", endings=[RunStopped(step=3)])
    (folder / "job.yaml").write_text(dump_job(tiny_job()))
    with pytest.raises(ArgumentError, match="cannot resume run"):
        forge.resume_run("run", root=tmp_path, overrides=overrides)


def test_attach_run__not_running__returns_it_at_once(tmp_path: Path) -> None:
    make_run(tmp_path, "run", endings=[RunStopped(step=3)])
    assert forge.attach_run("run", root=tmp_path).status == "stopped"


def test_attach_run__running__passes_on_new_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path, "run", steps=3, endings=[RunStopped(step=3)])

    def find(_: Path) -> _Ended:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics(4).as_record() | {"time": time.time()}) + "\n")
        return _Ended(folder)

    monkeypatch.setattr(api, "find_run_handle", find)
    records: list[dict[str, Any]] = []
    forge.attach_run("run", root=tmp_path, on_record=records.append)
    assert [record["step"] for record in records] == [4]


def test_generate__options__reach_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, "run")
    asked: list[dict[str, Any]] = []

    def answers(config: dict[str, Any], records: list[Any], **_: Any) -> dict[str, Any]:
        asked.append({**config, "records": records})
        return {"answers": [{"text": "b"}]}

    monkeypatch.setattr(api, "answer_prompts", answers)
    assert forge.load_run("run", root=tmp_path).generate("a", step=3, chat=True, temperature=0.0) == "b"
    [found] = asked
    assert found.pop("records") == [{"prompt": "a"}]
    assert AnswerConfig(**found).sampling == {"temperature": 0.0}
    assert found["step"] == 3 and found["chat"]


def test_load_job__sections__are_attributes_of_the_loaded_job(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(dump_job(tiny_job()))
    loaded = forge.load_job(tmp_path / "job.yaml", ["training.total_steps=7"])
    assert loaded.training.total_steps == 7
    for section in type(loaded.job).model_fields.keys() - {"code"}:  # `loaded.code` is the packed code
        assert getattr(loaded, section) == getattr(loaded.job, section)


def test_history__recorded_steps__one_dict_each(tmp_path: Path) -> None:
    make_run(tmp_path, "run", steps=2)
    run = forge.load_run("run", root=tmp_path)
    assert [record["step"] for record in run.history()] == [1, 2]
    assert run.history()[0]["train/loss"] == run.metrics()["train/loss"][0]


def test_train_job__no_callback__prints_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path, "run", steps=6, endings=[RunFinished(step=6)])

    class Handle:
        """A run that has ended."""

        def __init__(self) -> None:
            self.folder = folder

        def is_alive(self) -> bool:
            return False

        def wait(self) -> None:
            pass

    monkeypatch.setattr(api, "start", lambda *_, **__: Handle())
    (tmp_path / "job.yaml").write_text(dump_job(tiny_job()))
    forge.train_job(tmp_path / "job.yaml")
    assert "step      6/6  loss " in capsys.readouterr().err
    forge.train_job(tmp_path / "job.yaml", on_record=forge.quiet)
    assert capsys.readouterr() == ("", "")
