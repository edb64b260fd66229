"""The transformers Trainer with DeepSpeed, on the same model and batch.

    python -m torch.distributed.run --nproc_per_node 2 -m benchmarks.peers.hf_trainer REQUEST

REQUEST as for `deepspeed_loop`. Rank 0 prints `{"tokens_per_s": ...}` as its last line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["ACCELERATE_USE_CPU"] = "1"

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Tokens(torch.utils.data.Dataset):
    """Random sequences, with themselves as labels."""

    def __init__(self, *, vocab_size: int, seq_len: int) -> None:
        self._tokens = torch.randint(0, vocab_size, (4096, seq_len), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._tokens[index], "labels": self._tokens[index]}


class Stopwatch(TrainerCallback):
    """Seconds from the end of the warm-up to the last step."""

    def __init__(self, *, warm_up: int, steps: int) -> None:
        self._first, self._last = warm_up, warm_up + steps
        self._began = self.seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == self._first:
            self._began = time.perf_counter()
        if state.global_step == self._last:
            self.seconds = time.perf_counter() - self._began


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    vocab_size, seq_len, micro = request["vocab_size"], request["seq_len"], request["micro_batch_size"]
    config = AutoConfig.for_model(**request["model"], vocab_size=vocab_size, max_position_embeddings=seq_len)
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    if not request["fused"]:
        settings["optimizer"] = {"type": "AdamW", "params": {"lr": request["lr"], "torch_adam": True}}
        settings["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 1}}
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=micro,
        max_steps=request["warm_up"] + request["steps"],
        learning_rate=request["lr"],
        bf16=True,
        use_cpu=True,
        deepspeed=settings,
        report_to=[],
        save_strategy="no",
        logging_steps=10,
        max_grad_norm=1.0,
        ddp_backend="gloo",
        disable_tqdm=True,
        optim="adamw_torch_fused" if request["fused"] else "adamw_torch",
        lr_scheduler_type="constant",
    )
    stopwatch = Stopwatch(warm_up=request["warm_up"], steps=request["steps"])
    trainer = Trainer(
        model=AutoModelForCausalLM.from_config(config, attn_implementation=request["attention"]),
        args=arguments,
        train_dataset=Tokens(vocab_size=vocab_size, seq_len=seq_len),
        callbacks=[stopwatch],
    )
    trainer.train()
    if arguments.process_index == 0:
        tokens = request["steps"] * micro * arguments.world_size * seq_len
        print(json.dumps({"tokens_per_s": tokens / stopwatch.seconds}), flush=True)


if __name__ == "__main__":
    main()
