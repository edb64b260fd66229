"""The Llama whose training state all contenders of `benchmarks.checkpoint` save and load.

One engine for all of them: forge's, which is DeepSpeed's inside. So the tensors, the steps and the noise
of the machine are the same, and what differs is the checkpoint alone.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

import numpy as np
import torch
import torch.distributed as dist

from forge.config.job import JobSpec
from forge.data.loader import MicroBatch
from forge.model.families.base import DataShape
from forge.objective.causal_lm import CausalLm
from forge.plan.batch import plan_batch
from forge.plan.deepspeed_config import deepspeed_config
from forge.train.engine import Engine, StepControl, build_engine
from forge.train.process_group import join_process_group

CORPUS = "synthetic"
_VOCAB = 20480
_SEQ_LEN = 128


def join() -> None:
    """Enter torchrun's process group with one thread."""
    torch.set_num_threads(1)
    join_process_group(device=torch.device("cpu"))


def job(*, is_small: bool) -> JobSpec:
    """88 M parameters, 1.06 GB of training state, a step of a second or two; a tenth of that for a smoke run."""
    hidden, layers = (192, 2) if is_small else (768, 8)
    return JobSpec.model_validate(
        {
            "name": "checkpoint",
            "model": {
                "architecture": "llama",
                "hidden_size": hidden,
                "intermediate_size": hidden * 8 // 3,
                "num_hidden_layers": layers,
                "num_attention_heads": hidden // 64,
                "num_key_value_heads": hidden // 64,
            },
            "data": {"source": "python-stdlib", "seq_len": _SEQ_LEN, "tokenizer": {"vocab_size": _VOCAB}},
            "training": {"total_steps": 1000, "global_batch_size": 4, "zero": {"stage": 2}},
            "resources": {"workers": "1..4", "gpu": "none"},
        }
    )


def build(spec: JobSpec, *, changes: dict[str, Any]) -> Engine:
    """forge's engine at this world size; collective.

    Args:
        changes: to DeepSpeed's configuration.
    """
    batch = plan_batch(spec.training.global_batch_size, world_size=dist.get_world_size(), max_micro_batch_size=4)
    return build_engine(
        spec.model,
        spec.training,
        deepspeed_config=deepspeed_config(spec.training, batch) | changes,
        data=DataShape(vocab_size=_VOCAB, seq_len=_SEQ_LEN, eot_id=0),
        objective=CausalLm(),
        device=torch.device("cpu"),
        has_linear_head=True,
    )


def deepspeed_engine(engine: Engine) -> Any:
    """The DeepSpeed engine inside, for peers that save what it holds."""
    return engine._engine


def num_parameters(engine: Engine) -> int:
    """Over all ranks."""
    return sum(int(np.prod(parameter.shape)) for parameter in engine.state.shape.parameters.values())


def take_step(engine: Engine, step: int, *, spec: JobSpec) -> None:
    """One update on random tokens: forward, backward, reduction, AdamW; collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = spec.training.global_batch_size // world_size
    tokens = np.random.default_rng(step * world_size + rank).integers(_VOCAB, size=(rows, _SEQ_LEN + 1))
    arrays = {"tokens": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy()}
    batch = MicroBatch(arrays=arrays, positions=np.arange(rows, dtype=np.int64))
    engine.step(step, [batch], total_weight=rows * world_size * _SEQ_LEN, lr=1e-4, requests=StepControl)
