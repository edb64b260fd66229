"""What determines the loss curve of a run: digests of it, and the keys that a resumed run may change. Pure."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from forge.config.compare import Difference, differences
from forge.config.data import PairSpec
from forge.config.distillation import DistillationSpec
from forge.config.embedding import ContrastiveSpec, EmbeddingSpec
from forge.config.job import JobSpec
from forge.config.training import MaskingSpec, SpanCorruptionSpec
from forge.plan.inputs import CodeInfo
from forge.plan.plan import DraftPlan

LENGTH_KEYS = ("total_steps", "total_tokens", "epochs")
"""Keys of `training` of which a job gives one."""


def config_digest(job: JobSpec, *, code: CodeInfo | None) -> str:
    """Return a digest of everything that determines the loss curve, and of nothing else: model, data and training,
    and the code of a job that names a class in it.

    Checkpoints store it, so that a run is never resumed with another configuration. The intervals of evaluation and
    checkpoints, the machines and the tracker may change between two starts.
    """
    body = _deciding(job)
    if code is not None and job.user_classes:
        body["code"] = code.digest
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


def run_digest(plan: DraftPlan) -> str:
    """Return the `config_digest` that a run's checkpoints store: that of the job with the run's first length."""
    if plan.former_lengths:
        return plan.former_lengths[0].config_digest
    return config_digest(plan.job, code=plan.code)


def curve_differences(before: JobSpec, now: JobSpec) -> list[Difference]:
    """Return the changed keys that would change the loss curve of a run; code is compared elsewhere.

    The length of a run may change (`forge.plan.lengths`); that of a search's trials may not.
    """
    if before.search is None and now.search is None:
        now = with_length_of(now, before)
    return list(differences(_deciding(before), _deciding(now)))


def with_length_of(job: JobSpec, other: JobSpec) -> JobSpec:
    """Return a job with the length of another one."""
    length = {key: getattr(other.training, key) for key in LENGTH_KEYS}
    training = job.training.model_copy(update=length)
    training.model_fields_set.difference_update(key for key, value in length.items() if value is None)
    return job.model_copy(update={"training": training})


def free_differences(before: JobSpec, now: JobSpec) -> list[Difference]:
    """Return the changed keys that a resumed run may take over: machines, intervals, trackers."""
    fixed = {difference.key for difference in curve_differences(before, now)}
    bodies = [job.model_dump(mode="json", exclude={"search"}) for job in (before, now)]
    return [difference for difference in differences(*bodies) if difference.key not in fixed]


_FREE = (
    *("evaluate_every", "micro_batch_size", "zero", "activation_checkpointing", "sequence_parallel"),
    "activation_offload",
    *("cross_entropy", "attention", "liger"),
)
"""Keys of `training` that do not decide on the loss curve."""


def _deciding(job: JobSpec) -> dict[str, Any]:
    """The part of a job that determines the loss curve."""
    body = job.model_dump(mode="json", include={"model", "data", "training"})
    layout = ("micro_batch_size", "zero", "activation_checkpointing", "sequence_parallel", "cross_entropy")
    for name in ("evaluate_every", "compile", "attention", "liger", "activation_offload", *layout):
        body["training"].pop(name)
    zero = job.training.zero
    quantized = {key: True for key in ("quantized_weights", "quantized_gradients") if getattr(zero, key)}
    if quantized:
        body["training"]["zero"] = quantized
    for section, key in (("model", "init_from"), ("model", "resize_embeddings"), ("tokenizer", "add_tokens")):
        values = body["data"]["tokenizer"] if section == "tokenizer" else body["model"]
        if not values.get(key):
            values.pop(key, None)
    if not body["training"]["fp8"]:
        del body["training"]["fp8"]
    if body["training"]["early_stopping"] is None:
        del body["training"]["early_stopping"]
    if body["training"]["ema"] is not None:
        del body["training"]["ema"]["evaluate"]
    if job.training.objective != "classification":
        del body["training"]["classification"]
    if job.data.format != "labelled":
        del body["data"]["labels"]
    for section in ("optimizer", "schedule"):  # keys that do not apply
        body["training"][section] = {
            key: value for key, value in body["training"][section].items() if value not in (None, {})
        }
    for section, name, unset in (
        ("data", "pair", PairSpec()),
        ("training", "masking", MaskingSpec()),
        ("training", "spans", SpanCorruptionSpec()),
        ("data", "embedding", EmbeddingSpec()),
        ("training", "contrastive", ContrastiveSpec()),
        ("training", "distillation", DistillationSpec()),
    ):
        if body[section][name] == unset.model_dump(mode="json"):
            del body[section][name]
    if body["model"]["lora"] is None:
        del body["model"]["lora"]
    elif body["model"]["lora"]["init_from"] is None:
        del body["model"]["lora"]["init_from"]
    of_dataset = (("dataset", None), ("subset", None), ("split", "train"), ("revision", None))
    for name, default in (("file_type", "auto"), ("special_tokens", "text"), *of_dataset):
        if body["data"][name] == default:
            del body["data"][name]
    # By name, so that a difference is named by the part and its key.
    body["data"]["mixture"] = {part.pop("name"): part for part in body["data"]["mixture"]}
    if not job.data.mixture:
        del body["data"]["mixture"]
    return body
