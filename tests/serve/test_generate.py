"""Text from a model: the same for the same seed, as long as asked for, whatever positions the model has."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel

from forge.serve.generate import GenerateRequest, _continue

NUM_POSITIONS = 16
EOT = 0


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    """Untrained, with learnt positions: one too many is an error. It never ends by itself."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=NUM_POSITIONS, n_embd=16, n_layer=1, n_head=2, eos_token_id=None)
    network = GPT2LMHeadModel(config).eval()
    network.config.eos_token_id = EOT
    network.generation_config.suppress_tokens = [EOT]
    return network


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer(WordLevel({f"w{number}": number for number in range(50)}, unk_token="w1"))
    made.pre_tokenizer = Whitespace()
    return made


@pytest.mark.parametrize("num_prompt", [0, 1, NUM_POSITIONS - 1, NUM_POSITIONS, 3 * NUM_POSITIONS])
@pytest.mark.parametrize("max_tokens", [1, NUM_POSITIONS, 3 * NUM_POSITIONS + 1])
def test_as_many_tokens_come_as_were_asked_for(
    model: GPT2LMHeadModel, tokenizer: Tokenizer, num_prompt: int, max_tokens: int
) -> None:
    request = GenerateRequest(prompt="w5 " * num_prompt, max_tokens=max_tokens)
    text = _continue(model, tokenizer, request, max_positions=NUM_POSITIONS)
    assert len(text.split()) == max_tokens


def test_the_seed_decides_and_temperature_zero_leaves_nothing_to_decide(
    model: GPT2LMHeadModel, tokenizer: Tokenizer
) -> None:
    def text(*, seed: int, temperature: float) -> str:
        request = GenerateRequest(prompt="w5", max_tokens=40, seed=seed, temperature=temperature)
        return _continue(model, tokenizer, request, max_positions=NUM_POSITIONS)

    assert text(seed=1, temperature=0.8) == text(seed=1, temperature=0.8) != text(seed=2, temperature=0.8)
    assert text(seed=1, temperature=0) == text(seed=2, temperature=0)
