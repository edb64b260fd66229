"""Plain PyTorch with torch.compile on one device: bf16 autocast over fp32 weights, torch's fused AdamW.

    python -m torch.distributed.run --nproc_per_node 1 -m benchmarks.peers.plain_loop REQUEST

REQUEST as for `deepspeed_loop`. Compiled layer by layer, as torchtitan does. Prints `{"tokens_per_s": ...}` as its
last line.
"""

from __future__ import annotations

import json
import os
import sys

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.peers.stopwatch import now


def main() -> None:
    request = json.loads(sys.argv[1])
    device = torch.device("cuda" if os.environ.get("DS_ACCELERATOR") == "cuda" else "cpu")
    vocab_size, seq_len, micro = request["vocab_size"], request["seq_len"], request["micro_batch_size"]
    config = AutoConfig.for_model(**request["model"], vocab_size=vocab_size, max_position_embeddings=seq_len)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=request["attention"]).to(device)
    layers = max((child for child in model.modules() if isinstance(child, nn.ModuleList)), key=len)
    for layer in layers:
        layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=request["lr"], fused=True)
    tokens = torch.randint(0, vocab_size, (512, seq_len), generator=torch.Generator().manual_seed(0)).to(device)
    began = 0.0
    for step in range(request["warm_up"] + request["steps"]):
        if step == request["warm_up"]:
            began = now()
        first = step * micro % (len(tokens) - micro)
        batch = tokens[first : first + micro]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = now() - began
    print(json.dumps({"tokens_per_s": request["steps"] * micro * seq_len / seconds}), flush=True)


if __name__ == "__main__":
    main()
