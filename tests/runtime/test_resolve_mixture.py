"""What plans and dry runs of a mixture say, without a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge.config.load import load_job
from forge.data.cache_index import Column
from forge.data.further_columns import FurtherColumns, add_columns, record_type
from forge.data.prepare import open_rows
from forge.data.view import Selection
from forge.errors import ArgumentError, DataError, JobFileError
from forge.foreign import from_record
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import DraftPlan, Plan, plan_from_json, plan_to_json
from forge.report.text import plan_facts
from forge.runs.create import create_run, reopen_run
from forge.runtime import resolve, resolve_outputs
from forge.runtime.resolve import inspect_data, resolve_draft, with_data_folder
from forge.runtime.resolve_outputs import with_outputs
from tests.support.jobs import tiny_facts

JOB = """\
name: tiny
model: {architecture: llama}
data:
  mixture:
    - {name: news, files: news.jsonl, weight: 3}
    - {name: mail, files: mail.jsonl, weight: 1}
  seq_len: 16
  held_out: 10%
  tokenizer: {vocab_size: 300}
training: {total_steps: 40, global_batch_size: 8, optimizer: {lr: 1.0e-2}}
resources: {workers: 1, gpu: none}
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        resolve,
        "inspect_model",
        lambda *_, vocabulary, **__: tiny_facts(vocab_size=vocabulary.size, max_seq_len=64),
    )
    Path("job.yaml").write_text(JOB)
    write("news.jsonl", *(f"news number {i} of the day {i * i}" for i in range(200)))
    write("mail.jsonl", *(f"mail number {i} for you {i * i}" for i in range(12)))
    yield


def write(name: str, *texts: str) -> None:
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def draft(*overrides: str) -> DraftPlan:
    return resolve_draft(load_job("job.yaml", overrides=overrides))


def test_plan__mixture__shows_every_part_and_warns_of_repetition() -> None:
    plan = draft()
    assert isinstance(plan, Plan)
    rows = dict(plan_facts(plan))
    assert rows["part news"].startswith("75.00% of the sequences, ")
    assert rows["part mail"].startswith("25.00% of the sequences, ") and "12 records" in rows["part mail"]
    mail = plan.corpus.parts[1].corpus.num_train_sequences
    assert f"{80 / mail:.2f} passes" in rows["part mail"]
    assert any(f"part mail of the mixture is read {80 / mail:.1f} times" in warning for warning in plan.warnings)
    assert not any("part news" in warning for warning in plan.warnings)
    again = plan_from_json(plan_to_json(plan))
    assert again.corpus == plan.corpus and again.view == plan.view


def test_draft__mixture_that_is_not_prepared__shows_a_sample_of_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "_SMALL_BYTES", 10)
    plan = draft()
    assert not isinstance(plan, Plan) and plan.view is not None
    assert plan.view.num_sampled_records == 212
    assert [(part.name, part.asked) for part in plan.view.parts] == [("news", 0.75), ("mail", 0.25)]
    assert dict(plan_facts(plan))["part mail"].startswith("25.00% of the sequences")
    assert not Path("cache/data").exists()


def test_plan__a_part_that_cannot_be_read__names_its_line() -> None:
    write("mail.jsonl", "fine")
    with Path("mail.jsonl").open("a") as file:
        file.write('{"body": "no text"}\n')
    with pytest.raises(
        DataError, match=r"^job.yaml:6: data.mixture\[1\]: part mail: .*mail.jsonl:2: no key 'text'"
    ):
        draft()
    Path("mail.jsonl").unlink()
    with pytest.raises(DataError, match=r"^job.yaml:6: data.mixture\[1\]: part mail: .*matches no file"):
        draft()


def test_plan__a_weight_that_gives_no_sequence__names_its_line() -> None:
    Path("job.yaml").write_text(JOB.replace("weight: 3", "weight: 1000000"))
    with pytest.raises(JobFileError, match=r"job.yaml:6: data.mixture\[1\].weight: gives part mail none of 65,536"):
        draft()


def test_inspect_data__mixture__shows_the_examples_of_one_part() -> None:
    view = inspect_data(load_job("job.yaml"), selection=Selection(part="mail", index=0, count=2))
    assert [(example.of_part, example.index) for example in view.examples] == [("mail", 0), ("mail", 1)]
    with pytest.raises(ArgumentError, match="give one with --part: news, mail"):
        inspect_data(load_job("job.yaml"), selection=Selection(index=0))


def test_with_outputs__mixture__computes_those_of_every_part_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = draft()
    assert isinstance(plan, Plan)
    column = Column(name="scores", dtype="<f4", shape=())
    computed: list[int] = []

    def stored(*, corpus: dict[str, Any], **_: Any) -> dict[str, Any]:
        facts = from_record(CorpusInfo, corpus, nan_for_null=True)
        further = FurtherColumns(columns=(column,), digest=f"ff{facts.digest[:30]}", corpus=facts)
        count = facts.num_train_sequences + facts.num_held_out_sequences

        def compute(first: int) -> Iterator[Any]:
            computed.append(count)
            for number in range(first, count):
                yield np.full(16, number, dtype=record_type((column,)))

        found = add_columns(further, compute=compute, part_is_due=lambda: False)
        return {"corpus": {"folder": found.folder, "digest": found.digest}}

    monkeypatch.setattr(resolve_outputs, "stored_outputs", stored)
    monkeypatch.setattr(resolve_outputs, "has_reference", lambda _: True)
    ask = partial(with_outputs, plan.corpus, job=plan.job, find_model=lambda: plan.model, on_progress=None)
    found = ask()
    assert ask() == found != plan.corpus and len(computed) == 2
    train, held_out = open_rows(found)
    for rows in (train, held_out):
        assert rows.read(np.arange(rows.num_rows))["scores"].shape == (rows.num_rows, 16)
    first = plan.corpus.parts[0].corpus.num_train_sequences
    assert train.read(np.array([first]))["scores"][0].tolist() == [0.0] * 16


def test_early_stopping__by_a_part_that_holds_nothing_out__is_refused() -> None:
    write("mail.jsonl", *(f"mail {letter} {'x' * 28}" for letter in "abc"))
    with pytest.raises(JobFileError, match=r"data.held_out.* cannot measure eval/loss/mail"):
        draft("training.early_stopping={metric: eval/loss/mail, patience: 1}", "data.held_out=0.01")


def test_reopen_run__another_weight__is_refused_by_name(tmp_path: Path) -> None:
    plan = draft()
    assert isinstance(plan, Plan)
    folder = create_run(plan)
    Path("job.yaml").write_text(JOB.replace("weight: 1}", "weight: 2}"))
    other = draft()
    assert isinstance(other, Plan) and other.corpus == plan.corpus
    with pytest.raises(ArgumentError, match=r"data.mixture.mail.weight changed from 1.0 to 2.0"):
        reopen_run(folder, other)


def test_resume__mixture_from_another_folder__reads_the_files_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = draft()
    assert isinstance(plan, Plan)
    folder = create_run(plan).absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = resolve_draft(with_data_folder(load_job(folder / "job.yaml"), run_folder=folder))
    assert isinstance(again, Plan)
    assert (again.corpus, again.job) == (plan.corpus, plan.job)
    reopen_run(folder, again)
