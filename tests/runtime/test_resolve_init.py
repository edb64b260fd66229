"""`model.init_from`: which checkpoint it stands for, what the plan says, and what is refused."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from forge.checkpoint.manifest import state_bytes
from forge.config.load import LoadedJob, load_job
from forge.errors import JobFileError
from forge.plan.curve import curve_differences
from forge.runtime.resolve_init import init_info, with_init
from tests.support.checkpoints import model_shape, progress, write
from tests.support.runs import make_run

JOB = """
name: tuned
model: {{init_from: {source}}}
data: {{source: python-stdlib, seq_len: 16}}
training: {{total_steps: 3, global_batch_size: 12}}
"""
RUN = "first-0101-000000-abcd"


def job_from(folder: Path, source: object, *overrides: str) -> LoadedJob:
    path = folder / "job.yaml"
    path.write_text(JOB.format(source=source))
    return load_job(path, overrides=[f"checkpoint.to={folder}", *overrides])


def add_checkpoint(run: Path, step: int, value: float | None) -> str:
    scored = replace(progress(step), metric="" if value is None else "eval/loss", metric_value=value)
    write(str(run / "checkpoints"), step, state=state_bytes(scored, model_shape()).decode(), keep=9)
    return str(run / "checkpoints" / f"step-{step:08d}")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path, RUN)


@pytest.mark.parametrize(
    ("values", "expected", "is_best"),
    [([3.0, 1.0, 2.0], 2, True), ([None, None], 2, False), ([3.0, None], 1, True)],
)
@pytest.mark.parametrize("form", ["id", "prefix", "latest", "folder", "checkpoints"])
def test_with_init__run__is_its_best_checkpoint_else_its_newest(
    tmp_path: Path, run: Path, values: list[float | None], expected: int, is_best: bool, form: str
) -> None:
    paths = [add_checkpoint(run, step, value) for step, value in enumerate(values, start=1)]
    names = {"id": RUN, "prefix": "first", "latest": "latest", "folder": run, "checkpoints": run / "checkpoints"}
    loaded = with_init(job_from(tmp_path, names[form]))
    assert (loaded.job.model.init_from, loaded.job.model.from_pretrained) == (None, paths[expected - 1])
    assert loaded.job.data.tokenizer.from_pretrained == str(run / "tokenizer")
    found = init_info(loaded.job.model.from_pretrained)
    assert found is not None
    assert (found.step, found.is_best, found.metric_value) == (expected, is_best, values[expected - 1])
    assert len(found.digest) == 32


def test_with_init__one_checkpoint__is_that_one(tmp_path: Path, run: Path) -> None:
    first, _ = add_checkpoint(run, 1, 3.0), add_checkpoint(run, 2, 1.0)
    assert with_init(job_from(tmp_path, first)).job.model.from_pretrained == first
    relative = os.path.relpath(first)
    assert Path(with_init(job_from(tmp_path, relative)).job.model.from_pretrained or "").samefile(first)


def test_with_init__exported_folder__is_from_pretrained(tmp_path: Path) -> None:
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").write_text("{}")
    job = with_init(job_from(tmp_path, tmp_path / "exported")).job
    assert (job.model.from_pretrained, job.data.tokenizer.from_pretrained) == (str(tmp_path / "exported"),) * 2
    assert init_info(job.model.from_pretrained) is None


def test_with_init__resumed_run__keeps_the_checkpoint_that_it_started_from(tmp_path: Path, run: Path) -> None:
    add_checkpoint(run, 1, 3.0)
    started = with_init(job_from(tmp_path, RUN))
    resumed = make_run(tmp_path, "tuned-0101-000000-abcd")
    plan = json.loads((resumed / "plan.json").read_text())
    plan["job"] = started.job.model_dump(mode="json")
    (resumed / "plan.json").write_text(json.dumps(plan))
    add_checkpoint(run, 2, 1.0)
    again = with_init(job_from(tmp_path, RUN), resume=resumed)
    assert curve_differences(started.job, again.job) == []
    assert curve_differences(started.job, with_init(job_from(tmp_path, RUN)).job) != []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nothing-here", "no run 'nothing-here'"),
        (RUN, "has no complete checkpoint (none at all)"),
        ("~nobody-of-this-name/runs", "nobody-of-this-name"),
    ],
)
def test_with_init__nothing_to_start_from__names_the_line(
    tmp_path: Path, run: Path, source: str, said: str
) -> None:
    with pytest.raises(JobFileError) as caught:
        with_init(job_from(tmp_path, source))
    assert (caught.value.line, caught.value.key) == (3, "model.init_from")
    assert said in str(caught.value)


def test_with_init__checkpoint_of_a_hostile_run_folder__is_not_followed(tmp_path: Path, run: Path) -> None:
    outside = tmp_path / "outside"
    add_checkpoint(outside, 1, 1.0)
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "step-00000001").symlink_to(outside / "checkpoints" / "step-00000001")
    with pytest.raises(JobFileError, match=r"has no complete checkpoint.*link"):
        with_init(job_from(tmp_path, RUN))


def test_with_init__state_is_not_that_of_a_checkpoint__is_refused(tmp_path: Path, run: Path) -> None:
    path = Path(add_checkpoint(run, 1, 1.0))
    state = next(path.glob("state-*"))
    state.write_text(state.read_text().replace("eval/loss", "eval/lost"))
    with pytest.raises(JobFileError, match=r"has no complete checkpoint.*does not match its checksum"):
        with_init(job_from(tmp_path, RUN))


def test_job__init_from_beside_another_origin__is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        JobFileError, match=r"give one of 'architecture', 'from_pretrained', 'init_from' and 'class'"
    ):
        job_from(tmp_path, "latest", "model.architecture=llama")


def test_job__init_from_and_a_tokenizer_of_its_own__is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"the embeddings of model.init_from do not know its ids"):
        job_from(tmp_path, "latest", "data.tokenizer.vocab_size=300")


def test_init_info__value_that_is_not_a_number__is_unknown(tmp_path: Path, run: Path) -> None:
    add_checkpoint(run, 1, None)
    found = init_info(with_init(job_from(tmp_path, RUN)).job.model.from_pretrained)
    assert found is not None
    assert (found.metric_value, math.isfinite(found.step)) == (None, True)
