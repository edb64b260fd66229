"""`training:` what is minimised, for how long, and with which optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from forge.config.class_names import ObjectiveName
from forge.config.classification import ClassificationSpec
from forge.config.distillation import DistillationSpec
from forge.config.embedding import ContrastiveSpec
from forge.config.optimizer import OptimizerSpec
from forge.config.preference import DpoSpec, OrpoSpec, PairLoss, RewardSpec
from forge.config.schedule import ScheduleSpec
from forge.config.section import (
    Checkpointing,
    Count,
    FieldError,
    FlagOrAuto,
    Fraction,
    Interval,
    Number,
    Section,
    WholeOrAuto,
    raise_errors,
    unread_sections,
)
from forge.config.zero import ZeroSpec
from forge.objective.registry import AutoClass, auto_class_of
from forge.units import Every, Length

MAX_STEPS = 10**10
"""Limit of a run; more than any run needs, and the positions of its samples still fit into 64 bits."""

AttentionName = Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"]

_NO_SHARDS_8BIT = (
    "needs zero.stage: 0: its moments are quantised in blocks of 256 elements of a parameter, and the shards of "
    "stages 1 to 3 begin within a block; at these stages lion and adafactor need less memory than adamw"
)

SEQUENCE_PARALLEL_OBJECTIVES = ("causal-lm", "chat")
"""Objectives whose loss is a sum over positions, so that ranks can each compute it for a part of a sequence."""

_READ_WITH = {
    "masking": ("masked-lm",),
    "dpo": ("dpo", "ipo"),
    "orpo": ("orpo",),
    "reward": ("reward",),
    "classification": ("classification",),
    "spans": ("span-corruption",),
    "contrastive": ("contrastive",),
    "distillation": ("distillation",),
}
"""The objectives that read a section of `training`."""


class MaskingSpec(Section):
    """Which tokens are masked; only with `objective: masked-lm`. Of them 80 % become the mask token, 10 % a random
    token, and 10 % stay (arXiv 1810.04805)."""

    share: Fraction = Field(0.15, gt=0, lt=1)
    """Share of the tokens of a sequence, rounded to whole tokens, at least one; special tokens are never masked."""

    whole_words: bool = False
    """Mask all tokens of a word, or none."""


class SpanCorruptionSpec(Section):
    """Which spans are replaced by sentinels; only with `objective: span-corruption` (arXiv 1910.10683, section
    3.1.4)."""

    share: Fraction = Field(0.15, gt=0, lt=1)
    """Share of the tokens of a sequence that are replaced, rounded to whole tokens, at least one."""

    mean_length: Number = Field(3.0, ge=1, le=1000)
    """Mean number of tokens of a replaced span."""

    def num_noise_tokens(self, length: int) -> int:
        """The number of tokens that are replaced in a sequence of at least 2."""
        return min(max(round(length * self.share), 1), length - 1)

    def num_spans(self, length: int) -> int:
        """The number of spans in a sequence of at least 2 tokens."""
        noise = self.num_noise_tokens(length)
        return max(1, min(round(noise / self.mean_length), length - noise))


class EmaSpec(Section):
    """Exponential moving average (EMA) of the weights, stored in fp32 next to the master weights."""

    decay: Number = Field(0.999, gt=0, lt=1)
    """Decay per step: `ema ← decay · ema + (1 - decay) · weights`. In the first steps
    `(1 + step) / (10 + step)` is used while it is smaller, so that the average forgets the initial weights."""

    evaluate: Literal["end", "always"] = "end"
    """When the held-out metrics of the average are measured, as `eval/ema_loss` and `eval/ema_NAME`: after the last
    step, or at every evaluation, which then takes twice as long. `forge checkpoints export --ema` and `forge
    generate --ema` use the average at any time."""


class EarlyStoppingSpec(Section):
    """End the run when an evaluation metric no longer improves; it ends as finished, with a checkpoint."""

    metric: str = "eval/loss"
    """`eval/loss`, or `eval/NAME` for a metric that the objective reports; with `ema.evaluate: always` also of the
    averaged weights, such as `eval/ema_loss`. `evaluate/TASK/METRIC` for a task of `evaluate` whose `every` is not
    `end`. Whether less or more of it is better follows from the objective or the task."""

    patience: Count = Field(3, ge=1)
    """Number of evaluations in a row without improvement after which the run stops; the same step on any number of
    workers if `evaluate_every` is in steps."""

    min_delta: Number = Field(0.0, ge=0)
    """Change of the metric that counts as an improvement only if it is larger."""


class TrainingSpec(Section):
    """The optimisation; its result does not depend on the machines it runs on."""

    objective: ObjectiveName = "causal-lm"
    """What is minimised. `causal-lm`: the mean cross entropy of the next token. `chat`: the same of
    conversations. `masked-lm`: the mean cross entropy of masked tokens, for encoders such as BERT. `dpo`, `ipo`
    and `orpo`: learn from pairs of answers, of which one is preferred; each pair counts once. `reward`: a number
    for an answer, larger for the preferred one, from the same pairs. `classification`: labels or numbers for
    texts or their words. `seq2seq`: the mean cross entropy of the tokens of targets, given their sources, for
    encoder-decoders such as T5, BART and `transformer-2017`. `span-corruption`: the same of spans of a text,
    given the text without them, to pretrain T5. `contrastive`: embeddings of texts, such that those of a pair are
    alike. `distillation`: the mean cross entropy of the next token mixed with the divergence from a teacher. Of a
    mixture of experts with `model.output_router_logits: true` also its auxiliary loss, for each sequence, pair or
    query by itself, times `model.router_aux_loss_coef`."""

    masking: MaskingSpec = MaskingSpec()
    """Masks of `masked-lm`."""

    dpo: DpoSpec = DpoSpec()
    """Loss of `dpo` and `ipo`."""

    orpo: OrpoSpec = OrpoSpec()
    """Loss of `orpo`."""

    reward: RewardSpec = RewardSpec()
    """Loss of `reward`."""

    classification: ClassificationSpec = ClassificationSpec()
    """Labels of `classification`."""

    spans: SpanCorruptionSpec = SpanCorruptionSpec()
    """Spans of `span-corruption`."""

    contrastive: ContrastiveSpec = ContrastiveSpec()
    """Loss of `contrastive`."""

    distillation: DistillationSpec = DistillationSpec()
    """Teacher and loss of `distillation`."""

    total_steps: Count | None = Field(None, ge=1, le=MAX_STEPS)
    """Length in optimizer steps. Give exactly one of `total_steps`, `total_tokens` and `epochs`."""

    total_tokens: Count | None = Field(None, ge=1)
    """Length in predicted tokens, rounded up to whole steps."""

    epochs: Number | None = Field(None, gt=0, le=1e6)
    """Length in passes over the training sequences, rounded up to whole steps."""

    global_batch_size: Count = Field(32, ge=1, le=2**24)
    """Sequences per optimizer step, the same for any number of workers. DeepSpeed's `train_batch_size`."""

    micro_batch_size: WholeOrAuto = "auto"
    """Sequences per forward and backward pass of one worker; the rest of the batch is accumulated. `auto`: the
    largest that fits the memory estimate, at most 8. DeepSpeed's `train_micro_batch_size_per_gpu`."""

    optimizer: OptimizerSpec = OptimizerSpec()
    """The optimizer and its hyperparameters."""

    schedule: ScheduleSpec = ScheduleSpec()
    """Learning rate by step."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights, activations and gradients in the forward and backward pass; master weights are always
    fp32. DeepSpeed's `bf16.enabled`."""

    fp8: bool = False
    """Compute the products of the linear layers in fp8, by torchao (`forge-train[fp8]` on every machine), on GPUs
    of compute capability 8.9 or above. Not of the output head, nor of layers whose sizes are no multiples of 16;
    the gradients of weights, the weights themselves and the state stay as with `precision: bf16`. Losses are near
    those without it, and depend as little on the number of workers. Off by default: no GPU has shown what it
    gains, and torchao gains with `compile: on` only. torchao's recipe `rowwise_with_gw_hp`."""

    zero: ZeroSpec = ZeroSpec()
    """Sharding of the training state over the workers."""

    sequence_parallel: WholeOrAuto = "auto"
    """Ranks that share each sequence (Ulysses, arXiv 2309.14509): each holds a part of its positions, and in
    attention all positions of a part of the heads. Activations per rank are divided by it. It must divide the
    attention heads, the key-value heads and `data.seq_len`. `1`: none. `auto`: 1, or the fewest ranks at which a
    sequence fits the memory estimate. At a number of workers that it does not divide, a smaller number is taken or
    ranks are left without sequences, whichever takes less computation. DeepSpeed's `sequence_parallel_size`."""

    activation_checkpointing: Checkpointing = False
    """`true`: recompute the activations of each layer in the backward pass: about a third more FLOPs, far less
    memory. `selective`: likewise, but keep the results of matrix products and of fused attention: hardly more
    FLOPs, and memory between the two. Losses are equal bit for bit. torch's `checkpoint`, of `selective` with
    `create_selective_checkpoint_contexts`."""

    activation_offload: bool = False
    """Hold the inputs of layers, which `activation_checkpointing` keeps, in page-locked host memory until the
    backward pass: on the GPU those of two layers remain. Both copies take time of the step. Losses are equal bit
    for bit. Has no effect on a CPU. transformers' `activation_checkpointing_enable(offload=True)`."""

    attention: AttentionName = "auto"
    """How attention is computed; losses agree within rounding. `auto`: on a GPU in bf16 the first of
    FlashAttention-3, FlashAttention-2 and `sdpa` that is installed and runs on every rank; else `sdpa`, torch's
    fused attention, or on a CPU up to 512 tokens `eager`, three plain products. A name is refused where it is not
    possible; where ranks share sequences only `sdpa` is, and with another name `sequence_parallel: auto` is 1.
    Kernels of the Hub are code that forge does not execute. transformers' `attn_implementation`."""

    liger: FlagOrAuto = "auto"
    """Compute norms, rotary positions and activation functions with Liger's fused kernels (arXiv 2410.10989), on
    GPUs and for the models that it knows; the loss stays forge's own. `auto`: not yet, as no GPU has shown what it
    gains; the plan says so. `true` needs the package liger-kernel (`forge-train[liger]`, with triton 1 GB) on every
    machine. The kernels round otherwise than torch's."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Compile each layer with `torch.compile`, which joins its small operations into few kernels. `auto`: not yet,
    as no GPU has shown what it gains; the plan says so. `on` needs ZeRO stages 0 to 2, no dropout and whole
    sequences on each rank (`sequence_parallel`). Compiling takes a minute or more at the start of a run; a resized
    run finds the code in its cache. The loss agrees within rounding. If a layer cannot be compiled,
    the layers run uncompiled, and the event `CompileFailed` says why."""

    cross_entropy: Literal["chunked", "plain"] = "chunked"
    """`chunked`: compute the loss and its gradient over a few rows of logits at a time, so that the logits of the
    whole micro-batch are never in memory; `plain`: the transformers model's own loss. Both agree
    within rounding."""

    ema: EmaSpec | None = None
    """Keep an average of the weights and report its held-out loss at the end; off by default."""

    early_stopping: EarlyStoppingSpec | None = None
    """Stop before the last step when the held-out loss or another evaluation metric no longer improves; off by
    default."""

    evaluate_every: Interval = Every(steps=100)
    """Interval between measurements of the held-out loss; it is always measured at the end."""

    seed: int = Field(1, ge=0, lt=2**63)
    """Seed of the initial weights and of dropout."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSpec:
        errors: list[FieldError] = []
        micro = self.micro_batch_size
        if micro != "auto" and not 1 <= micro <= self.global_batch_size:
            problem = f"must be in 1..{self.global_batch_size}, the global batch size"
            errors.append(FieldError("micro_batch_size", problem, depends_on=("global_batch_size",)))
        if self.activation_offload and not self.activation_checkpointing:
            problem = "needs activation_checkpointing: true or selective, whose kept inputs it moves"
            errors.append(FieldError("activation_offload", problem, depends_on=("activation_checkpointing",)))
        if self.total_steps is not None:
            too_long = self.schedule_problem(self.total_steps, tokens_per_step=None)
            if too_long is not None:
                key, problem = too_long
                errors.append(FieldError(f"schedule.{key}", problem, depends_on=("total_steps",)))
        if self.optimizer.name == "adamw-8bit" and self.zero.stage != 0:
            errors.append(FieldError("optimizer.name", _NO_SHARDS_8BIT, depends_on=("zero.stage",)))
        errors += self._sequence_parallel_problems()
        errors += self.unread_sections(changed=True)
        errors += self._ipo_problems()
        raise_errors(errors)
        lengths = [self.total_steps, self.total_tokens, self.epochs]
        if sum(length is not None for length in lengths) != 1:
            raise ValueError("give exactly one of 'total_steps', 'total_tokens' and 'epochs'")
        return self

    @property
    def pair_loss(self) -> PairLoss:
        """The loss of `dpo` and `ipo`."""
        return self.dpo.loss or ("ipo" if self.objective == "ipo" else "sigmoid")

    def unread_sections(self, *, changed: bool = False) -> Iterator[FieldError]:
        """Yield the problems of sections that the objective does not read."""
        return unread_sections(self, _READ_WITH, by="objective", changed=changed)

    def _sequence_parallel_problems(self) -> Iterator[FieldError]:
        size = self.sequence_parallel
        if size == "auto" or size == 1:
            return
        if size < 1:
            yield FieldError("sequence_parallel", f"must be auto or a number of ranks from 1, not {size}")
        elif self.objective not in SEQUENCE_PARALLEL_OBJECTIVES:
            served = " and ".join(SEQUENCE_PARALLEL_OBJECTIVES)
            problem = f"is for the objectives {served}; the loss of {self.objective} needs whole sequences; use 1"
            yield FieldError("sequence_parallel", problem, depends_on=("objective",))

    def _ipo_problems(self) -> Iterator[FieldError]:
        if self.objective == "ipo" and self.pair_loss != "ipo":
            problem = "must be ipo or left out with objective: ipo; other losses are of objective: dpo"
            yield FieldError("dpo.loss", problem, nearest="ipo", depends_on=("objective",))
        elif self.objective == "ipo" and self.dpo.label_smoothing:
            yield FieldError("dpo.label_smoothing", "has no meaning for the loss ipo", depends_on=("objective",))

    @property
    def auto_class(self) -> AutoClass:
        """The class of transformers that a model of an architecture is built by."""
        if self.objective == "classification" and self.classification.kind == "token":
            return "AutoModelForTokenClassification"
        return auto_class_of(self.objective)

    def schedule_problem(self, total_steps: int, *, tokens_per_step: int | None) -> tuple[str, str] | None:
        """Return the key of `schedule` that does not fit a training of this many steps, and why; None if all do.

        Args:
            tokens_per_step: None if it is not known yet; lengths in tokens are not checked then.
        """
        length = f"total_steps is {total_steps}"
        if self.total_tokens is not None:
            length = f"total_tokens {self.total_tokens} is {total_steps} steps"
        elif self.epochs is not None:
            length = f"epochs {self.epochs:g} is {total_steps} steps"
        used = 0
        for key, name in (("warmup", "warm-up"), ("decay", "decay")):
            given: Length | None = getattr(self.schedule, key)
            if given is None or (given.tokens is not None and tokens_per_step is None):
                continue
            steps = given.in_steps(total_steps=total_steps, tokens_per_step=tokens_per_step or 1)
            before = f" after {used} of warm-up" if used else ""
            if used + steps > total_steps:
                return key, f"is longer than the training: {steps} {name} steps{before}, but {length}"
            used += steps
        return None
