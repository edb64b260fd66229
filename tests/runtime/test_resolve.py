"""forge.runtime.resolve: what the plan refuses is reported with its line of the job file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from forge.config.load import LoadedJob, load_job
from forge.errors import JobFileError
from forge.runtime.resolve import resolve_draft
from tests.support.jobs import tiny_job

MODELS = """\
from torch import nn

class Bigrams(nn.Module):
    def __init__(self, *, vocab_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, vocab_size)

    def forward(self, input_ids):
        return self.embedding(input_ids)

class Isolating(Bigrams):
    def forward(self, input_ids, position_ids=None):
        return super().forward(input_ids)
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "my_models.py").write_text(MODELS)
    return tmp_path


def packed_job(home: Path, *, name: str) -> LoadedJob:
    """A job whose examples share rows of a model of the user's own."""
    body = tiny_job().model_dump(mode="json", exclude_unset=True) | {"code": "./src"}
    body["model"] = {"class": f"my_models:{name}"}
    body["data"] |= {"packing": "examples"}
    (home / "job.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    return load_job(home / "job.yaml")


def test_resolve_draft__packing_without_isolation__names_the_line_and_what_to_use(home: Path) -> None:
    with pytest.raises(JobFileError, match=r"Bigrams takes no position_ids.*use none, or concatenate") as caught:
        resolve_draft(packed_job(home, name="Bigrams"))
    assert caught.value.key == "data.packing"
    assert "packing: examples" in (home / "job.yaml").read_text().splitlines()[(caught.value.line or 0) - 1]


def test_resolve_draft__packing_with_isolation__has_a_plan(home: Path) -> None:
    assert resolve_draft(packed_job(home, name="Isolating")).model.isolation_problem is None
