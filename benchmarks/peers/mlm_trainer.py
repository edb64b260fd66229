"""The transformers Trainer with its collator for masked language models, on concatenated texts.

    python -m torch.distributed.run --nproc_per_node 2 -m benchmarks.peers.mlm_trainer REQUEST

REQUEST as for `trl_trainer`. Rank 0 prints `{"tokens_per_s": ...}` as its last line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from itertools import chain

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
from benchmarks.peers.trainer_arguments import require_engine, trainer_arguments


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(request["base"])
    records = load_dataset("json", data_files=request["records"], split="train", cache_dir=tempfile.mkdtemp())
    ids = list(chain.from_iterable(tokenizer(list(records["text"]))["input_ids"]))
    length = request["seq_len"]
    rows = [{"input_ids": ids[start : start + length]} for start in range(0, len(ids) - length, length)]
    arguments = trainer_arguments(
        deepspeed=request["deepspeed"],
        micro=request["micro"],
        accumulate=request["batch"] // int(os.environ["WORLD_SIZE"]) // request["micro"],
        steps=request["warm_up"] + request["steps"],
        lr=1e-3,
    )
    stopwatch = Stopwatch(warm_up=request["warm_up"], steps=request["steps"])
    trainer = Trainer(
        model=AutoModelForMaskedLM.from_pretrained(request["base"], attn_implementation="eager"),
        args=TrainingArguments(**arguments),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
        callbacks=[stopwatch],
    )
    require_engine(trainer, deepspeed=request["deepspeed"])
    trainer.train()
    if trainer.args.process_index == 0:
        tokens = request["steps"] * request["batch"] * length
        print(json.dumps({"tokens_per_s": tokens / stopwatch.seconds}), flush=True)


if __name__ == "__main__":
    main()
