"""A bare DeepSpeed loop: no data pipeline, no logging, no evaluation, no checkpoint.

    python -m torch.distributed.run --nproc_per_node 2 -m benchmarks.peers.deepspeed_loop REQUEST

REQUEST is JSON: model, vocab_size, seq_len, micro_batch_size, lr, warm_up, steps, fused, attention. Rank 0
prints `{"tokens_per_s": ...}` as its last line. `fused` takes torch's fused AdamW instead of its default
one; `attention` is transformers' `sdpa` (its default) or `eager`. With `DS_ACCELERATOR=cuda` it runs on GPUs.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.peers.stopwatch import now


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    on_gpu = os.environ["DS_ACCELERATOR"] == "cuda"
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    vocab_size, seq_len, micro = request["vocab_size"], request["seq_len"], request["micro_batch_size"]
    config = AutoConfig.for_model(**request["model"], vocab_size=vocab_size, max_position_embeddings=seq_len)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=request["attention"])
    settings = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    optimizer = None
    if request["fused"]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=request["lr"], fused=True)
    else:
        settings["optimizer"] = {"type": "AdamW", "params": {"lr": request["lr"], "torch_adam": True}}
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), optimizer=optimizer, config=settings
    )
    tokens = torch.randint(0, vocab_size, (4096, seq_len), generator=torch.Generator().manual_seed(0))
    began = 0.0
    for step in range(request["warm_up"] + request["steps"]):
        if step == request["warm_up"]:
            began = now()
        first = (step * world_size + rank) * micro % (len(tokens) - micro)
        batch = tokens[first : first + micro].to(engine.device)
        loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
    seconds = now() - began
    if rank == 0:
        print(json.dumps({"tokens_per_s": request["steps"] * micro * world_size * seq_len / seconds}), flush=True)


if __name__ == "__main__":
    main()
