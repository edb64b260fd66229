"""How the engine chooses tokens and releases text, against transformers' logits processors and whole decoding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from forge.inference.running import TextStream
from forge.inference.sampling import SamplingParams
from forge.serve.choose import choose
from tests.serve.test_engine import byte_tokenizer

DRAWS = 4000
SEEN = (3, 5, 7)


class Grid:
    """Random numbers that are spread evenly, so that frequencies are exact up to one draw."""

    def __init__(self, number: int) -> None:
        self._value = (number + 0.5) / DRAWS

    def random(self) -> float:
        return self._value


def reference(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    steps: list[Any] = [
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        TemperatureLogitsWarper(sampling.temperature),
    ]
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    scores: torch.Tensor = LogitsProcessorList(steps)(torch.tensor([SEEN]), logits[None])
    return scores[0].softmax(dim=-1)


@pytest.mark.parametrize("size", [50, 3000])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"temperature": 0.5, "top_k": 5},
        {"top_p": 0.6},
        {"top_p": 0.9, "top_k": 8, "temperature": 2.0},
        {"temperature": 5.0, "top_p": 0.99},  # of 3000 tokens more than are looked at first
        {"min_p": 0.2},
        {"repetition_penalty": 1.8},
    ],
    ids=str,
)
def test_frequencies_equal_the_probabilities_of_transformers(kind: dict[str, Any], size: int) -> None:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(3)) * 2
    sampling = SamplingParams(**{"temperature": 1.0, **kind})
    one: Any = [SimpleNamespace(sampling=sampling, random=Grid(number), tokens=SEEN) for number in range(DRAWS)]
    tokens = torch.tensor([found.token_id for found in choose(logits.expand(DRAWS, -1), one)])
    frequencies = tokens.bincount(minlength=size) / DRAWS
    assert torch.allclose(frequencies, reference(logits, sampling), atol=1.5 / DRAWS)


def test_rows_of_one_batch_are_chosen_by_their_own_parameters() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    kinds = [SamplingParams(logprobs=2), SamplingParams(temperature=1.0, top_k=1), SamplingParams(temperature=1.0)]
    rows: Any = [SimpleNamespace(sampling=kind, random=Grid(0), tokens=()) for kind in kinds]
    found = choose(logits, rows)
    best = logits.argmax(dim=-1).tolist()
    assert [found[0].token_id, found[1].token_id] == best[:2]
    assert found[0].logprob == pytest.approx(logits[0].log_softmax(0).max().item())
    assert [len(one.top) for one in found] == [2, 0, 0]
    assert found[2].token_id == 0, "the lowest random number is the first token"


@pytest.mark.parametrize("stop", [(), ("nothing",), ("aab", "ab!")])
@pytest.mark.parametrize("text", ["añe 你好 🙂 x", "aaab", "aaaaa", "a🙂aab!", ""])
def test_released_text_is_the_decoded_one_up_to_the_first_stop_string(text: str, stop: tuple[str, ...]) -> None:
    tokenizer = byte_tokenizer()
    stream, released = TextStream(tokenizer, stop=stop), ""
    for token in tokenizer.encode(text).ids:
        released += stream.push(token)
        assert "\ufffd" not in released
        if stream.stopped_by is not None:
            break
    released += stream.finish()
    ends = [text.index(one) for one in stop if one in text]
    assert released == text[: min(ends, default=None)]
    assert (stream.stopped_by is not None) == bool(ends)


def test_bytes_of_an_incomplete_character_are_released_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, stop=())
    assert [stream.push(token) for token in tokenizer.encode("é").ids[:1]] == [""]
    assert stream.finish() == "\ufffd"
