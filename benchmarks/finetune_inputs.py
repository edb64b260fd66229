"""The models and records of `benchmarks.finetune`: random ones, the same for forge and its peers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

VOCAB = 4096
SEQ_LEN = 256
_WORDS = [f"w{number}" for number in range(VOCAB - 6)]
_SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "[MASK]", "[PAD]", "[UNK]")
_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_NUM_RECORDS = 3000
_NUM_PAIRS = 600
"""The log-probabilities of the reference are computed for each before the first step."""


def save_base(folder: Path, *, kind: str) -> None:
    """Save a random Llama, or of `mlm` a random BERT, with a tokenizer and a chat template."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": 1024, "pad_token_id": VOCAB - 2,
    }  # fmt: skip
    if kind == "mlm":
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model: Any = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **sizes, **dropout))
    else:
        heads = {"num_key_value_heads": 4, "eos_token_id": VOCAB - 6, "bos_token_id": VOCAB - 6}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **heads))
    model.save_pretrained(folder)
    ids = {word: number for number, word in enumerate([*_WORDS, *_SPECIAL])}
    words = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    words.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    words.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "[PAD]",
        "mask_token": "[MASK]", "unk_token": "[UNK]", "chat_template": _TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_records(path: Path, *, kind: str) -> None:
    """Write JSON lines: conversations, preference pairs, or texts; their lengths vary by a factor of 20."""
    chance = random.Random(0)
    make = {"dpo": _pair, "mlm": _text}.get(kind, _conversation)
    path.write_text(
        "".join(json.dumps(make(chance)) + "\n" for _ in range(_NUM_PAIRS if kind == "dpo" else _NUM_RECORDS))
    )


def _conversation(chance: random.Random) -> dict[str, Any]:
    messages = []
    for _ in range(chance.choice((1, 1, 1, 2))):
        messages.append({"role": "user", "content": _words(chance, mean=18)})
        messages.append({"role": "assistant", "content": _words(chance, mean=36)})
    return {"messages": messages}


def _pair(chance: random.Random) -> dict[str, Any]:
    asked = [{"role": "user", "content": _words(chance, mean=18)}]
    answers = {name: [{"role": "assistant", "content": _words(chance, mean=36)}] for name in ("chosen", "rejected")}
    return {"prompt": asked, **answers}


def _text(chance: random.Random) -> dict[str, Any]:
    return {"text": _words(chance, mean=200)}


def _words(chance: random.Random, *, mean: int) -> str:
    """Words, log-normally many."""
    count = max(2, min(100 if mean < 100 else 1000, round(mean * chance.lognormvariate(-0.3, 0.8))))
    return " ".join(chance.choices(_WORDS, k=count))
