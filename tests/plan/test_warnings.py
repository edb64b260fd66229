from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from forge.plan.data_view import DataView
from forge.plan.inputs import CorpusFiles, LabelsInfo
from forge.plan.plan import plan_from_json, plan_to_json
from forge.plan.warnings import corpus_warnings, view_warnings
from tests.support.jobs import UNPREPARED, tiny_job, tiny_plan

EPOCHS: dict[str, Any] = {"training__total_steps": None, "training__epochs": 1}
SPELLED = CorpusFiles(patterns=(), num_sampled=3, special_tokens={"<|user|>": 2, "<|end|>": 1})


def warnings(*, num_train: int, num_held_out: int = 5, files: CorpusFiles | None = None, **changes: Any) -> str:
    corpus = replace(UNPREPARED, num_train_sequences=num_train, num_held_out_sequences=num_held_out)
    return "\n".join(corpus_warnings(tiny_job(**changes), files=files, corpus=corpus, total_steps=10))


def test_corpus_warnings__nothing_to_say__are_empty() -> None:
    assert warnings(num_train=1200, **EPOCHS) == ""
    assert warnings(num_train=12) == ""
    assert corpus_warnings(tiny_job(), files=None, corpus=None, total_steps=10) == ()


def test_corpus_warnings__held_out_below_one_sequence__says_that_nothing_is_evaluated() -> None:
    assert warnings(num_train=100, num_held_out=0).startswith("nothing is evaluated: data.held_out: 0.01 leaves 0")
    assert warnings(num_train=100, num_held_out=0, data__held_out=0) == ""


@pytest.mark.parametrize(
    ("num_train", "expected"),
    [
        (3, "3 training sequences, fewer than one batch of 12: every step sees each of them 4.0 times, so "
            "training.epochs: 1 is 4.0 passes; lower training.global_batch_size to 3"),
        (13, "training.epochs: 1 becomes 1.85 passes over the corpus"),
        (24, ""),
        (119, ""),
    ],
)  # fmt: skip
def test_corpus_warnings__an_epoch_in_whole_batches__says_how_many_passes(num_train: int, expected: str) -> None:
    found = warnings(num_train=num_train, **EPOCHS)
    assert (expected in found) if expected else (found == "")


def test_corpus_warnings__special_tokens_in_the_text__names_them_unless_they_are_wanted() -> None:
    found = warnings(num_train=1200, files=SPELLED)
    assert "<|user|> (2x), <|end|> (1x) in the sample; they are ordinary characters" in found
    assert warnings(num_train=1200, files=SPELLED, data__special_tokens="parse") == ""


@pytest.mark.parametrize(("num_examples", "pairs"), [(105, "1.0"), (210, "2.0"), (420, "")])
def test_corpus_warnings__contrastive_with_few_pairs_in_a_step__says_so(num_examples: int, pairs: str) -> None:
    job = tiny_job(training__objective="contrastive", training__global_batch_size=1, data__format="embedding")
    corpus = replace(UNPREPARED, num_train_sequences=100, num_held_out_sequences=5, num_examples=num_examples)
    found = "\n".join(corpus_warnings(job, files=None, corpus=corpus, total_steps=10))
    assert (f"a step has {pairs} pairs on average" in found) == bool(pairs)


def test_corpus_warnings__labels_without_examples_and_of_one_name__are_named() -> None:
    names = ("Good", "bad", "good ", "never")
    labels = LabelsInfo(names=names, train_counts=(3, 2, 1, 0), held_out_counts=(0, 0, 0, 1), num_train=6)
    corpus = replace(UNPREPARED, num_train_sequences=1200, num_held_out_sequences=5, labels=labels)
    found = corpus_warnings(tiny_job(), files=None, corpus=corpus, total_steps=10)
    assert found[0] == "1 labels have no training example: never"
    assert found[1].startswith("labels that differ by white space or case alone: 'Good', 'good '; if they are one")
    usual = replace(labels, names=("a", "b"), train_counts=(1, 1), held_out_counts=(1, 1))
    assert corpus_warnings(tiny_job(), files=None, corpus=replace(corpus, labels=usual), total_steps=10) == ()


def test_view_warnings__many_examples_are_dropped__says_how_many_are_left() -> None:
    reason = "pairs dropped: the prompt leaves no room for an answer"
    assert view_warnings(view(notes={reason: 11, "pairs dropped: both answers are the same": 2}), seq_len=64) == ()
    found = view_warnings(view(notes={reason: 300}), seq_len=64)
    assert found == (f"300 {reason}; 100 examples are left",)


def test_plan__files_and_warnings__survive_json() -> None:
    plan = replace(tiny_plan(), files=SPELLED, warnings=("a", "b"))
    again = plan_from_json(plan_to_json(plan))
    assert (again.files, again.warnings) == (SPELLED, ("a", "b"))


def view(**changes: Any) -> DataView:
    body: dict[str, Any] = {
        "num_sampled_records": None,
        "num_examples": 100,
        "num_sequences": 50,
        "num_tokens": 10_000,
        "num_targets": 4_000,
        "padding": 0.02,
        "passes": 1.0,
        "lengths": None,
        "notes": {},
        "num_skipped_records": 0,
        "examples": (),
    }
    return DataView(**(body | changes))


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (
            {"notes": {"conversations cut at seq_len": 11}},
            "11 conversations cut at seq_len: what lies beyond 64 tok",
        ),
        (
            {"notes": {"pairs cut: longer than seq_len": 30}},
            "30 pairs cut: longer than seq_len: what lies beyond 64",
        ),
        ({"padding": 0.51}, "51% of the sequences is padding; set data.packing: examples"),
        ({"num_targets": 99}, "only 0.99% of the tokens carry loss"),
    ],
)
def test_view_warnings__what_is_rarely_meant__is_said(changes: dict[str, Any], warning: str) -> None:
    found = view_warnings(view(**changes), seq_len=64)
    assert len(found) == 1 and found[0].startswith(warning)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"notes": {"conversations cut at seq_len": 10}},
        {"notes": {"documents split at seq_len": 99}},
        {"padding": 0.5},
    ],
)
def test_view_warnings__ordinary_data__are_empty(changes: dict[str, Any]) -> None:
    assert view_warnings(view(**changes), seq_len=64) == ()
