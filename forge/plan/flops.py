"""Floating-point operations that training needs per token; the numerator of MFU.

MFU (model FLOPs utilisation) is defined as in PaLM (arXiv 2204.02311, appendix B): the operations that the forward
and backward pass require, recomputation not counted, divided by the hardware's peak in the same time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from forge.config.job import JobSpec
from forge.objective.registry import OBJECTIVES
from forge.plan.inputs import CorpusInfo, ModelInfo, TeacherInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceShares:
    """How many positions an encoder-decoder computes for each position of the data."""

    encoder: float
    decoder: float


def sequence_shares(job: JobSpec, corpus: CorpusInfo | None) -> SequenceShares:
    """Return the shares of a job: of pairs those of sources and targets, of text what its spans make of it.

    Without a prepared corpus the two texts of a pair count as equally long.
    """
    if job.training.objective == "span-corruption":
        spans = job.training.spans
        sentinels = spans.share / spans.mean_length
        return SequenceShares(encoder=1 - spans.share + sentinels, decoder=spans.share + sentinels)
    if corpus is None or job.data.packing == "concatenate":
        return SequenceShares(encoder=0.5, decoder=0.5)
    targets = _target_share(corpus)
    return SequenceShares(encoder=1 - targets, decoder=targets)


def _target_share(corpus: CorpusInfo) -> float:
    """Share of the positions that are not padding which have a target."""
    filled = corpus.num_train_sequences * corpus.seq_len * (1 - corpus.padding)
    return min(1.0, corpus.num_train_tokens / max(1.0, filled))


def head_share(job: JobSpec, model: ModelInfo, corpus: CorpusInfo | None) -> float:
    """Return the share of positions at which the output head is computed: of masked tokens or the answers of
    preference pairs alone, where the head allows it. Without a prepared corpus all positions of pairs count.
    """
    objective = OBJECTIVES.get(job.training.objective)
    if model.has_positionwise_head:
        return float(job.training.masking.share)
    is_chunked = model.has_linear_head and job.training.cross_entropy == "chunked"
    if objective is None or not objective.has_head_at_targets or not is_chunked or corpus is None:
        return 1.0
    return _target_share(corpus)


def flops_per_token(
    model: ModelInfo, *, seq_len: int, shares: SequenceShares | None = None, share_of_head: float = 1.0
) -> int:
    """Return the FLOPs of forward and backward per position of the data: `6·N - 2·F + 12·L·H·Q·T`.

    N is the number of parameters that each token is multiplied with (not the input embedding, which is a look-up),
    F those of them that are frozen, whose own gradient is not computed, L the number of layers, H·Q the width of
    all attention heads, T the sequence length in tokens. Attention is counted as if it were not causal, as in the
    paper. Of an encoder-decoder, N, F and L are the sums of those of encoder and decoder, each times its share of
    the positions; a layer of the decoder has two attentions.

    Args:
        shares: of an encoder-decoder.
        share_of_head: share of the positions at which the output head is computed; `head_share`.

    Source: PaLM, arXiv 2204.02311, appendix B.
    """
    products = 6 * model.num_matmul_parameters - 2 * model.num_frozen_matmul_parameters
    head = 6 * model.num_head_matmul_parameters - 2 * model.num_frozen_head_matmul_parameters
    products -= round((1 - share_of_head) * head)
    layers: float = model.num_layers
    if model.num_encoder_layers and shares is not None:
        sources = 6 * model.num_source_matmul_parameters - 2 * model.num_frozen_source_matmul_parameters
        products = round(shares.encoder * sources + shares.decoder * (products - sources))
        num_decoder_layers = model.num_layers - model.num_encoder_layers
        layers = shares.encoder * model.num_encoder_layers + shares.decoder * 2 * num_decoder_layers
    return products + round(12 * layers * model.attention_width * seq_len)


def forward_flops_per_token(model: ModelInfo, *, seq_len: int, share_of_head: float = 1.0) -> int:
    """Return the FLOPs of a forward pass alone, per position of the data: a third of `flops_per_token`."""
    whole = replace(model, num_frozen_matmul_parameters=0, num_frozen_head_matmul_parameters=0)
    return flops_per_token(whole, seq_len=seq_len, share_of_head=share_of_head) // 3


def flops_of_job(job: JobSpec, *, model: ModelInfo, corpus: CorpusInfo | None, teacher: TeacherInfo | None) -> int:
    """Return the FLOPs of a step per position of the data, those of a model that is asked beside included."""
    seq_len, share = job.data.seq_len, head_share(job, model, corpus)
    shares = sequence_shares(job, corpus)
    flops = flops_per_token(model, seq_len=seq_len, shares=shares, share_of_head=share)
    if job.has_live_reference:
        flops += forward_flops_per_token(model, seq_len=seq_len, share_of_head=share)
    return flops + (teacher.forward_flops_per_token if teacher is not None and job.holds_teacher else 0)
