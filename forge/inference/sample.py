"""The sample at the end of a run: what the model answers to its first held-out example.

A causal language model continues the text; a chat model, also one trained on preferences, answers the conversation;
an encoder-decoder writes the target, after span corruption what a sentinel stands for; a classifier gives the
label, a reward model the rewards of both answers; a masked language model fills a gap; an embedding model finds the
text that belongs to a query.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forge.config.job import JobSpec
from forge.data.prepare import open_rows
from forge.data.prompt import first_words, held_out_turn, sample_prompt
from forge.errors import ArgumentError
from forge.inference.answer import Answerer
from forge.inference.answer_request import AnswerConfig
from forge.inference.encode import embed
from forge.inference.identity import KINDS, WRITES
from forge.inference.loaded import LoadedModel
from forge.inference.masked import fill_masks, mask_id_of
from forge.objective.pairs import PairRows
from forge.objective.spans import SentinelTokens
from forge.objective.text_parts import TextParts
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan

_MAX_TOKENS = 64
_MOST_CANDIDATES = 64
"""Texts among which an embedding model looks for the one that belongs to a query."""
ARROW = " → "
"""Stands between a prompt and an answer that does not continue it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt and its answer, as they are shown one behind the other."""

    step: int
    prompt: str
    text: str


def sample(plan: Plan, *, run_folder: Path) -> Sample:
    """Have a run's newest checkpoint answer a prompt of its own data.

    Raises: ArgumentError if the held-out data have nothing to ask; CheckpointError, DataError.
    """
    kind = "reward" if plan.job.training.objective == "reward" else KINDS[plan.job.training.auto_class]
    sampling = {"max_tokens": _MAX_TOKENS} if kind in WRITES else {}
    answerer = Answerer(AnswerConfig(source=str(run_folder), sampling=sampling))
    prompt, text = shown_answer(answerer, corpus=plan.corpus, job=plan.job, tokenizer=run_folder / "tokenizer")
    return Sample(step=answerer.loaded.step or 0, prompt=prompt, text=text)


def shown_answer(answerer: Answerer, *, corpus: CorpusInfo, job: JobSpec, tokenizer: Path) -> tuple[str, str]:
    """Return a prompt of the held-out data and the answer of a model that was trained on them, as text.

    Args:
        tokenizer: its folder.

    Raises: ArgumentError if the held-out data have nothing to ask.
    """
    loaded, objective = answerer.loaded, job.training.objective
    if loaded.kind == "embedding":
        return _nearest(loaded, corpus)
    if loaded.kind == "reward":
        return _rewards(answerer, corpus)
    turn = held_out_turn(corpus, tokenizer=loaded.tokenizer)
    if turn is not None and job.data.format in ("chat", "preference"):
        [answer] = answerer([{"ids": list(turn.ids)}])
        return f"{turn.shown}{ARROW}", answer["text"]
    prompt = sample_prompt(corpus, job.data, tokenizer=tokenizer)
    if loaded.kind == "masked-lm":
        return _filled_gap(loaded, prompt)
    if objective == "span-corruption":
        special = SentinelTokens.of(tokenizer)
        ids = loaded.tokenizer.encode(prompt, add_special_tokens=False).ids
        [answer] = answerer([{"ids": [*ids, int(special.sentinels[0]), special.eot_id]}])
        return f"{prompt}{loaded.tokenizer.id_to_token(int(special.sentinels[0]))}{ARROW}", answer["text"]
    [answer] = answerer([prompt])
    return (prompt if loaded.kind == "causal-lm" else f"{prompt}{ARROW}"), _shown(answer)


def _nearest(loaded: LoadedModel, corpus: CorpusInfo) -> tuple[str, str]:
    """The first held-out query, and the nearest of the texts that belong to this and the next queries."""
    texts = TextParts.of(_held_out(corpus, count=_MOST_CANDIDATES))
    plain = [
        loaded.decode(ids[kept].tolist()).strip() for ids, kept in zip(texts.tokens, texts.is_token, strict=True)
    ]
    where = np.flatnonzero(texts.parts == 2)[:_MOST_CANDIDATES]
    query, *passages = embed(loaded, [plain[int(where[0]) - 1], *(plain[int(at)] for at in where)])
    scores = np.stack(passages) @ query
    best, rank = int(scores.argmax()), int((scores >= scores[0]).sum())
    verdict = "the one that belongs to it" if rank == 1 else f"the one that belongs to it is number {rank}"
    nearest = f"{first_words(plain[int(where[best])])} (nearest of {len(where)} texts; {verdict})"
    return f"{first_words(plain[int(where[0]) - 1])}{ARROW}", nearest


def _rewards(answerer: Answerer, corpus: CorpusInfo) -> tuple[str, str]:
    """The first held-out prompt, and the rewards of its answers."""
    sides = PairRows.of(_held_out(corpus, count=1)).separated(with_last=True)
    pair = zip(sides["tokens"][:2], sides["attention_mask"][:2], strict=True)
    chosen, rejected = (one["value"] for one in answerer([{"ids": row[mask > 0].tolist()} for row, mask in pair]))
    turn = held_out_turn(corpus, tokenizer=answerer.loaded.tokenizer)
    shown = turn.shown if turn is not None else ""
    return f"{shown}{ARROW}", f"{chosen:.4g} for the preferred answer, {rejected:.4g} for the other"


def _filled_gap(loaded: LoadedModel, text: str) -> tuple[str, str]:
    """A text with its middle token masked, and the likeliest token there."""
    mask_id = mask_id_of(loaded)
    encoded = loaded.tokenizer.encode(text)
    plain = [at for at, is_special in enumerate(encoded.special_tokens_mask) if not is_special]
    if not plain:
        raise ArgumentError("the held-out text has no token to mask")
    middle = plain[len(plain) // 2]
    start, stop = encoded.offsets[middle]
    start += len(text[start:stop]) - len(text[start:stop].lstrip())
    ids = [*encoded.ids[:middle], mask_id, *encoded.ids[middle + 1 :]]
    [[[likeliest]]] = fill_masks(loaded, [ids], num_candidates=1)
    return f"{text[:start]}{loaded.tokenizer.id_to_token(mask_id)}{text[stop:]}{ARROW}", likeliest.token


def _held_out(corpus: CorpusInfo, *, count: int) -> Mapping[str, Any]:
    """The first held-out rows. Raises: ArgumentError if there are none; DataError."""
    _, held_out = open_rows(corpus)
    if not held_out.num_rows:
        raise ArgumentError("no data are held out")
    return held_out.read(np.arange(min(count, held_out.num_rows)))


def _shown(answer: dict[str, Any]) -> str:
    if "text" in answer:
        return str(answer["text"])
    if "value" in answer:
        return f"{answer['value']:.4g}"
    if answer.get("label") is not None:
        return f"{answer['label']} ({answer['probabilities'][answer['label']]:.0%})"
    return " ".join(answer["labels"]) or "no label"
