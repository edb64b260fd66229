"""What a dry run says about the corpus, without a model."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from forge.config.load import load_job
from forge.data import prepare
from forge.data.view import Selection
from forge.errors import ArgumentError, DataError, JobFileError
from forge.plan.plan import DraftPlan, Plan
from forge.runs.create import create_run, reopen_run
from forge.runtime import probe, resolve, resolve_view
from forge.runtime.resolve import inspect_data, prepare_data, resolve_draft, with_data_folder
from tests.support.jobs import tiny_facts

JOB = """\
name: tiny
model: {architecture: llama}
data: {files: corpus.jsonl, seq_len: 64, tokenizer: {vocab_size: 300}}
training: {total_steps: 4, global_batch_size: 8, optimizer: {lr: 1.0e-2}}
resources: {workers: 1, gpu: none}
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        resolve,
        "inspect_model",
        lambda *_, vocabulary, **__: tiny_facts(vocab_size=vocabulary.size, max_seq_len=64),
    )
    Path("job.yaml").write_text(JOB)


def draft(*overrides: str) -> DraftPlan:
    return resolve_draft(load_job("job.yaml", overrides=overrides))


def write_corpus(*texts: str) -> None:
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_resolve_draft__short_documents__says_that_nothing_is_evaluated() -> None:
    write_corpus(*(f"document {i} is short" for i in range(30)))
    plan = draft("data.held_out=1%")
    assert any(warning.startswith("nothing is evaluated") for warning in plan.warnings)
    assert not any(warning.startswith("nothing is evaluated") for warning in draft("data.held_out=50%").warnings)


def test_resolve_draft__special_tokens_in_the_text__are_counted_and_selectable() -> None:
    write_corpus(*["<|endoftext|>" + "some words " * 50] * 20)
    assert any("<|endoftext|> (20x)" in warning for warning in draft().warnings)
    assert not any("spells" in warning for warning in draft("data.special_tokens=parse").warnings)


def test_resolve_draft__large_corpus__is_looked_at_and_not_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus("some words " * 50)
    monkeypatch.setattr(resolve, "_SMALL_BYTES", 10)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("prepared")

    monkeypatch.setattr(prepare, "build_once", fail)
    plan = draft()
    assert not isinstance(plan, Plan)
    assert plan.files is not None and plan.files.num_sampled == 1
    write_corpus("")
    Path("corpus.jsonl").write_text('{"body": "words"}\n')
    with pytest.raises(DataError, match="no key 'text'"):
        draft()


def test_resolve_draft__pattern_without_files__names_its_line() -> None:
    Path("job.yaml").write_text(JOB.replace("files: corpus.jsonl", "files: [corpus.jsonl,\n  'nowhere/*.txt']"))
    write_corpus("some words")
    with pytest.raises(DataError, match=r"job\.yaml:4: data\.files: nowhere/\*\.txt matches no file"):
        draft()


def test_resolve_draft__adapters_without_peft__are_refused_before_the_corpus_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = JOB.replace("{architecture: llama}", "{from_pretrained: ./base, lora: {rank: 4}}")
    Path("job.yaml").write_text(job.replace(", tokenizer: {vocab_size: 300}", ""))
    monkeypatch.setattr(probe, "find_spec", lambda name: None)
    with pytest.raises(JobFileError, match=r"model\.lora: needs the package peft"):
        draft()


def test_resume__from_another_folder__reads_the_corpus_that_the_run_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(*(f"document {i} " + "with some words " * 20 for i in range(20)))
    plan = resolve.resolve(load_job("job.yaml"))
    folder = create_run(plan).absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = load_job(folder / "job.yaml")
    with pytest.raises(DataError, match=r"corpus\.jsonl matches no file"):
        resolve.resolve(loaded)
    again = resolve.resolve(with_data_folder(loaded, run_folder=folder))
    assert (again.corpus, again.job) == (plan.corpus, plan.job)
    reopen_run(folder, again)
    chosen = load_job(folder / "job.yaml", overrides=["data.files=corpus.jsonl"])
    assert with_data_folder(chosen, run_folder=folder).data_folder is None


def test_resume__corpus_changed__is_refused_before_anything_starts() -> None:
    write_corpus(*(f"document {i} " + "with some words " * 20 for i in range(20)))
    folder = create_run(resolve.resolve(load_job("job.yaml")))
    write_corpus(*(f"document {i} " + "with other words " * 20 for i in range(21)))
    with pytest.raises(ArgumentError, match=r"the content of the corpus changed .20 documents then, 21 now"):
        reopen_run(folder, resolve.resolve(load_job("job.yaml")))


def test_resolve_draft__large_corpus__shows_a_sample_as_the_model_will_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(*(f"document {i} " + "with some words " * 20 for i in range(900)))
    monkeypatch.setattr(resolve, "_SMALL_BYTES", 10)
    for packing in ("concatenate", "examples", "none"):
        view = draft(f"data.packing={packing}").view
        assert view is not None and view.num_sampled_records == 400 and view.passes is None
        assert len(view.examples) == 3 and view.lengths is not None
        assert "some words" in "".join(span.text for example in view.examples for span in example.spans)
    assert not (tmp_path / "cache" / "data").exists()


def test_resolve_draft__small_corpus__shows_all_of_it_with_its_passes() -> None:
    write_corpus(*(f"document {i} " + "with some words " * 20 for i in range(40)))
    plan = draft()
    assert isinstance(plan, Plan) and plan.view is not None
    assert plan.view.passes == pytest.approx(4 * 8 / plan.corpus.num_train_sequences)
    assert plan.view.num_sampled_records is None


def test_inspect_data__large_corpus__is_sampled_until_it_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(*(f"document {i} " + "with some words " * 20 for i in range(900)))
    monkeypatch.setattr(resolve, "_SMALL_BYTES", 10)
    loaded = load_job("job.yaml", overrides=["data.packing=examples"])
    assert inspect_data(loaded, selection=Selection()).num_sampled_records == 400
    with pytest.raises(ArgumentError, match=r"forge data prepare job\.yaml"):
        inspect_data(loaded, selection=Selection(index=3))
    prepare_data(loaded)
    view = inspect_data(loaded, selection=Selection(index=3, count=2))
    assert view.num_sampled_records is None and [example.index for example in view.examples] == [3, 4]
    write_corpus("another corpus " * 20)
    assert inspect_data(loaded, selection=Selection()).num_sampled_records == 1


@pytest.mark.parametrize("wrong", [{"split": "test"}, {"count": 0}, {"count": 10**6}, {"max_chars": 1}])
def test_selection__out_of_range__is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        Selection(**wrong)


def test_resolve_draft__masked_lm__shows_masks_and_what_is_behind_them() -> None:
    write_corpus(*(f"document {i} " + "with some words " * 20 for i in range(40)))
    view = draft("training.objective=masked-lm", "model.architecture=bert").view
    assert view is not None and view.is_estimate
    assert view.num_targets == pytest.approx(0.15 * view.num_tokens, rel=0.1)
    spans = [span for example in view.examples for span in example.spans]
    masks = [span for span in spans if span.text.strip() == "[MASK]"]
    assert masks and all(span.has_loss and span.kind == "special" and span.target for span in masks)
    assert any(span.target.strip() in ("with", "some", "words") for span in masks)


def test_resolve_draft__no_room_for_a_sample__says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus("some words " * 50)
    monkeypatch.setattr(resolve, "_SMALL_BYTES", 10)

    def fill(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resolve_view, "sample_corpus", fill)
    with pytest.raises(DataError, match=r"a sample .* No space left on device; set TMPDIR"):
        draft()
