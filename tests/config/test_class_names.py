"""Keys that name a class: what is registered is accepted, what is not is refused with the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.config.load import load_job
from forge.data.formats.registry import FORMATS
from forge.data.sources.registry import SOURCES
from forge.errors import JobFileError
from forge.objective.registry import OBJECTIVES, RegisteredObjective

JOB = """\
name: small
model: {architecture: llama}
data: {source: SOURCE, format: FORMAT, packing: examples, seq_len: 64}
training:
  objective: OBJECTIVE
  total_steps: 10
  early_stopping: {metric: eval/METRIC, patience: 2}
"""


def job_file(folder: Path, **names: str) -> Path:
    text = JOB
    for name, default in {
        "SOURCE": "python-stdlib",
        "FORMAT": "text",
        "OBJECTIVE": "causal-lm",
        "METRIC": "loss",
    }.items():
        text = text.replace(name, names.get(name.lower(), default))
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def test_load_job__names_added_to_the_registries__are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = job_file(tmp_path, source="tapes", format="scored", objective="ranking", metric="hits")
    with pytest.raises(JobFileError, match=r"objective: must be 'causal-lm' or .*, or a class of your own"):
        load_job(path)
    monkeypatch.setitem(SOURCES, "tapes", "tapes:Tapes")
    monkeypatch.setitem(FORMATS, "scored", "scored:Scored")
    monkeypatch.setitem(
        OBJECTIVES, "ranking", RegisteredObjective(reference="r:R", metrics={"hits": "max"}, predicts_tokens=False)
    )
    job = load_job(path).job
    assert (job.data.source, job.data.format, job.training.objective) == ("tapes", "scored", "ranking")


def test_load_job__metric_that_the_registered_objective_lacks__is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"early_stopping.metric: .*eval/perplexity"):
        load_job(job_file(tmp_path, metric="hits"))


@pytest.mark.parametrize(
    ("key", "name", "nearest"),
    [
        ("source", "python_stdlib", "python-stdlib"),
        ("format", "txt", "text"),
        ("objective", "causal_lm", "causal-lm"),
    ],
)
def test_load_job__misspelt_name__is_refused_with_the_nearest(
    tmp_path: Path, key: str, name: str, nearest: str
) -> None:
    with pytest.raises(JobFileError) as caught:
        load_job(job_file(tmp_path, **{key: name}))
    assert f".{key}: must be '{nearest}'" in str(caught.value)
    assert f"(got {name}); did you mean '{nearest}'?" in str(caught.value)
