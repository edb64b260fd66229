"""The `model:` section and what follows from it."""

from __future__ import annotations

from typing import Any

import pytest

from forge.config.job import JobSpec
from forge.config.model import ModelSpec

BODY: dict[str, Any] = {
    "name": "fine-tune",
    "model": {"from_pretrained": "./base"},
    "data": {"source": "python-stdlib"},
    "training": {"total_steps": 1, "optimizer": {"lr": 1e-3}, "global_batch_size": 2},
}


def test_tokenizer__left_out_beside_from_pretrained__is_the_folders_own() -> None:
    job = JobSpec.model_validate(BODY)
    assert job.data.tokenizer.from_pretrained == "./base"
    assert JobSpec.model_validate_json(job.model_dump_json(exclude_unset=True)) == job


def test_tokenizer__given_beside_from_pretrained__is_kept() -> None:
    job = JobSpec.model_validate(BODY | {"data": {"source": "python-stdlib", "tokenizer": {"train": "bpe"}}})
    assert job.data.tokenizer.from_pretrained is None


def test_tokenizer__left_out_with_an_architecture__is_trained() -> None:
    job = JobSpec.model_validate(BODY | {"model": {"architecture": "llama"}})
    assert job.data.tokenizer.from_pretrained is None


@pytest.mark.parametrize(
    "keys", [{}, {"architecture": "llama", "class": "m:C"}, {"architecture": "a", "from_pretrained": "b"}]
)
def test_model__not_exactly_one_origin__is_refused(keys: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="give one of 'architecture', 'from_pretrained' and 'class'"):
        ModelSpec.model_validate(keys)
