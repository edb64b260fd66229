"""Whether a model sees later tokens: found by running a small random copy of it, not by a list of names.

Next-token prediction is only meaningful if the output at a position depends on the tokens up to it. A copy with the
same class and the same flags, but two layers of small width, is run on two sequences that differ in their last
tokens: outputs before them must be equal. The same run shows whether a forward pass works at all, such as one that
needs a padding token or more positions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from forge.model.auto_classes import AUTO_CLASSES, build_on_meta
from forge.model.composite import PARTS
from forge.model.seq2seq import seq2seq_logits
from forge.objective.registry import AutoClass
from forge.process import one_line

NUM_TOKENS = 16
_VOCAB = 64
_TOLERANCE = 1e-4
"""Relative to the largest output; experts see other numbers of tokens in the two runs, which rounds differently."""
_MAX_PARAMETERS = 60_000_000
"""Largest copy: 240 MB in fp32."""

_SMALL_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads",), 4),
    **dict.fromkeys(("d_ff", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("d_kv", "head_dim", "v_head_dim", "qk_nope_head_dim", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "moe_intermediate_size"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    "qk_rope_head_dim": 8, "rotary_dim": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "shared_expert_intermediate_size": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardProbe:
    """What a run of a small copy showed."""

    looks_ahead: bool | None
    """Whether outputs depend on later tokens; None if no copy could be run."""
    problem: str | None = None
    """Why a forward pass fails, if it does."""


def probe_forward(
    config: PretrainedConfig, *, seq_len: int, auto_class: AutoClass = "AutoModelForCausalLM"
) -> ForwardProbe:
    """Run a small random copy of a transformers model that maps tokens to outputs.

    Args:
        config: of the whole model; it is not changed.
        seq_len: tokens that the model will be given at once.
    """
    problem, is_certain = None, False
    for is_narrow in (True, False):
        model = small_copy(config, seq_len=seq_len, is_narrow=is_narrow, auto_class=auto_class)
        if model is None:
            continue
        sequences = probe_sequences(model.config)
        try:
            sees = looks_ahead(partial(_outputs, model, auto_class=auto_class), sequences)
        except Exception as error:  # whatever it is; of a narrow copy, its sizes may not fit together
            is_long = _runs(model, sequences[:1, : NUM_TOKENS // 2], auto_class=auto_class)
            which = f"over {seq_len} tokens fails, though one over fewer works" if is_long else "fails"
            problem = f"a forward pass {which}: {one_line(error)}"
            is_certain = not is_narrow
            continue
        return ForwardProbe(looks_ahead=sees)
    if problem is not None and (is_certain or _fails_on_meta(config, auto_class=auto_class)):
        return ForwardProbe(looks_ahead=None, problem=problem)
    return ForwardProbe(looks_ahead=None)


@torch.no_grad()
def looks_ahead(forward: Callable[[Tensor], Tensor], sequences: Tensor) -> bool:
    """Whether outputs depend on later tokens.

    Args:
        forward: returns outputs float[1, T, ...].
        sequences: int64[2, T]; the first half of the first is run with its own second half and with the other's.
    """
    kept = sequences.shape[1] - sequences.shape[1] // 2
    own, other = sequences[:1], torch.cat([sequences[:1, :kept], sequences[1:, kept:]], dim=1)
    before, after = (forward(ids)[:, :kept].double() for ids in (own, other))
    scale = before.abs().max().clamp(min=1e-30)
    return bool((before - after).abs().max() > _TOLERANCE * scale)


def probe_sequences(config: PretrainedConfig) -> Tensor:
    """Different tokens, none of them special. Shapes: int64[2, 16]."""
    special = {
        value for key, value in config.to_dict().items() if key.endswith("_token_id") and isinstance(value, int)
    }
    ids = [token for token in range(1, _VOCAB) if token not in special]
    return torch.tensor([ids[: 2 * NUM_TOKENS : 2], ids[1 : 2 * NUM_TOKENS + 1 : 2]])


@torch.no_grad()
def small_copy(config: PretrainedConfig, *, seq_len: int, is_narrow: bool, auto_class: AutoClass) -> Any:
    """Build a copy with weights that let every input through.

    Args:
        is_narrow: reduce the widths too, not only the numbers of layers, tokens and experts.

    Returns: None if it is too large, or its sizes do not fit together, which says nothing about the model.
    """
    random_state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        small = type(config).from_dict(_shrunk(config.to_dict(), seq_len=seq_len, is_narrow=is_narrow))
        small._attn_implementation = "eager"
        if (
            sum(parameter.numel() for parameter in _on_meta(small, auto_class=auto_class).parameters())
            > _MAX_PARAMETERS
        ):
            return None
        model = AUTO_CLASSES[auto_class].cls.from_config(small, dtype=torch.float32, trust_remote_code=False)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
    except Exception:  # transformers validates with exceptions of several unrelated classes
        return None
    finally:
        torch.set_rng_state(random_state)
    return model.eval()


def _outputs(model: Any, tokens: Tensor, *, auto_class: AutoClass) -> Tensor:
    """Logits of the tokens, or hidden states of a model without a head; of an encoder-decoder, logits of the tokens
    as labels of a fixed source."""
    if auto_class == "AutoModelForSeq2SeqLM":
        # Some rules move the last label, an end of text, to the front; it is the same in all sequences.
        labels = torch.cat([tokens[:, :-1], torch.zeros_like(tokens[:, -1:])], dim=1)
        return seq2seq_logits(model, source=torch.full_like(tokens, 3), labels=labels)
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    out = model(input_ids=tokens, **options)
    found: Tensor = out.logits if "logits" in out else out.last_hidden_state
    return found


def _runs(model: Any, tokens: Tensor, *, auto_class: AutoClass) -> bool:
    try:
        with torch.no_grad():
            _outputs(model, tokens, auto_class=auto_class)
    except Exception:  # whatever it is
        return False
    return True


def _fails_on_meta(config: PretrainedConfig, *, auto_class: AutoClass) -> bool:
    """Whether a pass of the whole model fails without values, where one of its class with default keys works."""
    tokens = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        own, default = (_on_meta(one, auto_class=auto_class) for one in (config, type(config)()))
        return not _runs(own, tokens, auto_class=auto_class) and _runs(default, tokens, auto_class=auto_class)


def _on_meta(config: PretrainedConfig, *, auto_class: AutoClass) -> Any:
    return build_on_meta(copy.deepcopy(config), auto_class=auto_class).eval()


def _shrunk(body: Mapping[str, Any], *, seq_len: int, is_narrow: bool) -> dict[str, Any]:
    counts = {key: value for key, value in body.items() if _is_layers(key, value)}
    num_layers = counts.get("num_hidden_layers", max(counts.values(), default=0))
    kinds = next((value for key, value in body.items() if key == "layer_types" and value), None)
    kept = sorted({kinds.index(kind) for kind in kinds})[:6] if kinds else range(min(2, num_layers))
    kept = list(kept) if len(kept) > 1 or num_layers < 2 else [0, 1]
    small: dict[str, Any] = {}
    for key, value in body.items():
        if isinstance(value, dict) and (key.endswith("_config") or key in PARTS):
            value = _shrunk(value, seq_len=seq_len, is_narrow=is_narrow)
        elif isinstance(value, list) and num_layers > 1 and len(value) == num_layers:
            value = [value[index] for index in kept]
        elif _is_layers(key, value):
            value = min(value, len(kept))
        elif key == "vocab_size":
            value = min(value, _VOCAB)
        elif key.endswith("_token_id") and isinstance(value, int):
            value = value if 0 <= value < _VOCAB else 0
        elif key.endswith("_token_id") and isinstance(value, list):
            value = 0
        elif key in ("max_position_embeddings", "n_positions", "n_ctx") and isinstance(value, int):
            value = value - seq_len + NUM_TOKENS if value >= seq_len else value
        elif is_narrow and isinstance(value, int) and not isinstance(value, bool):
            value = _narrow(key, value, body)
        small[key] = value
    return small


def _narrow(key: str, value: int, body: Mapping[str, Any]) -> int:
    if key == "head_dim" and "qk_rope_head_dim" in body:
        return min(value, _SMALL_SIZES["qk_rope_head_dim"])
    if key == "num_key_value_heads":
        heads = body.get("num_attention_heads")
        return 1 if value == 1 else 4 if value == heads else 2
    return min(value, _SMALL_SIZES.get(key, value))


def _is_layers(key: str, value: object) -> bool:
    is_count = key in ("n_layer", "n_layers", "num_layers") or key.endswith("_layers")
    return is_count and isinstance(value, int) and not isinstance(value, bool) and value > 0
