"""The transformers Trainer with DeepSpeed and its collator for masked language models, on concatenated texts.

    python -m torch.distributed.run --nproc_per_node 2 -m benchmarks.peers.mlm_trainer REQUEST

REQUEST as for `trl_trainer`. Rank 0 prints `{"tokens_per_s": ...}` as its last line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from itertools import chain

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["ACCELERATE_USE_CPU"] = "1"

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from benchmarks.peers.hf_trainer import Stopwatch


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(request["base"])
    records = load_dataset("json", data_files=request["records"], split="train", cache_dir=tempfile.mkdtemp())
    ids = list(chain.from_iterable(tokenizer(list(records["text"]))["input_ids"]))
    length = request["seq_len"]
    rows = [{"input_ids": ids[start : start + length]} for start in range(0, len(ids) - length, length)]
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=request["micro"],
        gradient_accumulation_steps=request["batch"] // int(os.environ["WORLD_SIZE"]) // request["micro"],
        max_steps=request["warm_up"] + request["steps"],
        learning_rate=1e-3,
        bf16=True,
        use_cpu=True,
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": True},
            "gradient_clipping": 1.0,
            "steps_per_print": 10**9,
        },
        report_to=[],
        save_strategy="no",
        logging_steps=10,
        max_grad_norm=1.0,
        ddp_backend="gloo",
        disable_tqdm=True,
        optim="adamw_torch_fused",
        lr_scheduler_type="constant",
    )
    stopwatch = Stopwatch(warm_up=request["warm_up"], steps=request["steps"])
    trainer = Trainer(
        model=AutoModelForMaskedLM.from_pretrained(request["base"], attn_implementation="eager"),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
        callbacks=[stopwatch],
    )
    trainer.train()
    if arguments.process_index == 0:
        tokens = request["steps"] * request["batch"] * length
        print(json.dumps({"tokens_per_s": tokens / stopwatch.seconds}), flush=True)


if __name__ == "__main__":
    main()
