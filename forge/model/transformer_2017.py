"""The Transformer of 2017, as it is described in the paper, for transformers and to be read.

An encoder reads the source, a decoder writes the target. Both embed tokens with the same matrix, which is also the
output layer. Each sub-layer is followed by dropout, a residual connection and a layer norm ("post-norm"):

    LayerNorm(x + Dropout(Sublayer(x)))                                                      section 3.1, 5.4
    Attention(Q, K, V) = softmax(Q Kᵀ / sqrt(d_k)) V                                         equation 1
    FFN(x) = max(0, x W₁ + b₁) W₂ + b₂                                                       equation 2
    PE(pos, 2i) = sin(pos / 10000^(2i/d)),  PE(pos, 2i+1) = cos(pos / 10000^(2i/d))          section 3.5

What later models changed: norms before the sub-layers, learnt or rotary positions, gated feed-forward layers.

Importing this module registers the classes with `AutoConfig` and `AutoModelForSeq2SeqLM`, so that an exported
folder loads in transformers wherever forge is installed.

Source: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762. Weights start as in the authors' code
tensor2tensor: Glorot-uniform, embeddings with a variance of 1/d.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

ARCHITECTURE = "transformer-2017"


@strict
class Transformer2017Config(PretrainedConfig):  # type: ignore[misc]
    """The sizes of table 3; the defaults are those of the base model."""

    model_type = ARCHITECTURE
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    }

    vocab_size: int = 37_000
    d_model: int = 512
    d_ff: int = 2048
    num_heads: int = 8
    num_layers: int = 6
    """Of the encoder, and of the decoder."""
    dropout: float = 0.1
    use_cache: bool = False
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = 0

    def validate_architecture(self) -> None:
        """Raises: ValueError if the width cannot be divided among the heads, or is odd."""
        if self.d_model % self.num_heads or self.d_model % 2:
            raise ValueError(
                f"d_model is {self.d_model}: it must be even and a multiple of num_heads: {self.num_heads}"
            )


def sinusoids(length: int, *, width: int, device: torch.device) -> Tensor:
    """Return the encodings of positions, section 3.5. Shapes: float[length, width]."""
    positions = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    frequencies = 10_000 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angles = positions * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class TokenEmbedding(nn.Module):
    """Embeddings times sqrt(d), plus the encodings of their positions, sections 3.4 and 3.5."""

    def __init__(self, config: Transformer2017Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor) -> Tensor:
        width = self.tokens.embedding_dim
        scaled = self.tokens(ids) * math.sqrt(width)
        places = sinusoids(ids.shape[1], width=width, device=ids.device)
        embedded: Tensor = self.dropout(scaled + places.to(scaled.dtype))
        return embedded


class MultiHeadAttention(nn.Module):
    """Attention in several subspaces at once, section 3.2.2."""

    def __init__(self, config: Transformer2017Config) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query, self.key, self.value, self.output = (
            nn.Linear(config.d_model, config.d_model, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, memory: Tensor, *, is_visible: Tensor | None) -> Tensor:
        """Let each position of `x` look at the positions of `memory`.

        Shapes: x: [n, T, d]; memory: [n, S, d]; is_visible: bool, broadcast to [n, heads, T, S].
        """
        q, k, v = self._heads(self.query(x)), self._heads(self.key(memory)), self._heads(self.value(memory))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if is_visible is not None:
            scores = scores.masked_fill(~is_visible, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
        joined: Tensor = self.output((weights @ v).transpose(1, 2).flatten(2))
        return joined

    def _heads(self, x: Tensor) -> Tensor:
        """[n, T, d] → [n, heads, T, d / heads]."""
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them, section 3.3."""

    def __init__(self, config: Transformer2017Config) -> None:
        super().__init__()
        self.inner = nn.Linear(config.d_model, config.d_ff)
        self.outer = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(self.inner(x).relu())
        return out


class EncoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """Self-attention over the source, then a feed-forward network."""

    def __init__(self, config: Transformer2017Config) -> None:
        super().__init__()
        self.attention, self.feed_forward = MultiHeadAttention(config), FeedForward(config)
        self.norms = nn.ModuleList(nn.LayerNorm(config.d_model) for _ in range(2))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, is_token: Tensor | None) -> Tensor:
        x = self.norms[0](x + self.dropout(self.attention(x, x, is_visible=is_token)))
        out: Tensor = self.norms[1](x + self.dropout(self.feed_forward(x)))
        return out


class DecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """Self-attention over the tokens written so far, attention to the source, then a feed-forward network."""

    def __init__(self, config: Transformer2017Config) -> None:
        super().__init__()
        self.attention, self.cross_attention = MultiHeadAttention(config), MultiHeadAttention(config)
        self.feed_forward = FeedForward(config)
        self.norms = nn.ModuleList(nn.LayerNorm(config.d_model) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, memory: Tensor, is_earlier: Tensor, is_token: Tensor | None) -> Tensor:
        x = self.norms[0](x + self.dropout(self.attention(x, x, is_visible=is_earlier)))
        x = self.norms[1](x + self.dropout(self.cross_attention(x, memory, is_visible=is_token)))
        out: Tensor = self.norms[2](x + self.dropout(self.feed_forward(x)))
        return out


class SourceEncoder(nn.Module):
    """Token ids of the source → one vector for each of them. It holds the embedding that the decoder shares."""

    def __init__(self, config: Transformer2017Config) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.main_input_name = "input_ids"

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        x, is_token = self.embedding(input_ids), _broadcast(attention_mask)
        for layer in self.layers:
            x = layer(x, is_token)
        return BaseModelOutput(last_hidden_state=x)


class TargetDecoder(nn.Module):
    """Embedded tokens of the target and the encoded source → one vector for each token of the target."""

    def __init__(self, config: Transformer2017Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor, memory: Tensor, is_token: Tensor | None) -> Tensor:
        length = x.shape[1]
        is_earlier = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        for layer in self.layers:
            x = layer(x, memory, is_earlier, is_token)
        return x


class Transformer2017ForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The whole model with its output layer, in the interface of transformers' encoder-decoders."""

    config_class = Transformer2017Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "encoder.embedding.tokens.weight"}

    def __init__(self, config: Transformer2017Config) -> None:
        super().__init__(config)
        self.encoder, self.decoder = SourceEncoder(config), TargetDecoder(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput:
        """Return the logits of the target, and its mean cross entropy if there are labels.

        Padding of the target needs no mask: it follows the tokens, and no position sees a later one.

        Shapes: input_ids, attention_mask: int64[n, S]; decoder_input_ids, labels: int64[n, T]; logits: [n, T, V].
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("give decoder_input_ids or labels")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        encoded = encoder_outputs or self.encoder(input_ids, attention_mask)
        embedded = self.encoder.embedding(decoder_input_ids)
        logits = self.lm_head(self.decoder(embedded, encoded[0], _broadcast(attention_mask)))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return Seq2SeqLMOutput(loss=loss, logits=logits, encoder_last_hidden_state=encoded[0])

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return the labels behind the first token, the last one left out; -100 becomes the padding token."""
        first = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
        shifted = torch.cat([first, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, **options: Any
    ) -> dict[str, Any]:
        """Return the whole target for every token of it, also where `use_cache` is true: the model has no cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **options)
        return inputs

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.encoder

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embedding.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embedding.tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding) or module is self.lm_head:
            initialization.normal_(module.weight, mean=0.0, std=self.config.d_model**-0.5)
        elif isinstance(module, nn.Linear):
            initialization.xavier_uniform_(module.weight)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)


def _broadcast(attention_mask: Tensor | None) -> Tensor | None:
    """int64[n, S] → bool[n, 1, 1, S]."""
    return None if attention_mask is None else attention_mask[:, None, None, :].bool()


AutoConfig.register(ARCHITECTURE, Transformer2017Config, exist_ok=True)
AutoModelForSeq2SeqLM.register(Transformer2017Config, Transformer2017ForConditionalGeneration, exist_ok=True)
