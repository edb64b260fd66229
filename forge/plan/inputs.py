"""Inputs of planning: what was measured about the model, the corpus and the hardware.

They are plain numbers, so that planning is pure. `forge.model.inspect` makes ModelInfo (it needs transformers and
therefore runs in a subprocess), `forge.data.prepare` makes CorpusInfo, `forge.runtime.probe` makes HardwareInfo.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from forge.objective.registry import Direction

PLAIN_ATTENTION_TOKENS = 512
"""On CPU torch's fused attention is slower than three plain products up to this many tokens: 1.18 times at 128,
1.08 at 256, 1.07 at 512, 0.70 at 1024 (a training step of a small Llama in bf16, one core)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelsInfo:
    """The labels of a corpus, in the order of their numbers; none if it has numbers instead."""

    names: tuple[str, ...]
    train_counts: tuple[int, ...]
    """How often each is the label of a training example, or of a word of one."""
    held_out_counts: tuple[int, ...]
    num_train: int
    """Training examples, or labelled words of them."""

    @property
    def baseline(self) -> float:
        """Share of the held-out labels that are the most frequent label of the training data: the accuracy of a
        constant answer. nan if nothing is held out."""
        total = sum(self.held_out_counts)
        if not total:
            return math.nan
        best = max(range(len(self.names)), key=self.train_counts.__getitem__)
        return self.held_out_counts[best] / total


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusInfo:
    """A prepared corpus: token shards that any rank can read."""

    folder: str
    digest: str
    """Names the content: equal digests mean equal tokens in equal order."""
    vocab_size: int
    eot_id: int
    """Token id of the end-of-text token."""
    seq_len: int
    """Predicted tokens per sequence; sequences do not overlap."""
    num_documents: int
    num_text_bytes: int
    num_train_tokens: int
    """End-of-text tokens included; of examples, predicted tokens."""
    num_held_out_tokens: int
    num_train_sequences: int
    num_held_out_sequences: int
    unigram_perplexity: float
    """Held-out perplexity of a unigram model (training frequencies, add-one smoothing): a baseline that any trained
    model must beat. nan if nothing is held out."""
    num_skipped_records: int = 0
    """Records that cannot be used and were left out (`data.on_bad_record: skip`)."""
    skipped_records: tuple[str, ...] = ()
    """`FILE:LINE: what is wrong`, of the first ones."""
    labels: LabelsInfo | None = None
    """None unless the format is `labelled`."""
    pad_id: int | None = None
    """Token id of the token that fills up a text, if the tokenizer names one."""
    packing: str = "concatenate"
    """`data.packing`; the fields below are only for examples."""
    num_examples: int = 0
    padding: float = 0.0
    """Share of the positions of the training sequences that hold no token."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """What was split or dropped while the examples were made, by reason."""
    noted_records: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """`FILE:LINE` of the first records of each of the `notes` of which these are known."""
    foreign_target: str | None = None
    """Record, format and value of the first target that is no token id; None if all are."""
    parts: tuple[CorpusPart, ...] = ()
    """Of a mixture; its other numbers are sums over all parts."""

    @property
    def alone(self) -> tuple[CorpusInfo, ...]:
        """The corpora of the parts, or the corpus itself."""
        return tuple(part.corpus for part in self.parts) or (self,)


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusPart:
    """One part of a mixture."""

    name: str
    corpus: CorpusInfo
    """As prepared by itself; a run reads it in the folder of the mixture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedFiles:
    """Files that a pattern reaches and that are not read, for one reason."""

    reason: str
    """A noun phrase: `a hidden file`."""
    count: int
    examples: tuple[str, ...]
    """The first few paths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatternFiles:
    """What one entry of `data.files` gives, or a source of its own."""

    pattern: str
    num_files: int
    size_bytes: int
    """On the disk or in the store, as far as known."""
    kinds: Mapping[str, int]
    """Number of files by kind: `JSON lines, gzip`. Of very many files a part is opened when they are read only."""
    examples: tuple[str, ...]
    """The first few paths."""
    skipped: tuple[SkippedFiles, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusFiles:
    """The files of a corpus, looked at before they are read."""

    patterns: tuple[PatternFiles, ...]
    num_sampled: int
    """Records that were parsed to see that they can be."""
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    """Names of special tokens of the tokenizer that the text of the sample spells, and how often."""
    folder: str = ""
    """The working folder, to which relative patterns refer."""

    @property
    def num_files(self) -> int:
        return sum(pattern.num_files for pattern in self.patterns)

    @property
    def size_bytes(self) -> int:
        return sum(pattern.size_bytes for pattern in self.patterns)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedParameter:
    """A parameter that is trained; tied ones count once."""

    name: str
    shape: tuple[int, ...]
    role: Literal["embedding", "head", "convolution", "other"] = "other"
    """The module that it is a weight of, which optimizers for matrices distinguish."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Layers:
    """Linear layers of a model whose products can be computed in fp8 (`training.fp8`)."""

    num_layers: int
    num_parameters: int
    """Of their weights."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many of the repeated layers' others remain in bf16, by the reason: `that route to experts`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model, counted on the meta device without allocating its weights."""

    architecture: str
    """transformers' `model_type`."""
    class_name: str
    num_parameters: int
    """Tied weights count once."""
    num_trainable_parameters: int
    num_matmul_parameters: int
    """Parameters that each token is multiplied with: all matrices, without embeddings unless they are also the
    output head; of a mixture of experts, the active share. Of a class of the user's own: half its measured
    forward FLOPs per token, attention included; `attention_width` is 0 then."""
    largest_module_parameters: int
    """Of the largest module that ZeRO 3 gathers at once."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    attention_width: int
    """Number of heads × head dimension."""
    vocab_size: int
    num_outputs: int | None = field(default=None, kw_only=True)
    """Logits of a classifier, or the values of an embedding; None if the outputs are logits of the vocabulary."""
    max_seq_len: int | None
    """In tokens; None if the positions do not limit it."""
    has_linear_head: bool
    """Whether logits are a linear map of the last hidden state; the loss may be computed in chunks then."""
    has_positionwise_head: bool = field(default=False, kw_only=True)
    """Of a masked language model: whether logits may be computed at the masked positions alone."""
    isolation_problem: str | None
    """Why examples that share a row would see each other, such as "TinyMixer takes no position_ids"; None if each
    sees only itself."""
    look_ahead_problem: str | None = None
    """Why it cannot learn to predict the next token, such as "a position sees the tokens after it"; None if it sees
    none, or that is not known."""
    notes: tuple[str, ...] = ()
    """What the plan says about its weights: those that the pretrained folder lacks, or that are not used."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """`generation_config.json` of `from_pretrained`, kept for the export."""
    num_frozen_matmul_parameters: int = 0
    """Of `num_matmul_parameters` those that are not trained: no gradient of theirs is computed."""
    num_head_matmul_parameters: int = 0
    """Those of `num_matmul_parameters` after the base model: the output head."""
    num_frozen_head_matmul_parameters: int = 0
    """Of `num_frozen_matmul_parameters` likewise."""
    num_quantised_parameters: int = 0
    """Frozen parameters that are kept in 4 bits (`model.lora.quantize`)."""
    trained: tuple[TrainedParameter, ...] = ()
    """The parameters that are trained, in the order of the model."""
    num_source_matmul_parameters: int = 0
    """Of an encoder-decoder, those of `num_matmul_parameters` that the tokens of sources are multiplied with, and
    not those of targets."""
    num_frozen_source_matmul_parameters: int = 0
    """Of `num_frozen_matmul_parameters` likewise."""
    num_encoder_layers: int = 0
    """Of an encoder-decoder, those of `num_layers` that read the source."""
    num_base_parameters: int = 0
    """Frozen parameters of `from_pretrained`: snapshots and checkpoints refer to them and do not contain them."""
    activation_bytes_per_row: int | None = None
    """Bytes that one row of `seq_len` tokens keeps for the backward pass, in fp32, logits included, of a class of
    the user; None for other models."""
    layer_bytes_per_row: Mapping[str, int] = field(default_factory=dict)
    """Bytes that one row of `seq_len` tokens keeps in the base model with fused attention, by `training.precision`,
    measured on the meta device; empty where the estimate from layers and sizes is used."""
    product_bytes_per_row: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the results of its matrix products, likewise: what `activation_checkpointing: selective` keeps."""
    checkpointing_problem: str | None = None
    """Why its activations cannot be recomputed (`training.activation_checkpointing`); None if they can."""
    selective_problem: str | None = None
    """Why `activation_checkpointing: selective` cannot keep results; None if it can, or that is not known."""
    attention: str | None = None
    """`attn_implementation` of transformers; None if `training.attention` decides (`stores_scores`)."""
    sdpa_problem: str | None = None
    """Why the model cannot use torch's fused attention; None if it can."""
    flash_problem: str | None = None
    """Why the model cannot use FlashAttention; None if it can."""
    num_attention_heads: int = 0
    """Of the text model; 0 if unknown."""
    num_key_value_heads: int = 0
    """Likewise."""
    sliding_window: int | None = None
    """Positions that each sees, itself included, in `num_window_layers`; None if each sees all before it."""
    num_window_layers: int = 0
    """Layers with a sliding window."""
    has_dropout: bool = False
    """Of a model of transformers, whether any rate of dropout is above 0."""
    sequence_parallel_problem: str | None = None
    """Why ranks cannot share a sequence, such as "BloomForCausalLM is not supported"; None if they can."""
    fp8_layers: Fp8Layers | None = None
    """None if unknown."""

    def at_length(self, seq_len: int, *, measured_at: int, grows_positions: bool) -> ModelInfo:
        """Return the model for rows of another length: what a row keeps for the backward pass, in proportion.

        Args:
            measured_at: tokens per row now.
            grows_positions: the number of positions follows `data.seq_len`, so tables of learned ones grow too.
        """

        def scaled(sizes: Mapping[str, int]) -> dict[str, int]:
            return {name: size * seq_len // measured_at for name, size in sizes.items()}

        other = replace(
            self,
            layer_bytes_per_row=scaled(self.layer_bytes_per_row),
            product_bytes_per_row=scaled(self.product_bytes_per_row),
        )
        tables = [one for one in self.trained if grows_positions and _is_position_table(one)]
        if not tables:
            return other
        grown = {
            one.name: replace(one, shape=(one.shape[0] + seq_len - measured_at, *one.shape[1:])) for one in tables
        }
        added = sum(grown[one.name].numel - one.numel for one in tables)
        return replace(
            other,
            trained=tuple(grown.get(one.name, one) for one in self.trained),
            num_parameters=self.num_parameters + added,
            num_trainable_parameters=self.num_trainable_parameters + added,
            largest_module_parameters=max(self.largest_module_parameters, *(one.numel for one in grown.values())),
        )

    def stores_scores(self, *, is_on_host: bool, seq_len: int, wanted: str = "auto") -> bool:
        """Whether attention is computed as plain products, whose scores are kept for the backward pass.

        Args:
            wanted: `training.attention`.
        """
        is_short = is_on_host and seq_len <= PLAIN_ATTENTION_TOKENS
        chosen = self.attention or (None if wanted == "auto" else wanted)
        return chosen == "eager" or (chosen is None and is_short)


def _is_position_table(parameter: TrainedParameter) -> bool:
    """Whether a parameter has a row for each position: `wpe` of GPT-2, `position_embeddings`, `embed_positions`."""
    return parameter.role == "embedding" and ("position" in parameter.name or "wpe" in parameter.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherInfo:
    """The teacher of a distillation."""

    source: str
    """Absolute path, or URL."""
    digest: str
    class_name: str
    num_parameters: int
    forward_flops_per_token: int
    vocab_size: int
    stored_bytes: int | None = None
    """Size of its outputs on the disk (`teacher_logits: stored`); None if there are none, or the corpus is not
    prepared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InitInfo:
    """A checkpoint, or an adapter folder of peft, that a run starts from."""

    source: str
    """Absolute path, or URL."""
    step: int | None
    """None for a folder."""
    digest: str
    """Of its manifest, which has the checksums of all its files; of a folder, of its files."""
    metric: str = ""
    """What its run compares checkpoints by; empty if this step was not evaluated."""
    metric_value: float | None = None
    is_best: bool = False
    """Whether it was the best of its run when the plan was made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeInfo:
    """The packed folder of `code:`, as `forge.code_archive` packs it."""

    digest: str
    num_files: int
    size_bytes: int
    metric_directions: Mapping[str, Mapping[str, Direction]] = field(default_factory=dict)
    """Of each objective in it that the job names: what it reports besides the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareInfo:
    """What one worker gets of a machine."""

    device: Literal["cuda", "cpu"]
    name: str
    memory_bytes: int | None
    """GPU memory, or on CPU the machine's memory divided by its workers; None if unknown."""
    peak_flops: float | None
    """Dense peak in the job's precision, FLOP/s; None if unknown, or measured at start (CPU)."""
    note: str = ""
    """Which kinds of GPU the nodes have, where they differ; a warning of the plan."""
