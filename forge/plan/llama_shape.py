"""Shapes of Llama models of a wanted number of parameters, counted without building them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from forge.plan.inputs import ModelInfo

_WIDTHS = (*range(64, 1024, 64), *range(1024, 2048, 128), *range(2048, 4096, 256), *range(4096, 32769, 1024))
_TIED_BELOW = 2048
"""Widths at which small published models (Llama 3.2, Qwen2.5, SmolLM2) use one matrix as embedding and as head."""
_GROUPED_FROM = 4096
"""Width from which heads share keys and values, 8 of them in all. Source: Llama 3, arXiv 2407.21783, table 3."""
_MAX_LAYERS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """The sizes of a Llama model, by the keys of transformers' `LlamaConfig`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_matrices(self) -> int:
        """Parameters of the matrices of a layer: q and o, k and v, and the three of the MLP."""
        keys = self.num_key_value_heads * self.head_dim
        return 2 * self.hidden_size**2 + 2 * self.hidden_size * keys + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_parameters(self) -> int:
        """All parameters; tied embeddings count once. Two norms in a layer and one at the end."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        return embeddings + self.num_hidden_layers * self.layer_matrices + norms

    def model_info(self) -> ModelInfo:
        """Describe the model as if it had been inspected."""
        head = self.vocab_size * self.hidden_size
        return ModelInfo(
            architecture="llama",
            class_name="LlamaForCausalLM",
            num_parameters=self.num_parameters,
            num_trainable_parameters=self.num_parameters,
            num_matmul_parameters=self.num_hidden_layers * self.layer_matrices + head,
            num_head_matmul_parameters=head,
            largest_module_parameters=max(head, self.layer_matrices),
            num_layers=self.num_hidden_layers,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            attention_width=self.hidden_size,
            vocab_size=self.vocab_size,
            max_seq_len=None,
            has_linear_head=True,
            isolation_problem=None,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
        )


@cache
def llama_shape(num_parameters: int, *, vocab_size: int) -> LlamaShape:
    """Return the shape nearest to a number of parameters, of the proportions of published models.

    Widths are 64 to 128 times the number of layers, as in GPT-3 (arXiv 2005.14165, table 2.1) and Llama
    (arXiv 2302.13971, table 2): the loss hardly depends on it (Kaplan et al. 2020, arXiv 2001.08361, section 3.1).
    A deviation from the proportion counts a tenth of one from the number of parameters.
    """
    shapes = (
        _shape(width, num_layers=num_layers, vocab_size=vocab_size)
        for width in _WIDTHS
        for num_layers in _depths(num_parameters, width=width, vocab_size=vocab_size)
    )
    wanted = min(128.0, max(32.0, 64 * (num_parameters / 125e6) ** 0.17))

    def distance(shape: LlamaShape) -> float:
        proportion = shape.hidden_size / shape.num_hidden_layers
        size = abs(math.log(shape.num_parameters / num_parameters))
        return size + 0.1 * abs(math.log(proportion / wanted))

    return min(shapes, key=distance)


def _depths(num_parameters: int, *, width: int, vocab_size: int) -> tuple[int, ...]:
    """The two numbers of layers that bring a width nearest to the number of parameters."""
    one = _shape(width, num_layers=1, vocab_size=vocab_size)
    layers = (num_parameters - one.num_parameters) / one.layer_matrices + 1
    return tuple({min(_MAX_LAYERS, max(1, round_(layers))) for round_ in (math.floor, math.ceil)})


def _shape(width: int, *, num_layers: int, vocab_size: int) -> LlamaShape:
    heads = width // (128 if width >= _TIED_BELOW else 64)
    return LlamaShape(
        hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 64) * 64,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=8 if width >= _GROUPED_FROM and heads % 8 == 0 else heads,
        vocab_size=vocab_size,
        tie_word_embeddings=width < _TIED_BELOW,
    )
