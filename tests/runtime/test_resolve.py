"""forge.runtime.resolve: what the plan refuses is reported with its line of the job file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from forge.config.load import LoadedJob, load_job
from forge.errors import JobFileError
from forge.runtime.resolve import resolve_draft
from forge.runtime.resolve_tokenizer import check_tokenizer
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


@pytest.mark.slow
def test_resolve_draft__packing_without_isolation__names_the_line_and_what_to_use(home: Path) -> None:
    with pytest.raises(JobFileError, match=r"Bigrams takes no position_ids.*use none, or concatenate") as caught:
        resolve_draft(packed_job(home, name="Bigrams"))
    assert caught.value.key == "data.packing"
    assert "packing: examples" in (home / "job.yaml").read_text().splitlines()[(caught.value.line or 0) - 1]


@pytest.mark.slow
def test_resolve_draft__packing_with_isolation__has_a_plan(home: Path) -> None:
    assert resolve_draft(packed_job(home, name="Isolating")).model.isolation_problem is None


def pretrained_job(home: Path, *, base: str, tokenizer: str | None = None) -> LoadedJob:
    body = tiny_job().model_dump(mode="json", exclude_unset=True)
    body["model"] = {"from_pretrained": base}
    body["data"]["tokenizer"] = {} if tokenizer is None else {"from_pretrained": tokenizer}
    (home / "job.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    return load_job(home / "job.yaml")


def save_tokenizer(folder: Path, words: list[str]) -> None:
    folder.mkdir()
    made = Tokenizer(
        WordLevel({"<eos>": 0} | {word: i for i, word in enumerate(words, start=1)}, unk_token="<eos>")
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')


def test_check_tokenizer__same_or_longer_vocabulary__has_nothing_to_say(home: Path) -> None:
    save_tokenizer(home / "base", ["a", "b"])
    save_tokenizer(home / "longer", ["a", "b", "<user>"])
    assert check_tokenizer(pretrained_job(home, base="./base")) == ()
    assert check_tokenizer(pretrained_job(home, base="./base", tokenizer="./longer")) == ()


def test_check_tokenizer__other_ids_than_the_bases_own__are_counted(home: Path) -> None:
    save_tokenizer(home / "base", ["a", "b", "c"])
    save_tokenizer(home / "other", ["b", "a", "c"])
    said = r"2 of the 4 tokens .* \('a': id 1 there, id 2 here\), so the embeddings would be those of other tokens"
    with pytest.raises(JobFileError, match=said) as caught:
        check_tokenizer(pretrained_job(home, base="./base", tokenizer="./other"))
    assert caught.value.key == "data.tokenizer.from_pretrained"
    assert caught.value.line is not None


def test_check_tokenizer__missing_base__is_named_before_its_tokenizer(home: Path) -> None:
    with pytest.raises(JobFileError, match=r"ORG/model does not exist \(looked in .*hf download") as caught:
        check_tokenizer(pretrained_job(home, base="ORG/model"))
    assert caught.value.key == "model.from_pretrained" and "data.tokenizer" not in caught.value.problem
    assert caught.value.line is not None


def test_check_tokenizer__base_is_a_file__says_to_give_its_folder(home: Path) -> None:
    save_tokenizer(home / "base", ["a"])
    with pytest.raises(JobFileError, match=r"base/tokenizer_config\.json is a file; give the folder of the model"):
        check_tokenizer(pretrained_job(home, base="./base/tokenizer_config.json"))


def test_check_tokenizer__base_without_one__is_blamed_or_said(home: Path) -> None:
    (home / "base").mkdir()
    save_tokenizer(home / "other", ["a"])
    with pytest.raises(JobFileError, match=r"no tokenizer is given in data\.tokenizer, and that of .*") as caught:
        check_tokenizer(pretrained_job(home, base="./base"))
    assert caught.value.key == "model.from_pretrained"
    note = check_tokenizer(pretrained_job(home, base="./base", tokenizer="./other"))
    assert note == ("the tokenizer ./other is not compared with that of ./base, which has none that forge reads",)
