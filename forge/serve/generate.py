"""Generate text with a run's newest checkpoint.

    python -m forge.serve.generate RUN_FOLDER < request.json > answer.json

Loads the checkpoint's shards into a plain transformers model, without Ray or DeepSpeed. It runs in its own
process, because the client never imports torch.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel

from forge.checkpoint.best import open_verified
from forge.checkpoint.storage import open_storage
from forge.code_archive import require_trusted, restore_code
from forge.data.text_frame import text_frame
from forge.data.tokenizer import load_tokenizer
from forge.data.tokenizer_files import prompt_tokenizer
from forge.errors import ArgumentError, ForgeError
from forge.inference.checkpoint_model import load_model
from forge.inference.loaded import end_ids
from forge.objective.registry import auto_class_of
from forge.plan.plan import Plan
from forge.process import take_stdout
from forge.runs.reader import read_plan
from forge.user_code import use_code


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A prompt and how to sample."""

    prompt: str
    max_tokens: int = 128
    temperature: float = 0.8
    """0 selects the likeliest token."""
    top_k: int = 50
    seed: int = 1
    ema: bool = False
    """Use the averaged (EMA) weights."""
    step: int | str | None = None
    """Of the checkpoint, or `best`; None: the newest that verifies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """The generated text, without the prompt, and the step of the checkpoint."""

    step: int
    prompt: str
    text: str
    generate_s: float
    """Without loading the checkpoint."""
    continues: bool = True
    """Whether the text follows the prompt; that of an encoder-decoder is another one."""


def generate(run_folder: Path, request: GenerateRequest) -> Generated:
    """Continue a prompt with a checkpoint of a run; of an encoder-decoder it is the source of what is written.

    Raises: CheckpointError if there is no such checkpoint that verifies, or `ema` is set and it has no averaged
        weights; ArgumentError if the model writes no text.
    """
    plan = read_plan(run_folder)
    name = plan.job.training.objective
    if auto_class_of(name) != "AutoModelForCausalLM" and name != "seq2seq":
        raise ArgumentError(
            f"{run_folder.name} was trained with training.objective: {name}, and only a causal language model "
            "continues a text, and only one of seq2seq writes the target of a source"
        )
    if plan.code is not None:
        require_trusted(plan.code.digest, run_folder=run_folder)
        restore_code(plan.code.digest, run_folder=run_folder)
        use_code(plan.code.digest)
    url = plan.job.checkpoint.url_of(str(run_folder))
    checkpoint = open_verified(open_storage(url), step=request.step)
    tokenizer = prompt_tokenizer(
        run_folder / "tokenizer", eot_id=plan.corpus.eot_id, special_tokens=plan.job.data.special_tokens
    )
    model = load_model(plan, checkpoint, ema=request.ema)
    if isinstance(model, PreTrainedModel):
        ends = end_ids(plan.corpus.eot_id, model.config.eos_token_id, plan.model.generation.get("eos_token_id"))
        max_positions = plan.model.max_seq_len
    else:  # a user model may support only the length it was trained on
        ends, max_positions = (plan.corpus.eot_id,), plan.job.data.seq_len
    began = time.monotonic()
    if name == "seq2seq":
        source = _source_ids(plan, request.prompt, tokenizer=tokenizer, folder=run_folder / "tokenizer")
        text = _write_target(model, tokenizer, request, source=source, ends=ends)
    else:
        text = _continue(model, tokenizer, request, ends=ends, max_positions=max_positions)
    seconds = time.monotonic() - began
    return Generated(
        step=checkpoint.progress.step,
        prompt=request.prompt,
        text=text,
        generate_s=seconds,
        continues=name != "seq2seq",
    )


def _source_ids(plan: Plan, prompt: str, *, tokenizer: Tokenizer, folder: Path) -> list[int]:
    """Token ids of a source as the encoder was trained on it, cut to what it reads at once."""
    frame = text_frame(load_tokenizer(str(folder)))
    ids = tokenizer.encode(plan.job.data.pair.prefix + prompt, add_special_tokens=False).ids
    room = min(plan.job.data.seq_len, plan.model.max_seq_len or plan.job.data.seq_len) - frame.num_tokens
    return list(map(int, frame.around(np.array(ids[:room], dtype=np.int64))))


@torch.no_grad()
def _write_target(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    request: GenerateRequest,
    *,
    source: list[int],
    ends: tuple[int, ...],
) -> str:
    torch.manual_seed(request.seed)
    ids = torch.tensor([source])
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.max_tokens,
        eos_token_id=list(ends),
        pad_token_id=model.config.pad_token_id,
        decoder_start_token_id=model.config.decoder_start_token_id,
        **_sampling(request),
    )
    text: str = tokenizer.decode(written[0, 1:].tolist(), skip_special_tokens=True)
    return text


def _sampling(request: GenerateRequest) -> dict[str, Any]:
    if request.temperature > 0:
        return {"do_sample": True, "temperature": request.temperature, "top_k": request.top_k}
    return {"do_sample": False}


@torch.no_grad()
def _continue(
    model: nn.Module,
    tokenizer: Tokenizer,
    request: GenerateRequest,
    *,
    ends: tuple[int, ...],
    max_positions: int | None,
) -> str:
    ids = tokenizer.encode(request.prompt, add_special_tokens=False).ids
    tokens = torch.tensor([ids or [ends[0]]])
    torch.manual_seed(request.seed)
    written: list[int] = []
    while len(written) < request.max_tokens and not set(ends) & set(written):
        room = request.max_tokens - len(written)
        if max_positions is not None:
            # When the positions are used up, continue from the second half of the context.
            if tokens.shape[1] >= max_positions:
                tokens = tokens[:, -max(1, max_positions // 2) :]
            room = min(room, max_positions - tokens.shape[1])
        longer = _lengthen(model, tokens, request, num_tokens=room, ends=ends)
        written += longer[0, tokens.shape[1] :].tolist()
        tokens = longer
    text: str = tokenizer.decode(written, skip_special_tokens=True)
    return text


def _lengthen(
    model: nn.Module, tokens: torch.Tensor, request: GenerateRequest, *, num_tokens: int, ends: tuple[int, ...]
) -> torch.Tensor:
    """Append up to `num_tokens` tokens, ending after any of `ends`. Shapes: tokens: int64[1, T]."""
    if isinstance(model, PreTrainedModel):
        longer: torch.Tensor = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=num_tokens,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
            **_sampling(request),
        )
        return longer
    for _ in range(num_tokens):
        logits = model(tokens)[0, -1].float()
        top = logits.topk(min(request.top_k, len(logits)))
        choice = torch.tensor(0)
        if request.temperature > 0:
            choice = torch.multinomial((top.values / request.temperature).softmax(dim=-1), 1)[0]
        tokens = torch.cat([tokens, top.indices[choice].view(1, 1)], dim=1)
        if int(tokens[0, -1]) in ends:
            break
    return tokens


def main() -> None:
    """Answer one request: `{"answer": {...}}`, or `{"error": {"class": ..., "message": ...}}`."""
    stdout = take_stdout()  # the user's model may print
    request = GenerateRequest(**json.load(sys.stdin))
    try:
        answer = {"answer": asdict(generate(Path(sys.argv[1]), request))}
    except ForgeError as error:
        answer = {"error": {"class": type(error).__name__, "message": str(error)}}
    with stdout:
        json.dump(answer, stdout)


if __name__ == "__main__":
    main()
