"""`training.zero:` how the training state is divided over the workers."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from forge.config.section import FieldError, GroupSize, Section, WholeOrAuto, raise_errors


class ZeroSpec(Section):
    """DeepSpeed ZeRO (arXiv 1910.02054): which parts of the training state are sharded over the workers."""

    stage: Literal[0, 1, 2, 3] = 2
    """0: nothing is sharded; 1: optimizer states; 2: gradients too; 3: parameters too. DeepSpeed's
    `zero_optimization.stage`. The loss does not depend on it. 2 saves most of the memory without extra
    communication."""

    offload: Literal["none", "cpu"] = "none"
    """Where the optimizer states (master weights and moments) are stored and updated. `none`: on the device;
    `cpu`: in host memory, which frees GPU memory for weights, gradients and activations. DeepSpeed's
    `offload_optimizer`; not available at stage 0."""

    hpz_partition_size: WholeOrAuto = "auto"
    """Number of workers in a group that keeps a second copy of the weights, divided among its workers (hpZ, arXiv
    2306.10209), so that of a step only the first forward pass gathers weights from all workers. It takes the bytes
    of the weights ÷ this number from each GPU. `auto`: the GPUs of a machine where several machines take part and
    the estimated step is shorter by it, else 1; `1`: no groups. At numbers of workers that it does not divide, the
    plan chooses the fastest of smaller groups, fewer workers and no groups. DeepSpeed's `zero_hpz_partition_size`;
    only at stage 3."""

    shard_group_size: GroupSize = "auto"
    """Number of workers that divide the training state among themselves; each group of so many holds all of it,
    gathers weights and reduces gradients within itself, and sums the gradients of a step over the groups once.
    `auto`: the GPUs of one machine or of several, where the state of a group fits and the estimated step is shorter
    by it, else all; `all`: no groups. At numbers of workers that it does not divide, the plan chooses the fastest
    of larger groups, fewer workers and no groups. torch's `ShardingStrategy.HYBRID_SHARD`, once DeepSpeed's
    `mics_shard_size`; not at stage 0, and not with `offload: cpu`."""

    quantized_weights: bool = False
    """Gather weights in 8 bits (qwZ, arXiv 2306.10209): half of the bytes of bf16, but other losses. DeepSpeed's
    `zero_quantized_weights`; only at stage 3 and on GPUs, where DeepSpeed compiles its kernels at the first start,
    which needs CUDA's compiler."""

    quantized_gradients: bool = False
    """Reduce gradients in 4 bits (qgZ, arXiv 2306.10209): a quarter of the bytes of bf16, and other losses; among
    whole machines only, as DeepSpeed has it. DeepSpeed's `zero_quantized_gradients`; as `quantized_weights`."""

    @model_validator(mode="after")
    def _is_divided(self) -> ZeroSpec:
        errors: list[FieldError] = []
        if self.offload != "none" and self.stage == 0:
            errors.append(FieldError("offload", "needs stage 1, 2 or 3: stage 0 shards nothing"))
        size = self.hpz_partition_size
        if size != "auto" and size < 1:
            errors.append(FieldError("hpz_partition_size", "must be auto, 1 (no groups) or the workers of a group"))
        elif self.stage != 3 and size not in ("auto", 1):
            problem = f"needs stage: 3: at stage {self.stage} every worker has all weights"
            errors.append(FieldError("hpz_partition_size", problem, depends_on=("stage",)))
        errors += self._shard_group_errors()
        for key, what in (
            ("quantized_weights", "weights are gathered"),
            ("quantized_gradients", "DeepSpeed has it"),
        ):
            if getattr(self, key) and self.stage != 3:
                errors.append(FieldError(key, f"needs stage: 3: {what} at that stage only", depends_on=("stage",)))
        raise_errors(errors)
        return self

    def _shard_group_errors(self) -> list[FieldError]:
        key, size = "shard_group_size", self.shard_group_size
        if not isinstance(size, int):
            return []
        if size < 2:
            return [
                FieldError(key, "must be auto, all, or at least 2 (with stage: 0 each worker holds everything)")
            ]
        excluded = {
            "stage": self.stage == 0 and "needs stage 1, 2 or 3: at stage 0 nothing is divided",
            "offload": self.offload != "none"
            and "cannot be used with offload: cpu, which takes the norms of gradients before groups are summed",
            "hpz_partition_size": self.hpz_partition_size not in ("auto", 1)
            and "cannot be used with hpz_partition_size: within a group weights are near already",
            "quantized_gradients": self.quantized_gradients
            and "cannot be used with quantized_gradients, which reduces in groups of its own",
        }
        return [FieldError(key, problem, depends_on=(other,)) for other, problem in excluded.items() if problem]
