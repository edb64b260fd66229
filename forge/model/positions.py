"""How many tokens the position embeddings of a model are for.

RoBERTa and its relatives count positions from their padding token on: the rows up to its id are of no token.
"""

from __future__ import annotations

from typing import Any

from torch import nn

COUNTED_FROM_PADDING = {
    *("camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
}
"""Architectures whose embeddings call `create_position_ids_from_input_ids`."""


def num_positions(model: Any) -> int | None:
    """Return for how many tokens a transformers model has positions; None if no limit is known."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or config.model_type not in COUNTED_FROM_PADDING:
        return limit
    found = (getattr(module, "position_embeddings", None) for module in model.modules())
    padding = next((one.padding_idx for one in found if isinstance(one, nn.Embedding)), config.pad_token_id)
    return limit if padding is None else limit - padding - 1
