"""TRL's SFTTrainer or DPOTrainer, with or without peft's LoRA, on given records.

    python -m torch.distributed.run --nproc_per_node 2 -m benchmarks.peers.trl_trainer REQUEST

REQUEST: JSON with `kind` (sft, lora, dpo), `base`, `records`, `seq_len`, `batch` and `micro` (rows of a step and of
a forward pass of one rank), `packing` (a strategy of SFTConfig), `deepspeed` (else DistributedDataParallel),
`warm_up`, `steps`. Rank 0 prints
`{"tokens_per_s": ..., "pairs_per_s": ...}` as its last line; tokens without padding.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.hf_trainer import Stopwatch
from benchmarks.peers.trainer_arguments import require_engine, trainer_arguments


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    # One folder for all ranks: there rank 0 leaves the log-probabilities of the reference for the others.
    cache_dir = str(Path(request["records"]).with_suffix(".cache"))
    records = load_dataset("json", data_files=request["records"], split="train", cache_dir=cache_dir)
    model = AutoModelForCausalLM.from_pretrained(request["base"], attn_implementation="eager")
    stopwatch = Stopwatch(warm_up=request["warm_up"], steps=request["steps"])
    trainer, tokens_per_row = _trainer(request, model=model, records=records, stopwatch=stopwatch)
    require_engine(trainer, deepspeed=request["deepspeed"])
    trainer.train()
    if trainer.args.process_index == 0:
        rows = request["steps"] * request["batch"]
        answer = {
            "tokens_per_s": rows * tokens_per_row / stopwatch.seconds,
            "pairs_per_s": rows / stopwatch.seconds,
        }
        print(json.dumps(answer), flush=True)


def _trainer(request: dict[str, Any], *, model: Any, records: Any, stopwatch: Stopwatch) -> tuple[Any, float]:
    """Build the trainer. Returns: it, and the mean tokens of a row."""
    world_size = int(os.environ["WORLD_SIZE"])
    shared = trainer_arguments(
        deepspeed=request["deepspeed"],
        micro=request["micro"],
        accumulate=request["batch"] // world_size // request["micro"],
        steps=request["warm_up"] + request["steps"],
        lr=1e-3,
    ) | {"gradient_checkpointing": False, "max_length": request["seq_len"]}
    tokenizer = AutoTokenizer.from_pretrained(request["base"])
    common = {"model": model, "train_dataset": records, "processing_class": tokenizer, "callbacks": [stopwatch]}
    if request["kind"] == "dpo":
        from trl import DPOConfig, DPOTrainer

        # The reference's log-probabilities once, before training, as forge does.
        trainer = DPOTrainer(args=DPOConfig(**shared, precompute_ref_log_probs=True), **common)
        return trainer, 0.0
    from trl import SFTConfig, SFTTrainer

    if request["kind"] == "lora":
        from peft import LoraConfig

        common["peft_config"] = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    packing = {"packing": True, "packing_strategy": request["packing"], "assistant_only_loss": True}
    trainer = SFTTrainer(args=SFTConfig(**shared, **packing), **common)
    lengths = [len(row) for row in trainer.train_dataset["input_ids"]]
    return trainer, sum(lengths) / len(lengths)


if __name__ == "__main__":
    main()
