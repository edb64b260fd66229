"""Log-likelihoods: those of the model computed plainly, and equal bit for bit in every order and part."""

from __future__ import annotations

import math
import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from forge.errors import ArgumentError, DivergedError
from forge.inference.encode import embed
from forge.inference.generate import generate
from forge.inference.loaded import Dtype, LoadedModel, load
from forge.inference.sampling import SamplingParams
from forge.inference.score import log_likelihoods, text_log_likelihoods
from tests.inference.conftest import TEXTS

CHOICES = (" the sea", " a", " town and the old river", " x")


def pairs() -> list[tuple[str, str]]:
    chosen = random.Random(3)
    words = " ".join(TEXTS).split()
    contexts = [" ".join(chosen.choices(words, k=chosen.randint(1, 30))) for _ in range(7)]
    return [(context, choice) for context in contexts for choice in CHOICES]


def plain(loaded: LoadedModel, context: str, continuation: str) -> float:
    whole, count = loaded.encode(context + continuation), len(loaded.encode(context))
    with torch.inference_mode():
        shares = loaded.model(torch.tensor([whole])).logits[0].float().log_softmax(dim=-1)
    return sum(float(shares[at - 1, whole[at]]) for at in range(count, len(whole)))


def test_log_likelihoods__are_those_of_the_model(llama: LoadedModel) -> None:
    for (context, continuation), score in zip(pairs(), log_likelihoods(llama, pairs()), strict=True):
        assert score.total == pytest.approx(plain(llama, context, continuation), abs=1e-3)
        assert score.num_tokens == len(llama.encode(context + continuation)) - len(llama.encode(context))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shared", ["", TEXTS[1]])
def test_log_likelihoods__any_order_and_part__equal_bit_for_bit(
    llama_folder: Path, dtype: Dtype, shared: str
) -> None:
    loaded = load(llama_folder, dtype=dtype, device="cpu")
    asked = [(shared + context, continuation) for context, continuation in pairs()]
    whole = log_likelihoods(loaded, asked, shared=shared)
    parts = [log_likelihoods(loaded, asked[start : start + 4], shared=shared) for start in range(0, 28, 4)]
    assert [score for part in parts for score in part] == whole
    assert log_likelihoods(loaded, asked[::-1], shared=shared)[::-1] == whole


def test_log_likelihoods__shared_beginning__changes_rounding_only(llama: LoadedModel) -> None:
    shared = TEXTS[1] + " " + TEXTS[2]
    asked = [(shared + context, continuation) for context, continuation in pairs()]
    whole, alone = log_likelihoods(llama, asked, shared=shared), log_likelihoods(llama, asked)
    assert [one.total for one in whole] == pytest.approx([one.total for one in alone], abs=1e-3)


def test_log_likelihoods__greedy_continuation__is_said(llama: LoadedModel) -> None:
    from forge.inference.generate import generate
    from forge.inference.sampling import SamplingParams

    context = pairs()[0][0]
    made = next(generate(llama, [context], SamplingParams(max_tokens=1, ignore_end=True)))
    text = llama.tokenizer.decode(list(made.token_ids), skip_special_tokens=False)
    scores = log_likelihoods(llama, [(context, text), (context, " town and")])
    assert [score.is_greedy for score in scores] == [True, False]


def test_log_likelihoods__empty_context_or_continuation(llama: LoadedModel) -> None:
    [score] = log_likelihoods(llama, [("", TEXTS[0])])
    ids = [*llama.end_ids[:1], *llama.encode(TEXTS[0])]
    with torch.inference_mode():
        shares = llama.model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    assert score.total == pytest.approx(sum(float(shares[at - 1, ids[at]]) for at in range(1, len(ids))), abs=1e-3)
    with pytest.raises(ArgumentError, match="no token"):
        log_likelihoods(llama, [("a", "")])


@pytest.mark.parametrize("window", [16, 64, None])
def test_text_log_likelihoods__each_token_once(llama: LoadedModel, window: int | None) -> None:
    texts = [TEXTS[1] * 3, "", TEXTS[0]]
    found = text_log_likelihoods(llama, texts, window=window)
    assert [one.num_tokens for one in found] == [len(llama.encode(text)) for text in texts]
    assert [one.num_bytes for one in found] == [len(text.encode()) for text in texts]
    assert found[1].total == 0
    if window is None:
        assert found[2].total == pytest.approx(log_likelihoods(llama, [("", TEXTS[0])])[0].total, abs=1e-4)
    assert all(math.isfinite(one.total) for one in found)


def test_outputs__not_numbers__are_an_error(llama: LoadedModel) -> None:
    broken = replace(llama, model=deepcopy(llama.model))
    with torch.no_grad():
        broken.model.model.norm.weight.fill_(math.nan)
    for sampling in (SamplingParams(), SamplingParams(temperature=1.0, logprobs=1)):
        with pytest.raises(DivergedError, match="are not numbers"):
            list(generate(broken, ["a"], sampling))
    with pytest.raises(DivergedError):
        log_likelihoods(broken, [("a", " b")])
    labelled = replace(broken, kind="embedding", model=broken.model.model, is_normalised=False)
    with pytest.raises(DivergedError):
        embed(labelled, ["a"])
