"""What a job's optimizer step asks of one GPU: FLOPs and bytes, for the estimate of its time."""

from __future__ import annotations

from forge.config.job import JobSpec
from forge.config.training import TrainingSpec
from forge.plan.batch import BatchPlan
from forge.plan.flops import SequenceShares, flops_per_token, head_share, sequence_shares
from forge.plan.gpus import Gpu
from forge.plan.inputs import CorpusInfo, ModelInfo, TeacherInfo
from forge.plan.parameter_groups import OptimizerState
from forge.plan.rank_groups import NO_GROUPS, RankGroups
from forge.plan.snapshot_memory import WEIGHT_BYTES
from forge.plan.throughput import StepWork

_BIDIRECTIONAL = frozenset({"masked-lm", "contrastive"})
"""Objectives of encoders, in whose attention every position sees all others."""
_QWZ_BYTES, _QGZ_BYTES = 1.0, 0.5
"""Of a weight gathered in 8 bits and of a gradient reduced in 4, scales left out (ZeRO++, arXiv 2306.10209)."""


def step_work_of_job(
    job: JobSpec,
    *,
    model: ModelInfo,
    batch: BatchPlan,
    state: OptimizerState,
    gpu: Gpu,
    corpus: CorpusInfo | None = None,
    teacher: TeacherInfo | None = None,
    groups: RankGroups = NO_GROUPS,
) -> StepWork:
    """Return the work of a step of a job at one world size.

    Args:
        state: of the optimizer; see `optimizer_state`.
        teacher: of a distillation.
    """
    beside = 0.0
    share = head_share(job, model, corpus)
    if job.has_live_reference:
        beside += 2.0 * model.num_matmul_parameters
    if teacher is not None and job.holds_teacher:
        beside += teacher.forward_flops_per_token
    return step_work(
        model,
        job.training,
        seq_len=job.data.seq_len,
        batch=batch,
        state=state,
        gpu=gpu,
        share_of_head=share,
        shares=sequence_shares(job, corpus),
        forward_flops_beside=beside,
        groups=groups,
    )


def step_work(
    model: ModelInfo,
    training: TrainingSpec,
    *,
    seq_len: int,
    batch: BatchPlan,
    state: OptimizerState,
    gpu: Gpu,
    share_of_head: float = 1.0,
    shares: SequenceShares | None = None,
    forward_flops_beside: float = 0.0,
    groups: RankGroups = NO_GROUPS,
) -> StepWork:
    """Return the work of a step of a model at one world size.

    Args:
        share_of_head: share of the positions at which the output head is computed.
        shares: of an encoder-decoder.
        forward_flops_beside: per token, of models that are asked beside.
    """
    width = WEIGHT_BYTES[training.precision]
    total = flops_per_token(model, seq_len=seq_len, shares=shares, share_of_head=share_of_head)
    attention = total - flops_per_token(model, seq_len=0, shares=shares, share_of_head=share_of_head)
    layers = 2.0 * (model.num_matmul_parameters - model.num_head_matmul_parameters)
    is_causal = model.num_encoder_layers == 0 and training.objective not in _BIDIRECTIONAL
    outputs = model.num_outputs or model.vocab_size
    trained = model.num_trainable_parameters
    shards = batch.world_size // groups.num_shard_groups if training.zero.stage >= 1 else 1
    degree = batch.sequence_parallel_size
    # Queries and outputs, and keys and values, which may have fewer heads.
    heads = 2 + 2 * model.num_key_value_heads / max(1, model.num_attention_heads)
    inputs = float(model.num_layers * model.hidden_size * width)
    return StepWork(
        tokens=batch.micro_batch_size * seq_len // degree,
        num_micro_batches=batch.gradient_accumulation_steps,
        matmul_flops=total - attention + forward_flops_beside,
        recomputed_flops=layers if training.activation_checkpointing is True else 0.0,
        recomputes=bool(training.activation_checkpointing),
        # A third of forward and backward; half of the pairs under a causal mask.
        attention_flops=attention / 3 / (2 if is_causal else 1),
        hidden_size=model.hidden_size,
        activation_bytes=model.num_layers * (10 * model.hidden_size + 3 * model.intermediate_size) * width,
        logit_bytes=share_of_head * outputs * (2 * width + 8),
        weight_bytes=(_QWZ_BYTES if training.zero.quantized_weights else width) * model.num_parameters,
        gradient_bytes=(_QGZ_BYTES if training.zero.quantized_gradients else width) * trained,
        # AdamW reads and writes its state and the master weights, and reads the gradients.
        state_bytes=(2 * (state.total_bytes + 4 * trained) + width * trained) / shards,
        stage=training.zero.stage,
        world_size=batch.world_size,
        peak_flops=gpu.bf16_flops if training.precision == "bf16" else gpu.fp32_flops,
        num_layers=model.num_layers,
        hpz_partition_size=groups.hpz_partition_size,
        num_shard_groups=groups.num_shard_groups,
        sequence_parallel_size=degree,
        offloaded_bytes=inputs if training.activation_offload and training.activation_checkpointing else 0.0,
        exchanged_bytes=heads * model.attention_width * model.num_layers * width * (degree - 1) / degree,
    )
