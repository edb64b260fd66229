"""The transformers Trainer on the same model and batch, with its default optimizer, torch's fused AdamW.

    python -m torch.distributed.run --nproc_per_node 2 -m benchmarks.peers.hf_trainer REQUEST

REQUEST as for `deepspeed_loop`, without `fused`, and `deepspeed`: else DistributedDataParallel. Rank 0 prints
`{"tokens_per_s": ...}` as its last line.
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.peers.stopwatch import now
from benchmarks.peers.trainer_arguments import require_engine, trainer_arguments


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random sequences, with themselves as labels."""

    def __init__(self, *, vocab_size: int, seq_len: int) -> None:
        self._tokens = torch.randint(0, vocab_size, (4096, seq_len), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._tokens[index], "labels": self._tokens[index]}


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Seconds from the end of the warm-up to the last step."""

    def __init__(self, *, warm_up: int, steps: int) -> None:
        self._first, self._last = warm_up, warm_up + steps
        self._began = self.seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == self._first:
            self._began = now()
        if state.global_step == self._last:
            self.seconds = now() - self._began


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    vocab_size, seq_len, micro = request["vocab_size"], request["seq_len"], request["micro_batch_size"]
    config = AutoConfig.for_model(**request["model"], vocab_size=vocab_size, max_position_embeddings=seq_len)
    arguments = trainer_arguments(
        deepspeed=request["deepspeed"],
        micro=micro,
        steps=request["warm_up"] + request["steps"],
        lr=request["lr"],
    )
    stopwatch = Stopwatch(warm_up=request["warm_up"], steps=request["steps"])
    trainer = Trainer(
        model=AutoModelForCausalLM.from_config(config, attn_implementation=request["attention"]),
        args=TrainingArguments(**arguments),
        train_dataset=Tokens(vocab_size=vocab_size, seq_len=seq_len),
        callbacks=[stopwatch],
    )
    require_engine(trainer, deepspeed=request["deepspeed"])
    trainer.train()
    if trainer.args.process_index == 0:
        tokens = request["steps"] * micro * trainer.args.world_size * seq_len
        print(json.dumps({"tokens_per_s": tokens / stopwatch.seconds}), flush=True)


if __name__ == "__main__":
    main()
