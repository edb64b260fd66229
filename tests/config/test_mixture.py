from __future__ import annotations

from typing import Any

import pytest

from forge.config.dump import dump_job
from forge.config.load import load_job_text
from forge.errors import JobFileError
from forge.plan.curve import config_digest, curve_differences
from tests.support.jobs import tiny_job

JOB = """\
name: mixed
model: {architecture: llama}
data:
  seq_len: 64
  mixture:
    - name: code
      source: python-stdlib
      weight: 70%
    - name: prose
      files: [a.txt, b.txt]
      weight: 0.3
training:
  total_steps: 5
  global_batch_size: 4
  optimizer: {lr: 1.0e-3}
"""


def problems(old: str, new: str) -> str:
    text = JOB.replace(old, new)
    assert text != JOB
    with pytest.raises(JobFileError) as caught:
        load_job_text(text, path="job.yaml")
    return str(caught.value)


def test_load_job__mixture__gives_a_section_for_each_part() -> None:
    loaded = load_job_text(JOB, path="job.yaml")
    assert [part.weight for part in loaded.data.mixture] == [0.7, 0.3]
    code, prose = loaded.data.parts
    assert (code.source, code.files, prose.source, prose.files) == ("python-stdlib", None, None, ("a.txt", "b.txt"))
    assert code.seq_len == prose.seq_len == 64
    assert load_job_text(dump_job(loaded.job), path="again.yaml").job == loaded.job


@pytest.mark.parametrize("weight", ["0", "-1", ".nan", ".inf", "1e300", "1e10", "[1]", "much", "true", "''"])
def test_load_job__weight_of_no_use__names_the_line(weight: str) -> None:
    found = problems("weight: 0.3", f"weight: {weight}")
    assert "job.yaml:11: data.mixture[1].weight" in found


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: prose", "name: code", "job.yaml:9: data.mixture[1].name: is the name of mixture[0] too (got code)"),
        ("name: prose", "name: ../prose", "job.yaml:9: data.mixture[1].name: must be 1 to 40 lower-case letters"),
        ("name: prose", "wieght: 3", "did you mean 'weight'"),
        (
            "weight: 0.3",
            "format: chat",
            "job.yaml:11: data.mixture[1].format: unknown key here; it belongs to 'data'",
        ),
        ("weight: 0.3", "passes: 2", "data.mixture[1]: has 'passes', but other parts have 'weight'"),
        ("      weight: 0.3\n", "", "data.mixture[1]: lacks 'weight'; give it in every part or in none"),
        (
            "weight: 0.3",
            "weight: 1\n      passes: 1",
            "job.yaml:12: data.mixture[1].passes: is instead of 'weight'",
        ),
        ("      files: [a.txt, b.txt]\n", "", "give one of 'source', 'files' and 'dataset'"),
        ("files: [a.txt, b.txt]", "files: []", "data.mixture[1].files: must name at least one file or glob"),
        ("files: [a.txt, b.txt]", "split: test", "data.mixture[1].split"),
        ("  seq_len: 64", "  files: c.txt", "job.yaml:5: data.mixture: is instead of 'files'"),
        ("  seq_len: 64", "  source: python-stdlib", "is instead of 'source'; make that a part of it"),
    ],
)
def test_load_job__wrong_mixture__names_key_and_line(old: str, new: str, said: str) -> None:
    assert said in problems(old, new)


def test_load_job__mixture_that_is_no_list__says_so() -> None:
    text = JOB.split("  mixture:")[0] + "  mixture: {code: 1}\ntraining:" + JOB.split("training:")[1]
    with pytest.raises(JobFileError, match=r"data\.mixture: must be a list of parts"):
        load_job_text(text, path="job.yaml")


def test_load_job__labels_of_a_mixture_without_names__are_refused() -> None:
    found = problems("  seq_len: 64", "  seq_len: 64\n  format: labelled")
    assert "data.labels.names" in found and "must number the same labels alike" in found


@pytest.mark.parametrize(("metric", "is_known"), [("eval/loss/code", True), ("eval/loss/other", False)])
def test_load_job__early_stopping_by_a_part__must_name_one(metric: str, is_known: bool) -> None:
    text = JOB + f"  early_stopping: {{metric: {metric}, patience: 2}}\n"
    if is_known:
        assert load_job_text(text, path="job.yaml").training.early_stopping is not None
        return
    with pytest.raises(JobFileError, match=r"did you mean 'eval/loss/(code|prose)'"):
        load_job_text(text, path="job.yaml")


def test_curve_differences__another_weight__is_named_by_its_part() -> None:
    def job(weight: float) -> Any:
        parts = [{"name": "a", "files": "a.txt", "weight": 1}, {"name": "b", "files": "b.txt", "weight": weight}]
        return tiny_job(data={"mixture": parts, "seq_len": 16})

    (found,) = curve_differences(job(1), job(2))
    assert str(found) == "data.mixture.b.weight changed from 1.0 to 2.0"
    assert config_digest(job(1), code=None) != config_digest(job(2), code=None)
