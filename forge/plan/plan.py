"""The plan: a job resolved. It is the contract between the client and the cluster.

In go the job, and the facts about its model, corpus and hardware; out comes everything that can be
decided without training: how the batch is split at every world size, DeepSpeed's configuration,
memory, arithmetic, steps. Pure: the same input gives the same bytes, written as `plan.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from forge.config.job import JobSpec
from forge.errors import PlanError
from forge.plan.batch import BatchPlan, plan_batch
from forge.plan.deepspeed_config import deepspeed_config
from forge.plan.inputs import CorpusInfo, HardwareInfo, ModelInfo
from forge.plan.memory import (
    USABLE_SHARE,
    MemoryEstimate,
    estimate_memory,
    max_micro_batch_size,
    num_copies_in_memory,
)
from forge.plan.search import SearchPlan
from forge.plan.throughput import flops_per_token

FORMAT_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSizePlan:
    """Everything that depends on the number of workers."""

    batch: BatchPlan
    memory: MemoryEstimate
    fits: bool | None
    """Whether the estimate fits the worker's memory; None if that is unknown."""
    deepspeed: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A job, resolved for every world size it may run at."""

    job: JobSpec
    model: ModelInfo
    corpus: CorpusInfo | None
    """None where the corpus is not prepared yet (a dry run)."""
    hardware: HardwareInfo
    total_steps: int
    tokens_per_step: int
    flops_per_token: int
    worlds: tuple[WorldSizePlan, ...]
    search: SearchPlan | None = None
    """None where one run is trained."""
    pause_at: int | None = None
    """The step after which a trial of a population stops, with a checkpoint, until all others have come there."""

    @property
    def total_tokens(self) -> int:
        """Predicted tokens over the whole run."""
        return self.total_steps * self.tokens_per_step

    def for_world_size(self, world_size: int) -> WorldSizePlan:
        """The part of the plan for one world size. Raises: PlanError if the job does not allow it."""
        for world in self.worlds:
            if world.batch.world_size == world_size:
                return world
        raise PlanError(f"the job allows {self.job.resources.workers} workers, not {world_size}")


def make_plan(job: JobSpec, *, model: ModelInfo, corpus: CorpusInfo | None, hardware: HardwareInfo) -> Plan:
    """Resolve a job.

    Raises: PlanError if it cannot be carried out: more workers than sequences in a batch, a vocabulary
        smaller than the tokenizer's, sequences longer than the model's positions.
    """
    _check_model(job, model, corpus)
    seq_len, is_on_host = job.data.seq_len, hardware.device == "cpu"
    worlds = []
    for world_size in job.resources.workers:
        copies = num_copies_in_memory(engine=job.resources.engine, world_size=world_size)
        micro = max_micro_batch_size(
            model,
            job.training,
            world_size=world_size,
            seq_len=seq_len,
            memory_bytes=hardware.memory_bytes,
            is_on_host=is_on_host,
            num_copies=copies,
        )
        batch = plan_batch(job.training.global_batch_size, world_size=world_size, max_micro_batch_size=micro)
        need = estimate_memory(
            model,
            job.training,
            world_size=world_size,
            micro_batch_size=batch.micro_batch_size,
            seq_len=seq_len,
            is_on_host=is_on_host,
            num_copies=copies,
        )
        fits = None if hardware.memory_bytes is None else need.total_bytes <= USABLE_SHARE * hardware.memory_bytes
        worlds.append(
            WorldSizePlan(batch=batch, memory=need, fits=fits, deepspeed=deepspeed_config(job.training, batch))
        )
    tokens_per_step = job.training.global_batch_size * seq_len
    return Plan(
        job=job,
        model=model,
        corpus=corpus,
        hardware=hardware,
        total_steps=_total_steps(job, corpus, tokens_per_step=tokens_per_step),
        tokens_per_step=tokens_per_step,
        flops_per_token=flops_per_token(model, seq_len=seq_len),
        worlds=tuple(worlds),
    )


def plan_to_json(plan: Plan) -> str:
    """The plan as canonical JSON: sorted keys, no NaN, a newline at the end; equal plans give equal bytes."""
    body = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    body["job"] = plan.job.model_dump(mode="json")
    for name in ("search", "pause_at"):
        if body[name] is None:
            del body[name]
    body["format_version"] = FORMAT_VERSION
    return json.dumps(_plain(body), sort_keys=True, indent=1, allow_nan=False) + "\n"


def plan_from_json(text: str) -> Plan:
    """Read what `plan_to_json` wrote. Raises: PlanError for another format."""
    try:
        body = json.loads(text)
        if body.pop("format_version") != FORMAT_VERSION:
            raise PlanError(f"this plan was written by another version of forge (this one reads {FORMAT_VERSION})")
        corpus, search = body["corpus"], body.pop("search", None)
        if corpus and corpus["unigram_perplexity"] is None:
            corpus["unigram_perplexity"] = math.nan
        return Plan(
            job=JobSpec.model_validate_json(json.dumps(body.pop("job"))),
            model=ModelInfo(**body.pop("model")),
            corpus=CorpusInfo(**corpus) if body.pop("corpus") else None,
            hardware=HardwareInfo(**body.pop("hardware")),
            worlds=tuple(
                WorldSizePlan(
                    batch=BatchPlan(**world["batch"]),
                    memory=MemoryEstimate(**world["memory"]),
                    fits=world["fits"],
                    deepspeed=world["deepspeed"],
                )
                for world in body.pop("worlds")
            ),
            search=SearchPlan(**search) if search else None,
            **body,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"not a plan of forge: {error}") from error


def config_digest(job: JobSpec) -> str:
    """Names what determines the loss curve, and nothing else: model, data and training.

    A checkpoint carries it, so that a run is never resumed under another recipe. How often to evaluate
    or to save, which machines and which tracker may change between two starts.
    """
    recipe = job.model_dump(mode="json", include={"model", "data", "training"})
    for free in ("evaluate_every", "micro_batch_size", "zero", "activation_checkpointing", "cross_entropy"):
        recipe["training"].pop(free)
    return hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=16).hexdigest()


def _check_model(job: JobSpec, model: ModelInfo, corpus: CorpusInfo | None) -> None:
    if corpus and corpus.vocab_size > model.vocab_size:
        raise PlanError(
            f"the tokenizer has {corpus.vocab_size} tokens, but model.vocab_size is {model.vocab_size}: "
            f"{corpus.vocab_size - model.vocab_size} tokens would have no embedding; leave model.vocab_size out "
            "to take the tokenizer's"
        )
    if model.max_seq_len is not None and job.data.seq_len > model.max_seq_len:
        raise PlanError(
            f"data.seq_len is {job.data.seq_len}, but the model has positions for {model.max_seq_len} tokens; "
            "lower data.seq_len or raise model.max_position_embeddings"
        )


def _total_steps(job: JobSpec, corpus: CorpusInfo | None, *, tokens_per_step: int) -> int:
    training = job.training
    if training.total_steps is not None:
        return training.total_steps
    if training.total_tokens is not None:
        return -(-training.total_tokens // tokens_per_step)
    assert training.epochs is not None, "JobSpec holds that one of the three is given"
    if corpus is None:
        raise PlanError("training.epochs needs the corpus to be prepared before the steps can be counted")
    return math.ceil(training.epochs * corpus.num_train_sequences / training.global_batch_size)


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and nan as what JSON has; nan becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
