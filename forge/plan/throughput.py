"""Estimate of the time of an optimizer step on GPUs that were not measured.

The time of one micro-batch on one GPU is the sum of
- matrix products: FLOPs ÷ (peak × efficiency). The efficiency grows with the width of the model and with the tokens
  of the micro-batch; the faster the GPU, the larger both must be to keep it busy;
- attention of FlashAttention's kind, which does not store scores: FLOPs (the upper half of a causal mask is not
  computed) ÷ (peak × its own efficiency);
- operations limited by memory (norms, activation functions, residual sums, the loss): bytes ÷ memory bandwidth.
With activation checkpointing the layers' forward pass is computed twice; where it is selective, only its
operations limited by memory. The communication of the ZeRO stage runs
beside it: the longer of the two counts in full and a share of the shorter, because they use the same memory and
are not overlapped at the first and the last layer. The optimizer reads and writes its state once in a step.

A collective operation of W ranks moves V·(W-1)/W bytes per rank through the slowest link of a ring: that within a
node, or all network cards of a node together (Rajbhandari et al., arXiv 1910.02054, section 7; NCCL's rings leave
a node once for all of its GPUs). Ranks that share a sequence exchange queries, keys, values and outputs of every
attention (DeepSpeed Ulysses, arXiv 2309.14509, section 3.2), which nothing hides. Nor is anything computed while
`training.activation_offload` copies the inputs of layers to host memory and back: transformers copies them in the
stream that computes (`PreTrainedModel.activation_checkpointing_enable`).

The ten constants of `Efficiency` were fitted to 104 measured configurations of 125M to 70B parameters on 8 to 512
A100 and H100 GPUs, published by MosaicML (LLM Foundry, scripts/train/benchmarking/README.md at commit 8c8dd48f,
Apache-2.0). `python -m benchmarks.forecast --published FILE --fit` fits them again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from forge.plan.gpus import Gpu

_REFERENCE_FLOPS = 312e12
"""Peak of the GPU to which the constants refer: A100, bf16."""


LAUNCH_S_PER_LAYER = 1e-3
"""Least time of forward and backward pass of one layer and micro-batch: the CPU launches about a hundred kernels.

Assumed: 10 µs each. The constants below were fitted to runs with 17 ms and more."""


HOST_COPY_SHARE = 0.8
"""Share of the rate of PCI Express at which page-locked memory is copied, if the GPUs of a node do not share lanes.

Assumed; `benchmarks.gpu` measures it (`pinned_copy_to_host_gb_per_s`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Constants of the estimate; see this module's docstring for their origin."""

    matmul: float = 0.886
    """Share of the peak that products of wide matrices reach with many tokens."""
    half_width: float = 517.0
    """Hidden size at which a product takes twice as long as that share would make it, on the reference GPU."""
    half_tokens: float = 394.0
    """Tokens in a micro-batch, likewise."""
    balance_exponent: float = 0.849
    """How both grow with the peak of the GPU."""
    attention: float = 0.32
    """Share of the peak that attention reaches on the reference GPU."""
    attention_exponent: float = 0.479
    """How that share falls with the peak."""
    activation_traffic: float = 1.405
    """Bytes read and written by operations limited by memory ÷ bytes of the activations of a layer."""
    intra_node: float = 0.551
    """Share of the bandwidth within a node that collective operations reach."""
    inter_node: float = 0.405
    """Share of the bandwidth between nodes, likewise."""
    exposed: float = 0.63
    """Share of the shorter of computation and communication that the longer does not hide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interconnect:
    """Links between the GPUs of a job."""

    gpus_per_node: int
    inter_node_bytes_per_s: float
    """Of all network cards of a node together, one direction."""
    intra_node_bytes_per_s: float | None = None
    """Between the GPUs of a node, one direction; None: of the GPU's data sheet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What one GPU does in one optimizer step."""

    tokens: int
    """In a micro-batch."""
    num_micro_batches: int
    matmul_flops: float
    """Of a token, forward and backward; recomputation not counted."""
    recomputed_flops: float = 0.0
    """Of a token: the layers' forward products that activation checkpointing repeats."""
    recomputes: bool = False
    """Whether activation checkpointing repeats the operations limited by memory, and the exchange of sequences."""
    attention_flops: float
    """Of a token, forward, as computed: half of all pairs under a causal mask."""
    hidden_size: int
    activation_bytes: float
    """Of a token, in all layers together."""
    logit_bytes: float
    """Of a token, read and written by the output head and the loss."""
    weight_bytes: float
    """Of all parameters, as they are gathered."""
    gradient_bytes: float
    """Of the trained ones, as they are reduced."""
    state_bytes: float
    """Optimizer state, master weights and gradients that one rank reads and writes in a step."""
    stage: int
    world_size: int
    peak_flops: float
    """Of the GPU in the job's precision, FLOP/s."""
    num_layers: int = 0
    hpz_partition_size: int = 1
    """Workers in a group of hpZ; 1: no groups."""
    num_shard_groups: int = 1
    """Groups of workers that each hold the whole state; 1: no groups."""
    sequence_parallel_size: int = 1
    """Ranks that share each sequence."""
    offloaded_bytes: float = 0.0
    """Of a token: inputs of all layers that are copied to host memory, and back (`training.activation_offload`)."""
    exchanged_bytes: float = 0.0
    """Of a token, sent to the other ranks of its sequence in one pass over all layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Estimated seconds of one optimizer step, by part."""

    matmul_s: float
    attention_s: float
    memory_s: float
    communication_s: float
    """As long as it takes by itself."""
    exchange_s: float
    """Between the ranks that share a sequence, before and after each attention, which wait for it."""
    copies_s: float
    """Of layers' inputs to host memory and back, while nothing is computed."""
    optimizer_s: float
    total_s: float
    """Less than the sum: communication is partly hidden."""
    tokens: int
    """Of one GPU in the step."""

    @property
    def tokens_per_s(self) -> float:
        """Of one GPU."""
        return self.tokens / self.total_s


def estimate_step(
    work: StepWork, *, gpu: Gpu, interconnect: Interconnect, efficiency: Efficiency | None = None
) -> StepTime:
    """Estimate the time of one optimizer step."""
    constants = efficiency or Efficiency()
    speed = work.peak_flops / _REFERENCE_FLOPS
    share = _matmul_share(work, speed=speed, constants=constants)
    products = 4 if work.recomputed_flops else 3
    attention_share = constants.attention * math.pow(speed, -constants.attention_exponent)
    # The backward pass of such attention computes the scores again: 2.5 forward passes.
    attention_flops = (products + 0.5) * work.attention_flops
    traffic = constants.activation_traffic * _passes(work) * work.activation_bytes + work.logit_bytes
    matmul_s = work.tokens * (work.matmul_flops + work.recomputed_flops) / (work.peak_flops * share)
    attention_s = work.tokens * attention_flops / (work.peak_flops * attention_share)
    memory_s = work.tokens * traffic / gpu.memory_bytes_per_s
    launch_s = LAUNCH_S_PER_LAYER * work.num_layers
    computed_s = work.num_micro_batches * max(matmul_s + attention_s + memory_s, launch_s)
    communication_s = _communication_s(work, gpu=gpu, interconnect=interconnect, constants=constants)
    optimizer_s = work.state_bytes / gpu.memory_bytes_per_s
    exchange_s = bytes_moved(work).exchanged / _bandwidth(gpu, interconnect, work.sequence_parallel_size, constants)
    copied = 2 * work.num_micro_batches * work.tokens * work.offloaded_bytes
    copies_s = copied / (HOST_COPY_SHARE * gpu.host_bytes_per_s)
    hidden = (1 - constants.exposed) * min(computed_s, communication_s)
    return StepTime(
        matmul_s=work.num_micro_batches * matmul_s,
        attention_s=work.num_micro_batches * attention_s,
        memory_s=work.num_micro_batches * memory_s,
        communication_s=communication_s,
        exchange_s=exchange_s,
        copies_s=copies_s,
        optimizer_s=optimizer_s,
        total_s=computed_s + communication_s - hidden + exchange_s + copies_s + optimizer_s,
        tokens=work.tokens * work.num_micro_batches,
    )


def _matmul_share(work: StepWork, *, speed: float, constants: Efficiency) -> float:
    needed = math.pow(speed, constants.balance_exponent)
    slowdown = 1 + needed * (constants.half_width / work.hidden_size + constants.half_tokens / work.tokens)
    return constants.matmul / slowdown


@dataclass(frozen=True, slots=True, kw_only=True)
class BytesMoved:
    """Bytes that each rank sends in the collective operations of a step."""

    sharing: float
    """In those of the ranks that divide the state: all, or a shard group."""
    in_groups: float
    """In those of a group of hpZ."""
    between_groups: float
    """In those of the ranks with the same shard, one of each shard group."""
    exchanged: float
    """To the ranks that share its sequences, before and after each attention."""


def bytes_moved(work: StepWork) -> BytesMoved:
    """Return the bytes that each rank sends in a step.

    Stage 3 gathers the weights for the forward and the backward pass of each micro-batch and reduces its
    gradients. At stages 0 to 2 DeepSpeed reduces gradients by all-reduce, which sends twice their bytes
    (`use_multi_rank_bucket_allreduce`): at stage 2 those of each micro-batch, at 0 and 1 once in a step; stages 1
    and 2 gather the updated weights once. With hpZ the first forward pass of a step alone gathers from all ranks;
    the other 2μ - 1 passes of μ micro-batches gather within the group. At stage 3 a model of less than about 1e9
    parameters moves less, since DeepSpeed keeps weights between passes (`stage3_max_live_parameters`).

    Where the ranks form shard groups, each of S ranks, all of this is among the S ranks of a group, and the
    gradients of a rank's shard are summed over the groups by an all-reduce, once in a step.

    Ranks that share sequences exchange queries, keys, values and outputs of each attention in every forward pass,
    also in one that activation checkpointing repeats, and their gradients in the backward pass.

    Source: ZeRO, arXiv 1910.02054, section 7; hpZ: ZeRO++, arXiv 2306.10209, section 3.2; sequences: DeepSpeed
    Ulysses, arXiv 2309.14509, section 3.2. `python -m benchmarks.rank_costs` counts the bytes of every layout.
    """
    micro_batches, group = work.num_micro_batches, work.hpz_partition_size
    sharing, groups = work.world_size // work.num_shard_groups, work.num_shard_groups
    share = (sharing - 1) / sharing
    between = 2 * (groups - 1) / groups * work.gradient_bytes / sharing
    exchanged = micro_batches * work.tokens * (_passes(work) - 1) * work.exchanged_bytes
    if work.stage == 3 and group > 1:
        return BytesMoved(
            sharing=share * (micro_batches * work.gradient_bytes + work.weight_bytes),
            in_groups=(group - 1) / group * (2 * micro_batches - 1) * work.weight_bytes,
            between_groups=between,
            exchanged=exchanged,
        )
    moved = {
        0: 2 * work.gradient_bytes,
        1: 2 * work.gradient_bytes + work.weight_bytes,
        2: 2 * micro_batches * work.gradient_bytes + work.weight_bytes,
        3: micro_batches * (work.gradient_bytes + 2 * work.weight_bytes),
    }[work.stage]
    return BytesMoved(sharing=share * moved, in_groups=0.0, between_groups=between, exchanged=exchanged)


def _passes(work: StepWork) -> int:
    """Forward passes of a micro-batch, with a backward pass counted as two."""
    return 4 if work.recomputes or work.recomputed_flops else 3


def _communication_s(work: StepWork, *, gpu: Gpu, interconnect: Interconnect, constants: Efficiency) -> float:
    """Seconds of the collective operations of a step.

    The ranks of a machine that are in one shard group sum their shards over the groups at the same time, each in a
    ring of its own, so that they share the machine's network cards.
    """
    moved, sharing = bytes_moved(work), work.world_size // work.num_shard_groups
    seconds = moved.sharing / _bandwidth(gpu, interconnect, sharing, constants)
    seconds += moved.in_groups / _bandwidth(gpu, interconnect, work.hpz_partition_size, constants)
    rings = min(sharing, interconnect.gpus_per_node)
    return seconds + rings * moved.between_groups / _bandwidth(gpu, interconnect, work.world_size, constants)


def _bandwidth(gpu: Gpu, interconnect: Interconnect, world_size: int, constants: Efficiency) -> float:
    """Bytes per second of a ring of so many consecutive ranks."""
    within = (interconnect.intra_node_bytes_per_s or gpu.link_bytes_per_s) * constants.intra_node
    if world_size <= interconnect.gpus_per_node:
        return within
    between = interconnect.inter_node_bytes_per_s * constants.inter_node
    return between if interconnect.gpus_per_node == 1 else min(within, between)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An estimate with its uncertainty: 80 % of measured values lie between `low` and `high`."""

    low: float
    likely: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        """All three, multiplied by a positive number."""
        return Estimate(low=self.low * factor, likely=self.likely * factor, high=self.high * factor)

    def inverted(self, numerator: float = 1.0) -> Estimate:
        """`numerator` ÷ each, in ascending order again."""
        return Estimate(low=numerator / self.high, likely=numerator / self.likely, high=numerator / self.low)


def with_uncertainty(tokens_per_s: float, *, gpu: Gpu) -> Estimate:
    """Return the range of an estimated throughput.

    On the GPUs that the constants were fitted to, published runs of well-tuned programs lie within it; others, and
    forge's own engine, were not measured there, so that the lower end is further away.
    """
    low, high = (0.80, 1.10) if gpu.name in _FITTED else (0.55, 1.20)
    return Estimate(low=low * tokens_per_s, likely=tokens_per_s, high=high * tokens_per_s)


_FITTED = frozenset({"A100-40GB", "A100-80GB", "H100-80GB"})
