"""Whether the ranks of a generation can quantise gradients (qgZ), by the GPUs that they really see.

DeepSpeed forms the groups of qgZ from the number of GPUs that a process sees, each rank on its own node. A plan
assumes the GPUs of a machine where it does not know them, and a node may have fewer than its neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from forge.events import GradientsNotQuantized, Reporter
from forge.train.process_group import num_visible_devices

_KEY = "zero_quantized_gradients"


def agree_on_quantized_gradients(config: Mapping[str, Any], *, reporter: Reporter) -> dict[str, Any]:
    """Return DeepSpeed's configuration, without qgZ where its groups cannot be formed; collective if it has qgZ."""
    zero = config["zero_optimization"]
    if not zero.get(_KEY):
        return dict(config)
    num_gpus: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(num_gpus, num_visible_devices())
    reason = quantization_problem(num_gpus)
    if reason is None:
        return dict(config)
    reporter.event(GradientsNotQuantized(reason=reason))
    return {**config, "zero_optimization": {key: value for key, value in zero.items() if key != _KEY}}


def quantization_problem(num_gpus: Sequence[int]) -> str | None:
    """Return why DeepSpeed cannot form the groups of qgZ; None if it can.

    Args:
        num_gpus: by rank, the GPUs that it sees on its node.

    Source: deepspeed.utils.groups._get_local_all_to_all_group: ranks that see different numbers form different
    groups, and above the GPUs of one node the ranks after the last whole node are in none.
    """
    num_ranks = Counter(num_gpus)
    if len(num_ranks) > 1:
        seen = ", ".join(f"{count} ranks see {gpus} GPUs" for gpus, count in sorted(num_ranks.items()))
        return f"the nodes have different numbers of GPUs ({seen}), but qgZ reduces within nodes of equal size"
    per_node = num_gpus[0]
    if len(num_gpus) > per_node and len(num_gpus) % per_node:
        return f"{len(num_gpus)} ranks are no multiple of the {per_node} GPUs of a node, within which qgZ reduces"
    return None
