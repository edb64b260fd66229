"""The files by which the library sentence-transformers loads an exported embedding model.

They say how the embedding of a text is made of the hidden states, and what stands before queries and passages.

Source: https://sbert.net/docs/sentence_transformer/usage/custom_models.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from forge.foreign import parse_object

_MODULES = "sentence_transformers.models."
_POOLING = {"cls": "cls_token", "mean": "mean_tokens", "last_token": "lasttoken"}
_OTHERS = ("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingModel:
    """How a run with `training.objective: contrastive` makes an embedding."""

    pooling: str
    similarity: str
    max_seq_len: int
    """Longest text, in tokens."""
    query_prefix: str = ""
    passage_prefix: str = ""


def write_embedding_files(folder: Path, config: PretrainedConfig, model: EmbeddingModel) -> None:
    """Write `modules.json` and what it names beside the model, its config and its tokenizer.

    Raises: OSError; ValueError if `tokenizer_config.json` is not one.
    """
    names = ["Transformer", "Pooling", *["Normalize"] * (model.similarity == "cosine")]
    paths = ["", *(f"{number}_{name}" for number, name in enumerate(names) if number)]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": _MODULES + name}
        for number, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    for path in paths[1:]:
        (folder / path).mkdir()
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or model.max_seq_len
    _write(folder / "modules.json", modules)
    _write(
        folder / "sentence_bert_config.json",
        {"max_seq_length": min(model.max_seq_len, longest), "do_lower_case": False},
    )
    prompts = {"query": model.query_prefix, "document": model.passage_prefix}
    _write(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": model.similarity},
    )
    modes = {f"pooling_mode_{_POOLING[model.pooling]}": True}
    others = [name for name in (*_POOLING.values(), *_OTHERS) if name != _POOLING[model.pooling]]
    modes |= {f"pooling_mode_{name}": False for name in others}
    width = config.get_text_config().hidden_size
    _write(
        folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes, "include_prompt": True}
    )
    _add_padding_token(folder / "tokenizer_config.json")


def _add_padding_token(path: Path) -> None:
    """Name the end-of-text token as padding where a tokenizer has none: sentence-transformers pads, with a mask."""
    if not path.exists():
        return
    body: dict[str, Any] = parse_object(path.read_bytes())
    if body.get("pad_token") is None and body.get("eos_token") is not None:
        _write(path, body | {"pad_token": body["eos_token"]})


def _write(path: Path, body: list[dict[str, Any]] | Mapping[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n")
