"""Arguments of the transformers Trainer (and TRL's), with DeepSpeed or with DistributedDataParallel.

On GPUs (`DS_ACCELERATOR=cuda`) they are those of a user. On CPUs accelerate does not run DeepSpeed: with
`use_cpu=True` it wraps the model in DistributedDataParallel without a word, whose bf16 is autocast over fp32
weights; without it, it takes each rank for a run of its own. The DeepSpeed variant therefore answers for accelerate
that the ranks speak gloo, and for transformers that this device has bf16.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import transformers.training_args
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def trainer_arguments(*, deepspeed: bool, micro: int, steps: int, accumulate: int = 1, lr: float) -> dict[str, Any]:
    """Return the keyword arguments of TrainingArguments, SFTConfig and DPOConfig."""
    arguments: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulate,
        "max_steps": steps,
        "learning_rate": lr,
        "bf16": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 10,
        "max_grad_norm": 1.0,
        "disable_tqdm": True,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "constant",
    }
    on_gpu = os.environ["DS_ACCELERATOR"] == "cuda"
    arguments |= {} if on_gpu else {"ddp_backend": "gloo"}
    if not deepspeed:
        return arguments if on_gpu else arguments | {"use_cpu": True}
    if not on_gpu:
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    return arguments | {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": True},
            "gradient_clipping": 1.0,
            "steps_per_print": 10**9,
        }
    }


def require_engine(trainer: Any, *, deepspeed: bool) -> None:
    """Raises: RuntimeError if the trainer does not train with the asked engine."""
    kind = trainer.accelerator.distributed_type
    if (kind == DistributedType.DEEPSPEED) is not deepspeed:
        raise RuntimeError(f"deepspeed={deepspeed} was asked for, and the trainer runs with {kind}")
