"""The load of `benchmarks.serve`: clients that ask one after another, and what they measure.

Clients are coroutines. Each has prompts of its own, and waits for the whole answer before it asks again. They share
the cores with the server, so they only note what comes and when; texts and tokens are read from it after the load.
"""

from __future__ import annotations

import asyncio
import json
import pydoc_data.topics
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

Ask = Callable[[str], AsyncIterator[Any]]
"""Gives an answer in pieces, which the `read` of `measure_load` understands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What the clients of one run saw."""

    tokens_per_s: float
    tokens_per_cpu_s: float
    """Per second of CPU time of the server's processes."""
    client_ms_per_token: float
    """CPU time of the clients; of those in the server's process with the server's."""
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
    read: Callable[[Iterable[Any]], Iterator[str]],
    count: Callable[[str], int],
    cpu_s: Callable[[], float],
) -> LoadResult:
    """Let clients ask for an answer to every prompt.

    Args:
        read: gives the text that each piece of an answer adds.
        count: gives the number of tokens of an answer.
        cpu_s: gives the CPU time that the server has used.
    """
    answers: list[tuple[list[Any], list[float]]] = []

    async def client(own: Sequence[str]) -> None:
        for prompt in own:
            began = time.perf_counter()
            pieces, seconds = [], []
            async for piece in ask(prompt):
                pieces.append(piece)
                seconds.append(time.perf_counter() - began)
            answers.append((pieces, seconds))

    used, own, began = cpu_s(), time.process_time(), time.perf_counter()  # `cpu_s` looks at all processes
    await asyncio.gather(*(client(prompts[number::num_clients]) for number in range(num_clients)))
    seconds, own, used = time.perf_counter() - began, time.process_time() - own, cpu_s() - used
    texts = [(list(read(pieces)), at) for pieces, at in answers]
    tokens = sum(count("".join(found)) for found, _ in texts)
    first = (next((at for text, at in zip(found, at, strict=True) if text), None) for found, at in texts)
    return LoadResult(
        tokens_per_s=tokens / seconds,
        tokens_per_cpu_s=tokens / max(used, 1e-3),
        client_ms_per_token=own / max(tokens, 1) * 1e3,
        first_s=tuple(each for each in first if each is not None),
    )


def completions(session: aiohttp.ClientSession, url: str, *, model: str, max_tokens: int) -> Ask:
    """Ask an OpenAI-compatible server to continue a text, greedily, as a stream; see `read_events`."""

    async def ask(prompt: str) -> AsyncIterator[bytes]:
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": max_tokens}
        body |= {"temperature": 0.0, "stream": True}
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{url} answers {response.status}: {(await response.text())[:500]}")
            async for piece in response.content.iter_any():
                yield piece

    return ask


def read_events(pieces: Iterable[bytes]) -> Iterator[str]:
    """The text that each piece of a stream of completions adds. Raises: RuntimeError for an error in the stream."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        text = ""
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != b"[DONE]":
                event = json.loads(data)
                if "error" in event:
                    raise RuntimeError(f"the server answers {event['error']}")
                text += "".join(choice.get("text") or "" for choice in event["choices"])
        yield text
