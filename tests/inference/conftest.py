"""Tiny models with random weights, in folders that `load` reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from forge.data.tokenizer import TextTokenizer, train_tokenizer
from forge.inference.loaded import LoadedModel, load

TEXTS = [
    "def train(model, data): return model.fit(data)",
    "The river runs through the old town to the sea, and the trains follow it.",
    "for name, value in items: print(name, value)",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_model(
    folder: Path, model: PreTrainedModel, tokenizer: TextTokenizer, *, template: str | None = None
) -> Path:
    """Write a folder in the layout of the Hub."""
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.content)
    (folder / "tokenizer_config.json").write_text(tokenizer.config)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: TextTokenizer) -> Path:
    """Weights are stored in bf16, and large enough that the likeliest token changes from step to step."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=tokenizer.eot_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    return write_model(tmp_path_factory.mktemp("llama"), model, tokenizer, template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> LoadedModel:
    return load(llama_folder, device="cpu")
