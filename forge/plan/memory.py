"""Memory of one worker, by what it is for.

Model state follows the ZeRO paper (arXiv 1910.02054, section 3.1 and figure 1), with bf16 weights and
gradients and an fp32 master copy, first and second moment: 2Ψ + 2Ψ + 12Ψ bytes for Ψ parameters,
each share divided by the world size W from the stage that divides it. In fp32 the weights are their
own master under ZeRO 0, and 4Ψ + 4Ψ + 8Ψ; ZeRO 1 to 3 keep a separate fp32 partition there as well.

Activations follow Korthikanti et al. (arXiv 2205.05198, equation 2) with attention scores left out,
since torch's scaled_dot_product_attention does not keep them. They are an estimate (marked ~ wherever
shown); model state is exact up to padding and communication buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

from forge.config.training import TrainingSpec
from forge.plan.inputs import ModelInfo

# Share of a worker's memory the plan fills; the rest is for the allocator, CUDA context and buffers.
USABLE_SHARE = 0.85
# Largest micro-batch that `auto` takes: beyond it, small models gain nothing on any device we measured.
MAX_AUTO_MICRO_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one worker: on its device, and beside that in its machine's memory."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    ema_bytes: int
    activations_bytes: int
    host_bytes: int
    """Copies of the state in the host's memory, this rank's and those kept for another machine's, and what is
    offloaded."""
    is_on_host: bool
    """Whether the device is the host itself, so that all lies in the same memory."""

    @property
    def state_bytes(self) -> int:
        """What depends on the model alone, not on the micro-batch."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.ema_bytes

    @property
    def total_bytes(self) -> int:
        """What the device must hold."""
        return self.state_bytes + self.activations_bytes + (self.host_bytes if self.is_on_host else 0)


def estimate_memory(
    model: ModelInfo,
    training: TrainingSpec,
    *,
    world_size: int,
    micro_batch_size: int,
    seq_len: int,
    is_on_host: bool,
    num_copies: int = 1,
) -> MemoryEstimate:
    """Estimate one worker's memory at one world size.

    Args:
        num_copies: of a rank's state in the host's memory; see `num_copies_in_memory`.
    """
    stage = training.zero.stage
    half = training.precision == "bf16"
    width = 2 if half else 4
    parameters = model.num_parameters
    trainable = model.num_trainable_parameters
    # A separate master copy exists unless fp32 weights are updated in place (ZeRO 0).
    master = 4 if half or stage > 0 else 0
    shards = world_size if stage >= 1 else 1
    weights = width * parameters
    if stage == 3:
        # The shard, and the largest module while it is gathered for its forward or backward.
        weights = weights // world_size + width * model.largest_module_parameters
    gradients = width * trainable // (world_size if stage >= 2 else 1)
    optimizer = (master + 8) * trainable // shards
    ema = 4 * trainable // shards if training.ema else 0
    # A rank saves its share whatever the stage; of frozen parameters, their own type.
    snapshot = ((16 if training.ema else 12) * trainable + width * (parameters - trainable)) // world_size
    is_offloaded = training.zero.offload == "cpu" and not is_on_host
    return MemoryEstimate(
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=0 if is_offloaded else optimizer,
        ema_bytes=0 if is_offloaded else ema,
        activations_bytes=activation_bytes(model, training, micro_batch_size=micro_batch_size, seq_len=seq_len),
        host_bytes=num_copies * snapshot + (optimizer + ema if is_offloaded else 0),
        is_on_host=is_on_host,
    )


def num_copies_in_memory(*, engine: str, world_size: int) -> int:
    """Ray Train: one, for checkpoints. Elastic: two in turn, and two of another machine's where there is one."""
    if engine == "ray-train":
        return 1
    return 4 if world_size > 1 else 2


def activation_bytes(model: ModelInfo, training: TrainingSpec, *, micro_batch_size: int, seq_len: int) -> int:
    """Bytes kept for the backward pass of one micro-batch, and the logits.

    Per layer and token, in units of one activation value: the inputs of both norms, of q, k, v, of the
    attention (q, k, v and its output), of the output projection and of the MLP, about 10·h, and the
    MLP's inner values, about 3·f (gate, up, their product). With checkpointing only the layer's input
    is kept, and one layer's worth while it is recomputed.
    """
    width = 2 if training.precision == "bf16" else 4
    tokens = micro_batch_size * seq_len
    layer = (10 * model.hidden_size + 3 * model.intermediate_size) * width
    if training.activation_checkpointing:
        layers = model.num_layers * model.hidden_size * width + layer
    else:
        layers = model.num_layers * layer
    # Plain: logits in the model's precision, an fp32 copy, its softmax and gradient. Chunked: one chunk
    # of at most 2**21 logits, plus the fp32 gradient of the head that is summed over chunks.
    if training.cross_entropy == "plain":
        logits = tokens * model.vocab_size * (2 * width + 8)
    else:
        logits = 12 * min(2**21, tokens * model.vocab_size) + 4 * model.vocab_size * model.hidden_size
    return tokens * layers + logits


def max_micro_batch_size(
    model: ModelInfo,
    training: TrainingSpec,
    *,
    world_size: int,
    seq_len: int,
    memory_bytes: int | None,
    is_on_host: bool,
    num_copies: int = 1,
) -> int:
    """The largest micro-batch the estimate allows, from 1 to `MAX_AUTO_MICRO_BATCH`; 1 if nothing fits."""
    if isinstance(training.micro_batch_size, int):
        return training.micro_batch_size
    for size in range(MAX_AUTO_MICRO_BATCH, 1, -1):
        need = estimate_memory(
            model,
            training,
            world_size=world_size,
            micro_batch_size=size,
            seq_len=seq_len,
            is_on_host=is_on_host,
            num_copies=num_copies,
        )
        if memory_bytes is None or need.total_bytes <= USABLE_SHARE * memory_bytes:
            return size
    return 1
