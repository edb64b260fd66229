"""Text from a model: the same for the same seed, as long as asked for, whatever positions the model has."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from forge.serve.generate import GenerateRequest, _continue, end_ids

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
def test_generate__max_tokens__is_reached(
    model: GPT2LMHeadModel, tokenizer: Tokenizer, num_prompt: int, max_tokens: int
) -> None:
    request = GenerateRequest(prompt="w5 " * num_prompt, max_tokens=max_tokens)
    text = _continue(model, tokenizer, request, ends=(EOT,), max_positions=NUM_POSITIONS)
    assert len(text.split()) == max_tokens


def test_generate__same_seed_or_temperature_0__same_text(model: GPT2LMHeadModel, tokenizer: Tokenizer) -> None:
    def text(*, seed: int, temperature: float) -> str:
        request = GenerateRequest(prompt="w5", max_tokens=40, seed=seed, temperature=temperature)
        return _continue(model, tokenizer, request, ends=(EOT,), max_positions=NUM_POSITIONS)

    assert text(seed=1, temperature=0.8) == text(seed=1, temperature=0.8) != text(seed=2, temperature=0.8)
    assert text(seed=1, temperature=0) == text(seed=2, temperature=0)


class _Counter(nn.Module):
    """After token n comes n + 1; an input longer than `NUM_POSITIONS` is an error."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        assert input_ids.shape[1] <= NUM_POSITIONS
        return torch.nn.functional.one_hot((input_ids + 1) % 50, 50).float() * 20


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_continue__module_without_generate__is_sampled_token_by_token(
    tokenizer: Tokenizer, temperature: float
) -> None:
    request = GenerateRequest(prompt="w5", max_tokens=30, temperature=temperature, top_k=3)
    text = _continue(_Counter(), tokenizer, request, ends=(EOT,), max_positions=NUM_POSITIONS)
    assert text.split() == [f"w{number}" for number in range(6, 36)]


def test_continue__module_without_generate__ends_at_the_end_of_text(tokenizer: Tokenizer) -> None:
    request = GenerateRequest(prompt="w45", max_tokens=30, temperature=0.0)
    text = _continue(_Counter(), tokenizer, request, ends=(EOT,), max_positions=NUM_POSITIONS)
    assert text.split()[:4] == ["w46", "w47", "w48", "w49"]
    assert len(text.split()) <= 5


def test_continue__several_ends__stops_at_the_first(tokenizer: Tokenizer) -> None:
    request = GenerateRequest(prompt="w5", max_tokens=30, temperature=0.0)
    text = _continue(_Counter(), tokenizer, request, ends=(EOT, 9, 7), max_positions=NUM_POSITIONS)
    assert text.split() == ["w6", "w7"]


def test_continue__several_ends_of_a_transformers_model__stop_it(
    model: GPT2LMHeadModel, tokenizer: Tokenizer
) -> None:
    request = GenerateRequest(prompt="w5", max_tokens=40, seed=3)
    free = _continue(model, tokenizer, request, ends=(EOT,), max_positions=NUM_POSITIONS).split()
    end = free[5]
    text = _continue(model, tokenizer, request, ends=(EOT, int(end[1:])), max_positions=NUM_POSITIONS)
    assert text.split() == free[: free.index(end) + 1]


@pytest.mark.parametrize(
    ("named", "ids"),
    [
        ((3, None), (3,)),
        ((3, [0, 5]), (3, 0, 5)),
        ((3, [5, 3], 7), (3, 5, 7)),
        ((3, "</s>", [None, True, -1, 2.0]), (3,)),
    ],
)
def test_end_ids__one_a_list_or_none__are_collected_once(named: tuple[object, ...], ids: tuple[int, ...]) -> None:
    assert end_ids(*named) == ids
