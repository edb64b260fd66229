"""The `model:` section and what follows from it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from forge.config.job import JobSpec
from forge.config.load import LoadedJob
from forge.config.locations import SourceMap
from forge.config.model import ModelSpec
from forge.config.overrides import check_space
from forge.errors import JobFileError, PlanError
from forge.plan.plan import plan_from_json, plan_to_json
from tests.support.jobs import tiny_job, tiny_plan
from tests.support.tuning import SEARCH

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


@pytest.mark.parametrize("key", ["train", "vocab_size"])
def test_tokenizer__new_one_beside_from_pretrained__is_refused(key: str) -> None:
    new = {key: {"train": "bpe", "vocab_size": 512}[key]}
    with pytest.raises(ValueError, match=rf"data\.tokenizer\.{key}: .*the embeddings of model\.from_pretrained"):
        JobSpec.model_validate(BODY | {"data": {"source": "python-stdlib", "tokenizer": new}})


def test_tokenizer__other_folder_beside_from_pretrained__is_kept() -> None:
    other = {"source": "python-stdlib", "tokenizer": {"from_pretrained": "./other"}}
    assert JobSpec.model_validate(BODY | {"data": other}).data.tokenizer.from_pretrained == "./other"


@pytest.mark.parametrize(
    "key",
    [
        "trust_remote_code", "code_revision", "revision", "use_auth_token", "cache_dir", "proxies", "subfolder",
        "force_download", "local_files_only", "auto_map", "gguf_file", "quantization_config", "device_map",
        "use_kernels", "_attn_implementation", "_name_or_path", "_configuration_file",
    ],
)  # fmt: skip
@pytest.mark.parametrize("origin", ["architecture", "from_pretrained"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_model__argument_of_a_loader__is_refused(origin: str, key: str, is_nested: bool) -> None:
    given = {"text_config": {key: "x"}} if is_nested else {key: "x"}
    with pytest.raises(ValueError, match=rf"{key}: is an argument of a loader"):
        ModelSpec.model_validate({origin: "llama"} | given)


@pytest.mark.parametrize("value", ["someone/kernel", {"": "someone/kernel@v1:attention"}])
@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation"])
def test_model__implementation_of_the_hub__is_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match="names code of the Hub, which forge does not execute"):
        ModelSpec.model_validate({"architecture": "llama", key: value})


def test_model__argument_of_a_loader_in_a_stored_plan__is_refused() -> None:
    body = json.loads(plan_to_json(tiny_plan()))
    body["job"]["model"]["trust_remote_code"] = True
    with pytest.raises(PlanError, match="trust_remote_code: is an argument of a loader"):
        plan_from_json(json.dumps(body))


@pytest.mark.parametrize("where", ["proxy", "space"])
def test_search__argument_of_a_loader__is_refused(where: str) -> None:
    key = "model.trust_remote_code"
    values = {"proxy": {key: True}} if where == "proxy" else {"space": {key: {"choice": [True, False]}}}
    job = tiny_job(search=SEARCH | values)
    with pytest.raises(JobFileError, match="trust_remote_code"):
        check_space(LoadedJob(job=job, source=SourceMap(path="job.yaml", locations={})))


def test_model__class_of_the_users_own__takes_arguments_of_any_name() -> None:
    spec = ModelSpec.model_validate({"class": "m:C", "revision": 2, "num_layers": 10**12})
    assert spec.config_overrides == {"revision": 2, "num_layers": 10**12}


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "hidden_size", "num_local_experts"])
def test_model__size_without_end__is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}: must be at most "):
        ModelSpec.model_validate({"architecture": "llama", key: 10**17})


def test_tokenizer__left_out_with_an_architecture__is_trained() -> None:
    job = JobSpec.model_validate(BODY | {"model": {"architecture": "llama"}})
    assert job.data.tokenizer.from_pretrained is None


@pytest.mark.parametrize(
    "keys", [{}, {"architecture": "llama", "class": "m:C"}, {"architecture": "a", "from_pretrained": "b"}]
)
def test_model__not_exactly_one_origin__is_refused(keys: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="give one of 'architecture', 'from_pretrained', 'init_from' and 'class'"):
        ModelSpec.model_validate(keys)
