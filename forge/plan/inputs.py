"""What the plan must be told: facts about the model, the corpus and the hardware, measured elsewhere.

They are plain numbers, so that planning stays pure: `forge.model.inspect` fills ModelInfo (it needs
transformers, and runs in a process of its own), `forge.data.prepare` fills CorpusInfo, and the
cluster fills HardwareInfo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusInfo:
    """A prepared corpus: token shards under `folder`, ready to be read by any rank.

    Tokens count end-of-text tokens; sequences are windows of `seq_len` predicted tokens that do not
    overlap. The perplexity of a unigram model (train frequencies, add-one smoothing) on the held-out
    tokens is what any trained model must beat; nan where nothing is held out.
    """

    folder: str
    digest: str
    vocab_size: int
    eot_id: int
    seq_len: int
    num_documents: int
    num_text_bytes: int
    num_train_tokens: int
    num_held_out_tokens: int
    num_train_sequences: int
    num_held_out_sequences: int
    unigram_perplexity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A network as transformers builds it, counted without allocating its weights.

    `num_parameters` counts tied weights once. `num_matmul_parameters` are those that every token is
    multiplied with: all matrices, without embeddings unless they are also the output head, and of a
    mixture of experts the share that is active. `attention_width` is heads × head dimension.
    """

    architecture: str
    class_name: str
    num_parameters: int
    num_trainable_parameters: int
    num_matmul_parameters: int
    largest_module_parameters: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    attention_width: int
    vocab_size: int
    max_seq_len: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareInfo:
    """One worker's share of a machine.

    `memory_bytes` is the GPU's memory, or the machine's divided by its workers on CPU; None if unknown.
    `peak_flops` is the dense peak in the job's precision; None if unknown or measured at start (CPU).
    """

    device: Literal["cuda", "cpu"]
    name: str
    memory_bytes: int | None
    peak_flops: float | None
