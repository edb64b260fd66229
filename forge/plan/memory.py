"""Memory estimate of one worker, split by purpose.

Model state follows the ZeRO paper (arXiv 1910.02054, section 3.1 and figure 1). In bf16, with an fp32 master copy
and AdamW's first and second moment, it takes 2Ψ + 2Ψ + 12Ψ bytes for Ψ parameters; each term is divided by the
world size W from the ZeRO stage that shards it. In fp32 under ZeRO 0 the weights are their own master copy: 4Ψ + 4Ψ
+ 8Ψ; ZeRO 1 to 3 keep a separate fp32 partition in that case too. Other optimizers have other states than these 8Ψ
(`forge.plan.parameter_groups`).

At stage 2 a rank holds the whole gradient of a parameter of which it has a part, so that the term of the gradients
falls less than W grows (`forge.plan.parameter_groups.most_gradients`).

DeepSpeed's own estimators (`estimate_zero2_model_states_mem_needs`, and likewise for ZeRO 3) also count the
gradients in fp32 during an update, 4Ψ ÷ W bytes, here `update_bytes`, when the activations are gone, and under
ZeRO 3 the largest module with its gradient; tests/plan/test_memory_deepspeed.py holds every difference.

Under ZeRO 3 DeepSpeed gathers ahead, up to `MAX_LIVE_PARAMETERS` whole parameters, and reduces gradients in
buckets: `gathered_bytes`, `bucket_bytes` and `reduction_bytes`.

Activations follow Korthikanti et al. (arXiv 2205.05198, equation 2) without attention scores, because torch's
scaled_dot_product_attention does not store them. They are an estimate (shown with ~); model state is exact up to
padding and communication buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from forge.config.training import TrainingSpec
from forge.plan.deepspeed_config import REDUCE_BUCKET
from forge.plan.inputs import ModelInfo, TeacherInfo
from forge.plan.parameter_groups import OptimizerState, most_gradients
from forge.plan.rank_groups import NO_GROUPS, RankGroups
from forge.plan.snapshot_memory import WEIGHT_BYTES, snapshot_bytes
from forge.plan.window_memory import has_windows, repeated_bytes, window_mask_bytes

USABLE_SHARE = 0.85
"""Share of a worker's memory that the plan fills; the rest is for the allocator, CUDA context and buffers."""
LIBRARIES_BYTES = 425 * 2**20
"""Resident memory of a rank on CPU before it builds the model: Python, torch, DeepSpeed and transformers.

Source: measured with the versions of constraints.txt; tests/train/test_libraries.py measures it again."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a parameter in 4 bits: for each 64 there is a scale of 8 bits, and for each 256 scales one in fp32.

Source: QLoRA, arXiv 2305.14314, section 3, "Double Quantization"."""
HOST_ACTIVATIONS = 1.8
"""Resident memory that activations take on CPU ÷ their bytes: what the C library's allocator does not give back to
the system, or cannot reuse between micro-batches. Giving it back at once doubles the time of a step in the kernel.
Logits of 32 MiB or more are pages of their own, which it does give back (DEFAULT_MMAP_THRESHOLD_MAX, mallopt(3)).

Source: measured, 1.8 in bf16 with micro-batches of 8 and 1; `benchmarks.memory` measures it again."""
STANDBY_BYTES = 512 * 2**20
"""GPU memory of a standby process: its CUDA context, with cuBLAS loaded.

Assumed, since it depends on GPU and driver and was not measured; torch's allocator does not count it."""
MAX_LIVE_PARAMETERS = 1_000_000_000
"""Whole parameters that ZeRO 3 gathers ahead at most, before the one that it needs at once. DeepSpeed's default of
`stage3_max_live_parameters`.

Source: DeepSpeed 0.19.8, `PartitionedParameterCoordinator.fetch_sub_module`: each module that is called gathers up
to a bucket more, until so many are live; none that is used again within `stage3_max_reuse_distance` is released."""
PREFETCH_BUCKET = 50_000_000
"""Parameters that ZeRO 3 gathers into one buffer, before the last of them. DeepSpeed's default of
`stage3_prefetch_bucket_size`."""
_MAPPED_BYTES = 32 * 2**20
MAX_AUTO_MICRO_BATCH = 8
"""Largest micro-batch that `auto` picks: small models gained nothing beyond it on any device we measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes that one worker needs on its device and in its machine's memory."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    ema_bytes: int
    activations_bytes: int
    logits_bytes: int = 0
    """The part of `activations_bytes` that is logits of 32 MiB or more."""
    update_bytes: int = 0
    """During an update, when activations are gone: gradients in fp32, and on CPU a step's size in fp32, which all
    optimizers but Adafactor compute for the whole shard at once."""
    gathered_bytes: int = 0
    """Under ZeRO 3, during a pass: whole parameters, and the buffer from which the newest of them are copied."""
    bucket_bytes: int = 0
    """Under ZeRO 3: the bucket that collects gradients, allocated for the whole run."""
    reduction_bytes: int = 0
    """Under ZeRO 3, while a bucket is reduced: its gradients in the order of the ranks, and gloo's copy on CPU."""
    host_bytes: int
    """In host memory: snapshots of this rank, replicas of another node's, and offloaded optimizer state."""
    standby_bytes: int = 0
    """On a GPU under the elastic engine: the CUDA context of the process that waits to become the next rank."""
    libraries_bytes: int = 0
    """Python and the imported libraries, if the device is the CPU."""
    is_on_host: bool
    """Whether the device is the CPU, so that everything shares the host's memory."""

    @property
    def state_bytes(self) -> int:
        """The part that does not depend on the micro-batch, without what ZeRO 3 gathers and reduces."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.ema_bytes

    @property
    def total_bytes(self) -> int:
        """What the device must hold."""
        fixed = self.state_bytes + self.bucket_bytes + self.standby_bytes
        if self.is_on_host:
            # Whole parameters are allocated and freed between activations, and their memory is kept like theirs.
            freed = self.activations_bytes - self.logits_bytes + self.gathered_bytes
            held = (
                round(HOST_ACTIVATIONS * freed) + self.logits_bytes + max(self.update_bytes, self.reduction_bytes)
            )
            return fixed + held + self.host_bytes + self.libraries_bytes
        passes = self.activations_bytes + self.gathered_bytes + self.reduction_bytes
        return fixed + max(passes, self.update_bytes)

    def fits(self, memory_bytes: int) -> bool:
        """Whether a device with this much memory can hold it."""
        return self.total_bytes <= USABLE_SHARE * memory_bytes


def estimate_memory(
    model: ModelInfo,
    training: TrainingSpec,
    *,
    world_size: int,
    micro_batch_size: int,
    seq_len: int,
    is_on_host: bool,
    state: OptimizerState,
    num_copies: int = 1,
    has_standby: bool = False,
    teacher: TeacherInfo | None = None,
    holds_reference: bool = False,
    groups: RankGroups = NO_GROUPS,
    sequence_parallel_size: int = 1,
) -> MemoryEstimate:
    """Estimate the memory of one worker at one world size.

    Args:
        micro_batch_size: in sequences.
        seq_len: tokens per sequence.
        state: of the optimizer; see `optimizer_state`.
        num_copies: copies of one rank's state in host memory; see `num_copies_in_memory`.
        has_standby: the next rank of its GPU waits beside it (the elastic engine).
        teacher: of a distillation.
        holds_reference: every worker holds the model as it was before training, too.
        sequence_parallel_size: ranks that share each sequence; its activations and logits are divided by it.
    """
    stage = training.zero.stage
    trainable = model.num_trainable_parameters
    # A separate master copy exists unless fp32 weights are updated in place (ZeRO 0).
    master = 4 if training.precision == "bf16" or stage > 0 else 0
    sharing = world_size // groups.num_shard_groups
    shards = sharing if stage >= 1 else 1
    weights = _weights_bytes(model, training, sharing=sharing, hpz_partition_size=groups.hpz_partition_size)
    gradients = _gradients_bytes(model, training, state=state, sharing=sharing)
    optimizer = (master * trainable + state.sharded_bytes) // shards + state.replicated_bytes
    ema = 4 * trainable // shards if training.ema else 0
    host = snapshot_bytes(model, training, state=state, num_copies=num_copies, world_size=world_size, groups=groups)
    is_offloaded = training.zero.offload == "cpu" and not is_on_host
    step = _step_bytes(training, is_on_host=is_on_host)
    tokens_of_rank = micro_batch_size * seq_len // sequence_parallel_size
    inputs_on_host = 0 if is_on_host else offloaded_bytes(model, training, num_tokens=tokens_of_rank)
    logits = logits_bytes(model, training, num_tokens=tokens_of_rank)
    activations = logits + activation_bytes(
        model,
        training,
        micro_batch_size=micro_batch_size,
        seq_len=seq_len,
        is_on_host=is_on_host,
        sequence_parallel_size=sequence_parallel_size,
    )
    activations += _fp8_bytes(model, num_tokens=tokens_of_rank) if training.fp8 else 0
    tokens = micro_batch_size * seq_len
    others = _other_models_bytes(model, training, tokens=tokens, teacher=teacher, holds_reference=holds_reference)
    return MemoryEstimate(
        weights_bytes=weights + others[0],
        gradients_bytes=gradients,
        optimizer_bytes=0 if is_offloaded else optimizer,
        ema_bytes=0 if is_offloaded else ema,
        activations_bytes=activations + others[1],
        logits_bytes=logits if logits >= 3 * _MAPPED_BYTES else 0,
        update_bytes=0 if is_offloaded else (master + step) * trainable // shards,
        **_zero3_buffers(model, training, sharing=sharing, is_on_host=is_on_host),
        host_bytes=host + (optimizer + ema if is_offloaded else 0) + inputs_on_host,
        standby_bytes=STANDBY_BYTES if has_standby and not is_on_host else 0,
        libraries_bytes=LIBRARIES_BYTES if is_on_host else 0,
        is_on_host=is_on_host,
    )


def _other_models_bytes(
    model: ModelInfo, training: TrainingSpec, *, tokens: int, teacher: TeacherInfo | None, holds_reference: bool
) -> tuple[int, int]:
    """Of the weights of a teacher and of a reference, and of their activations and those that they add."""
    width, weights, activations = WEIGHT_BYTES[training.precision], 0, 0
    if teacher is not None:
        # The logits of both, those of the student with their gradient; distributions are made of a chunk at a time.
        activations += tokens * width * 2 * model.vocab_size
        if training.distillation.teacher_logits == "live":
            weights += width * teacher.num_parameters
            activations += tokens * width * teacher.vocab_size
    if holds_reference:
        weights += width * model.num_parameters
        if training.cross_entropy == "plain" or not model.has_linear_head:
            activations += tokens * model.vocab_size * (width + 4)  # and a copy in fp32
    return weights, activations


def _weights_bytes(model: ModelInfo, training: TrainingSpec, *, sharing: int, hpz_partition_size: int) -> int:
    """Of the weights; under ZeRO 3 the shard.

    hpZ adds the share of the group's second copy, in the precision of the weights: 2Ψ ÷ group bytes in bf16.
    """
    width, quantised = WEIGHT_BYTES[training.precision], model.num_quantised_parameters
    weights = width * (model.num_parameters - quantised) + round(NF4_BYTES * quantised)
    if training.zero.stage == 3:
        weights = weights // sharing + (weights // hpz_partition_size if hpz_partition_size > 1 else 0)
    return weights


def _gradients_bytes(model: ModelInfo, training: TrainingSpec, *, state: OptimizerState, sharing: int) -> int:
    """Of the gradients between two micro-batches, in the precision of the weights.

    At stage 2 they are those of whole parameters (`most_gradients`); of a model whose parameters are only counted,
    an equal part.
    """
    width, trained = WEIGHT_BYTES[training.precision], model.num_trainable_parameters
    if training.zero.stage == 2 and state.group_numels:
        return width * most_gradients(state.group_numels, num_shards=sharing)
    return width * trained // (sharing if training.zero.stage >= 2 else 1)


def _zero3_buffers(model: ModelInfo, training: TrainingSpec, *, sharing: int, is_on_host: bool) -> dict[str, int]:
    """Return the fields of `MemoryEstimate` for what ZeRO 3 gathers and reduces.

    With the largest module λ of Ψ parameters: min(Ψ, MAX_LIVE_PARAMETERS + λ) whole parameters, and a buffer of
    min(Ψ, PREFETCH_BUCKET + λ). A single worker gathers nothing. The bucket of gradients is allocated whole; on
    CPU only the part that is used takes memory. A gradient larger than the bucket is reduced from where it is.

    Source: DeepSpeed 0.19.8, `all_gather_coalesced`, `reduce_scatter_coalesced`, `_setup_for_real_optimizer`.
    gloo copies the input of a reduce-scatter.
    """
    if training.zero.stage != 3:
        return {}
    width, largest = WEIGHT_BYTES[training.precision], model.largest_module_parameters
    whole, trained = model.num_parameters, model.num_trainable_parameters
    gathered = min(whole, MAX_LIVE_PARAMETERS + largest) + min(whole, PREFETCH_BUCKET + largest)
    reduced = min(trained, max(REDUCE_BUCKET, largest))
    return {
        "gathered_bytes": width * gathered if sharing > 1 else 0,
        "bucket_bytes": width * (min(trained, REDUCE_BUCKET) if is_on_host else REDUCE_BUCKET),
        "reduction_bytes": width * reduced * (2 if is_on_host else 1),
    }


def _step_bytes(training: TrainingSpec, *, is_on_host: bool) -> int:
    """Of a parameter's step, if it is computed outside of the kernel that applies it."""
    return 4 if is_on_host and training.optimizer.name != "adafactor" else 0


def activation_bytes(
    model: ModelInfo,
    training: TrainingSpec,
    *,
    micro_batch_size: int,
    seq_len: int,
    is_on_host: bool,
    sequence_parallel_size: int = 1,
) -> int:
    """Return the bytes stored for the backward pass of one micro-batch, logits left out.

    Ranks that share a sequence hold an equal part of it each: outside of attention a part of the positions, within
    it a part of the heads. Their attention is always fused; with a sliding window it keeps keys and values of all
    heads, and a mask of a chunk (`forge.plan.window_memory`).

    What the layers of a model of transformers keep is measured (`forge.model.kept_activations`); where attention
    is not fused its scores are added: their softmax in fp32, and its copy in the model's precision. Of models that
    cannot be measured:

    Per layer and token, in units of one activation value of hidden size h and MLP size f: the inputs of both norms,
    of q, k, v, of the attention (q, k, v and its output), of the output projection and of the MLP, about 10·h, and
    the MLP's inner values (gate, up, their product), about 3·f. With activation checkpointing only the layer's
    input is stored, plus one layer's values while it is recomputed. Where it is selective, the results of matrix
    products (q, k, v, output projection, and three of the MLP) and the output of fused attention are stored too.
    """
    width = 2 if training.precision == "bf16" else 4
    if model.activation_bytes_per_row is not None:
        return micro_batch_size * model.activation_bytes_per_row * width // 4
    tokens = micro_batch_size * seq_len
    layers = micro_batch_size * model.layer_bytes_per_row.get(training.precision, 0)
    if not layers:
        layers = tokens * model.num_layers * (10 * model.hidden_size + 3 * model.intermediate_size) * width
    is_fused = sequence_parallel_size > 1 or not model.stores_scores(
        is_on_host=is_on_host, seq_len=seq_len, wanted=training.attention
    )
    if not is_fused:
        scores = tokens * seq_len * model.num_attention_heads * model.num_layers
        layers += scores * (4 if width == 4 else 4 + width)
    if training.activation_checkpointing and model.num_layers:
        inputs = tokens * model.num_layers * model.hidden_size * width
        if not is_on_host:
            inputs -= offloaded_bytes(model, training, num_tokens=tokens)
        if training.activation_checkpointing is True:
            layers = inputs + layers // model.num_layers
        else:
            kept = inputs + _selected_bytes(model, training, rows=micro_batch_size, seq_len=seq_len)
            kept += tokens * _attention_bytes(model, width=width) if is_fused else 0
            layers = kept + max(0, layers - kept) // model.num_layers
    if sequence_parallel_size == 1 or not has_windows(model, seq_len=seq_len):
        return layers // sequence_parallel_size
    num_kept = 1 if training.activation_checkpointing else model.num_window_layers
    layers += num_kept * repeated_bytes(model, tokens=tokens, width=width)
    return layers // sequence_parallel_size + window_mask_bytes(model, width=width)


def offloaded_bytes(model: ModelInfo, training: TrainingSpec, *, num_tokens: int) -> int:
    """Return the bytes of layers' inputs that a micro-batch holds in host memory.

    Those of all layers but two: one is computed while that of the next is copied.
    """
    if not (training.activation_offload and training.activation_checkpointing):
        return 0
    width = WEIGHT_BYTES[training.precision]
    return num_tokens * max(0, model.num_layers - 2) * model.hidden_size * width


def _fp8_bytes(model: ModelInfo, *, num_tokens: int) -> int:
    """Of the casts of one product to fp8, while it is computed: of each value of the larger operand two copies in
    fp32, one after the other, and one in fp8; of the smaller one that in fp8.

    Source: torchao 0.18, `hp_tensor_and_scale_to_float8`, uncompiled.
    """
    widest = max(model.hidden_size, model.intermediate_size)
    operands = num_tokens * widest, model.hidden_size * widest
    return 9 * max(operands) + min(operands)


def _selected_bytes(model: ModelInfo, training: TrainingSpec, *, rows: int, seq_len: int) -> int:
    """Of the results of matrix products, measured, else 2·h + 2·f and the widths of q, k and v of each layer."""
    measured = model.product_bytes_per_row.get(training.precision)
    if measured is not None:
        return rows * measured
    keys = model.attention_width * model.num_key_value_heads // max(1, model.num_attention_heads)
    values = 2 * model.hidden_size + 2 * model.intermediate_size + model.attention_width + 2 * keys
    return rows * seq_len * model.num_layers * values * WEIGHT_BYTES[training.precision]


def _attention_bytes(model: ModelInfo, *, width: int) -> int:
    """Of a token's output of fused attention in all layers, with a sum in fp32 for each head."""
    return model.num_layers * (model.attention_width * width + 4 * model.num_attention_heads)


def logits_bytes(model: ModelInfo, training: TrainingSpec, *, num_tokens: int) -> int:
    """Return the bytes of a micro-batch's logits in the loss.

    Plain: logits in the model's precision, an fp32 copy, its softmax and gradient; of masked tokens alone where the
    head allows it. Chunked: one chunk of at most 2**21 logits, plus the fp32 gradient of the head that is summed
    over chunks. Of a class of the user they are in `activation_bytes_per_row`.
    """
    if model.activation_bytes_per_row is not None:
        return 0
    width = WEIGHT_BYTES[training.precision]
    if model.has_positionwise_head:
        return round(num_tokens * training.masking.share) * model.vocab_size * (2 * width + 8)
    if training.cross_entropy == "plain" or model.num_outputs is not None:
        return num_tokens * (model.num_outputs or model.vocab_size) * (2 * width + 8)
    return 12 * min(2**21, num_tokens * model.vocab_size) + 4 * model.vocab_size * model.hidden_size


def max_micro_batch_size(
    training: TrainingSpec, *, estimate: Callable[..., MemoryEstimate], memory_bytes: int | None
) -> int:
    """Return the largest micro-batch that fits, from 1 to `MAX_AUTO_MICRO_BATCH`; 1 if nothing fits.

    Args:
        estimate: `estimate_memory` with everything but `micro_batch_size` given.
        memory_bytes: of one worker; None if unknown, and then everything fits.
    """
    if isinstance(training.micro_batch_size, int):
        return training.micro_batch_size
    for size in range(MAX_AUTO_MICRO_BATCH, 1, -1):
        if memory_bytes is None or estimate(micro_batch_size=size).fits(memory_bytes):
            return size
    return 1
