"""The DeepSpeed configuration of a run, derived from the job. No other module builds one."""

from __future__ import annotations

from typing import Any

from forge.config.training import TrainingSpec
from forge.plan.batch import BatchPlan
from forge.plan.rank_groups import NO_GROUPS, RankGroups

REDUCE_BUCKET = 50_000_000
"""Gradients that are reduced at a time, at every ZeRO stage. A tenth of DeepSpeed's default, which takes
1 GB in bf16, twice while it is reduced. DeepSpeed's `reduce_bucket_size`."""


def deepspeed_config(training: TrainingSpec, batch: BatchPlan, *, groups: RankGroups = NO_GROUPS) -> dict[str, Any]:
    """Return DeepSpeed's configuration for one world size.

    It has no `optimizer` section: forge passes the optimizer as an object, because DeepSpeed's fused optimizers are
    compiled at run time. forge sets the learning rate at every step, so there is no `scheduler` section either.

    Of several shard groups it is the configuration of each, for DeepSpeed divides the state over the ranks of one.

    Source: https://www.deepspeed.ai/docs/config-json
    """
    stage, num_ranks = training.zero.stage, batch.world_size // groups.num_shard_groups
    zero: dict[str, Any] = {"stage": stage}
    if stage in (1, 2):
        zero |= {"overlap_comm": False, "reduce_bucket_size": REDUCE_BUCKET, "allgather_bucket_size": 50_000_000}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 10_000, "stage3_gather_16bit_weights_on_model_save": False}
        zero["reduce_bucket_size"] = REDUCE_BUCKET
        if groups.hpz_partition_size > 1:
            zero["zero_hpz_partition_size"] = groups.hpz_partition_size
        for key in ("quantized_weights", "quantized_gradients"):
            if getattr(training.zero, key):
                zero[f"zero_{key}"] = True
    if training.zero.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": batch.micro_batch_size * batch.gradient_accumulation_steps * num_ranks,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "gradient_clipping": training.optimizer.grad_clip,
        "bf16": {"enabled": training.precision == "bf16"},
        # Stage 3 would cast buffers to bf16, but a checkpoint's buffers must not depend on the stage.
        "data_types": {"keep_in_fp32_modules": ["*"]},
        "zero_optimization": zero,
        # torch's fused AdamW also runs on the CPU; DeepSpeed's CPU Adam would be compiled at run time.
        "zero_force_ds_cpu_optimizer": False,
        # DeepSpeed knows AdamW by its class; forge's other optimizers step on its flat shards just as well.
        "zero_allow_untested_optimizer": training.optimizer.name != "adamw",
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }
