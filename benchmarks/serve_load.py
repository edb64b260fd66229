"""The load of `benchmarks.serve`: clients that ask one after another, and what they measure.

Clients are coroutines. Each has prompts of its own, and waits for the whole answer before it asks again.
"""

from __future__ import annotations

import asyncio
import json
import pydoc_data.topics
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

Ask = Callable[[str], AsyncIterator[str]]
"""Gives the text of an answer, piece by piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What the clients of one run saw."""

    tokens_per_s: float
    tokens_per_cpu_s: float
    """Per second of CPU time of the server's processes."""
    first_s: Sequence[float]
    """Time to the first text of each answer."""

    def text(self) -> str:
        """For the log."""
        return f"{self.tokens_per_s:.1f} tokens/s, {self.tokens_per_cpu_s:.1f} per CPU second"


def build_prompts(number: int, *, seed: int) -> list[str]:
    """Passages of Python's documentation of 30 to 150 words, which end in the middle of a sentence."""
    words = " ".join(pydoc_data.topics.topics.values()).split()
    chance = random.Random(seed)
    starts = [chance.randrange(len(words) - 200) for _ in range(number)]
    return [" ".join(words[start : start + chance.randrange(30, 150)]) for start in starts]


async def measure_load(
    ask: Ask,
    prompts: Sequence[str],
    *,
    num_clients: int,
    count: Callable[[str], int],
    cpu_s: Callable[[], float],
) -> LoadResult:
    """Let clients ask for an answer to every prompt.

    Args:
        count: gives the number of tokens of an answer.
        cpu_s: gives the CPU time that the server has used.
    """
    first: list[float] = []
    tokens = 0

    async def client(own: Sequence[str]) -> None:
        nonlocal tokens
        for prompt in own:
            began, seen, text = time.perf_counter(), False, ""
            async for piece in ask(prompt):
                if piece and not seen:
                    first.append(time.perf_counter() - began)
                    seen = True
                text += piece
            tokens += count(text)

    began, used = time.perf_counter(), cpu_s()
    await asyncio.gather(*(client(prompts[number::num_clients]) for number in range(num_clients)))
    seconds, used = time.perf_counter() - began, cpu_s() - used
    return LoadResult(
        tokens_per_s=tokens / seconds, tokens_per_cpu_s=tokens / max(used, 1e-3), first_s=tuple(first)
    )


def completions(session: aiohttp.ClientSession, url: str, *, model: str, max_tokens: int) -> Ask:
    """Ask an OpenAI-compatible server to continue a text, greedily, as a stream."""

    async def ask(prompt: str) -> AsyncIterator[str]:
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": max_tokens}
        body |= {"temperature": 0.0, "stream": True}
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{url} answers {response.status}: {(await response.text())[:500]}")
            async for line in response.content:
                data = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data != b"[DONE]":
                    event = json.loads(data)
                    if "error" in event:
                        raise RuntimeError(f"{url}: {event['error']}")
                    for choice in event["choices"]:
                        yield choice.get("text") or ""

    return ask
