"""`data.labels` and `training.classification` in a job file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from forge.config.job import JobSpec
from forge.config.load import load_job
from forge.errors import JobFileError
from forge.plan.curve import config_digest
from forge.plan.outputs import must_find_labels, outputs_of


def body_of(**sections: Any) -> dict[str, Any]:
    return {
        "name": "labels",
        "model": sections.get("model", {"architecture": "bert"}),
        "data": {"files": "a.jsonl", "format": "labelled"} | sections.get("data", {}),
        "training": {"total_steps": 5, "objective": "classification"} | sections.get("training", {}),
    }


def job_of(**sections: Any) -> JobSpec:
    return JobSpec.model_validate(body_of(**sections))


def test_job__classification__fills_in_kind_packing_and_special_tokens() -> None:
    job = job_of(training={"classification": {"kind": "multi"}})
    assert (job.data.labels.kind, job.data.labels.key, job.data.packing) == ("multi", "labels", "examples")
    assert job.data.tokenizer.special_tokens == ("[PAD]", "[CLS]", "[SEP]")
    again = JobSpec.model_validate_json(job.model_dump_json())  # as in a plan
    assert again == job


@pytest.mark.parametrize(
    ("kind", "names", "found", "num_labels", "auto_class"),
    [
        ("single", [0, True, "x"], ("0", "true", "x"), 3, "AutoModelForSequenceClassification"),
        ("token", ["O", "PER"], ("O", "PER"), 2, "AutoModelForTokenClassification"),
        ("regression", None, (), 1, "AutoModelForSequenceClassification"),
        ("multi", None, (), None, "AutoModelForSequenceClassification"),
    ],
)
def test_outputs_of__any_kind__are_known_before_the_data_are_read(
    kind: str, names: Any, found: tuple[str, ...], num_labels: int | None, auto_class: str
) -> None:
    labels = {} if names is None else {"labels": {"names": names}}
    job = job_of(data=labels, training={"classification": {"kind": kind}})
    outputs = outputs_of(job, corpus=None)
    assert (outputs.label_names, outputs.num_labels, outputs.auto_class) == (found, num_labels, auto_class)
    assert must_find_labels(job) is (num_labels is None)


def test_digest__other_objectives__do_not_depend_on_the_sections() -> None:
    plain = {"name": "a", "model": {"architecture": "llama"}, "data": {"source": "python-stdlib"}}
    job = JobSpec.model_validate(plain | {"training": {"total_steps": 5}})
    before = config_digest(job, code=None)
    assert config_digest(job_of(), code=None) != config_digest(
        job_of(training={"classification": {"class_weights": "balanced"}}), code=None
    )
    assert before == config_digest(JobSpec.model_validate_json(job.model_dump_json()), code=None)


@pytest.mark.parametrize(
    ("sections", "key", "problem"),
    [
        ({"data": {"format": "text"}}, "data.format", "must be labelled for training.objective: classification"),
        ({"data": {"labels": {"names": ["a"]}}}, "data.labels.names", "must list 2 to 10,000 names"),
        ({"data": {"labels": {"names": ["a", ""]}}}, "data.labels.names", "none of them empty"),
        ({"data": {"labels": {"names": ["a", "b", "a"]}}}, "data.labels.names", "has 'a' twice"),
        ({"data": {"labels": {"names": [1, "1"]}}}, "data.labels.names", "has '1' twice"),
        ({"data": {"labels": {"names": "a"}}}, "data.labels.names", ""),
        ({"data": {"labels": {"label_kay": "a"}}}, "data.labels.label_kay", "label_key"),
        (
            {"data": {"labels": {"kind": "multi"}}},
            "data.labels.kind",
            "must be that of training.classification.kind",
        ),
        (
            {"data": {"labels": {"names": ["a", "b"]}}, "training": {"classification": {"kind": "regression"}}},
            "data.labels.names",
            "whose labels are numbers",
        ),
        ({"training": {"classification": {"kind": "singel"}}}, "training.classification.kind", "single"),
        (
            {"training": {"classification": {"class_weights": [1, 0]}}},
            "training.classification.class_weights",
            "must have numbers above 0, not 0",
        ),
        (
            {"training": {"classification": {"class_weights": "even"}}},
            "training.classification.class_weights",
            "must be none, balanced, or a list",
        ),
        (
            {
                "data": {"labels": {"names": ["a", "b", "c"]}},
                "training": {"classification": {"class_weights": [1, 2]}},
            },
            "training.classification.class_weights",
            "has 2 weights for 3 labels",
        ),
        ({"data": {"labels": {"words_key": "words"}}}, "data.labels.words_key", "kind: single"),
        (
            {"training": {"classification": {"kind": "token"}}, "data": {"labels": {"pair_key": "b"}}},
            "data.labels.pair_key",
            "is not read with training.classification.kind: token",
        ),
        (
            {"training": {"classification": {"kind": "regression", "class_weights": "balanced"}}},
            "training.classification.class_weights",
            "is not for kind: regression",
        ),
        (
            {"training": {"objective": "causal-lm", "classification": {"kind": "multi"}}},
            "training.classification",
            "is only for objective: classification, not causal-lm",
        ),
        (
            {"training": {"early_stopping": {"metric": "eval/acuracy"}}},
            "training.early_stopping.metric",
            "eval/accuracy",
        ),
        (
            {
                "training": {
                    "classification": {"kind": "regression"},
                    "early_stopping": {"metric": "eval/accuracy"},
                }
            },
            "training.early_stopping.metric",
            "eval/r2",
        ),
    ],
)
def test_load__wrong_value__is_named_with_its_line(
    tmp_path: Path, sections: dict[str, Any], key: str, problem: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(body_of(**sections)))
    with pytest.raises(JobFileError) as caught:
        load_job(path)
    assert key in str(caught.value) and problem in str(caught.value), str(caught.value)
    assert "job.yaml:" in str(caught.value)
