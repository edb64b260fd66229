"""The client of vLLM's API against a scripted server on a Unix socket, which stands in for vLLM.

Only what vLLM cannot be made to do on demand is tested here: refusals, broken answers, a text that goes on after
its stop string. That vLLM answers in this form is tested with vLLM itself in test_vllm.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from forge.data.tokenizer import load_tokenizer, parse_tokenizer
from forge.errors import ArgumentError
from forge.inference.sampling import SamplingParams
from forge.serve.request import EngineError, EngineRequest, TokenEvent
from forge.serve.vllm.engine import VllmEngine
from tests.support.objectives import write_tokenizer

END = 1


class Peer:
    """A server that streams the given chunks, and remembers what it was asked and whether the client stayed."""

    def __init__(self, address: str, *, chunks: list[dict[str, Any]], status: int = 200, ends: bool = True) -> None:
        self.address, self.chunks, self.status, self.ends = address, chunks, status, ends
        self.body: dict[str, Any] = {}
        self.was_left = asyncio.Event()

    def error(self) -> None:
        return None

    def close(self) -> None:
        pass

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.body = await request.json()
        if self.status != 200:
            return web.json_response({"error": {"message": "no such thing"}}, status=self.status)
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            for chunk in self.chunks:
                await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            if self.ends:
                await response.write(b"data: [DONE]\n\n")
            else:
                await asyncio.sleep(60)
        except (asyncio.CancelledError, ConnectionError):
            self.was_left.set()
            raise
        return response


def chunk(ids: list[int], *, index: int = 0, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": "", "token_ids": ids, "finish_reason": None, **more}]}


def ask(
    tmp_path: Path,
    chunks: list[dict[str, Any]],
    *,
    sampling: SamplingParams | None = None,
    then: Callable[[Peer, VllmEngine], Any] | None = None,
    **peer: Any,
) -> tuple[list[TokenEvent], dict[str, Any]]:
    """The events of one request to a peer, and the body that it was sent."""
    write_tokenizer(tmp_path)
    tokenizer: Any = parse_tokenizer(load_tokenizer(str(tmp_path)))
    loaded: Any = SimpleNamespace(tokenizer=tokenizer, end_ids=(END,))

    async def run() -> tuple[list[TokenEvent], dict[str, Any]]:
        server: Any = Peer(str(tmp_path / "api.sock"), chunks=chunks, **peer)
        app = web.Application()
        app.router.add_post("/v1/completions", server.answer)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.UnixSite(runner, server.address).start()
        try:
            engine = VllmEngine(
                loaded,
                process=server,
                max_length=64,
                cache_tokens=640,
                adapters=("own",),
            )
            request = EngineRequest(
                request_id="r",
                prompt=[50, 51],
                sampling=sampling or SamplingParams(max_tokens=8),
                adapter="own",
                is_repeatable=True,
            )
            async with asyncio.timeout(20):
                events = [event async for event in engine.submit(request)]
                if then is not None:
                    await then(server, engine)
            return events, server.body
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_request__every_parameter__is_passed_by_vllms_name(tmp_path: Path) -> None:
    sampling = SamplingParams(
        max_tokens=100, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2, seed=9, stop=("x",),
        stop_ids=(7,), n=2, logprobs=1,
    )  # fmt: skip
    scores = {"token_logprobs": [-0.5], "top_logprobs": [{"token_id:60": -0.5, "token_id:61": -0.1}]}
    done = [chunk([60], index=at, logprobs=scores) for at in (0, 1)]
    done += [chunk([END], index=at, logprobs=scores, finish_reason="stop") for at in (0, 1)]
    usage = {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 2}}}
    stats: list[Any] = []

    async def then(peer: Peer, engine: VllmEngine) -> None:
        while engine.stats().running:  # its task ends just after the last event
            await asyncio.sleep(0)
        stats.append(engine.stats())

    events, body = ask(tmp_path, [usage, *done], sampling=sampling, then=then)
    wanted = {
        "model": "adapter:own", "prompt": [50, 51], "max_tokens": 62, "temperature": 0.7, "top_p": 0.9, "top_k": 5,
        "min_p": 0.1, "repetition_penalty": 1.2, "seed": 9, "n": 2, "logprobs": 1, "stop_token_ids": [7, END],
    }  # fmt: skip
    assert wanted.items() <= body.items() and "stop" not in body, "stop strings are found by forge itself"
    assert [(event.index, event.token_id, event.finish_reason) for event in events] == [
        (0, 60, None), (1, 60, None), (0, END, "stop"), (1, END, "stop"),
    ]  # fmt: skip
    assert events[0].logprob == -0.5 and events[0].top_logprobs == ((61, -0.1),)
    assert (stats[0].num_finished, stats[0].num_cached_tokens, stats[0].running) == (2, 2, 0)


def test_stop_string__vllm_goes_on__the_text_ends_and_the_connection_is_closed(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    ids = (
        parse_tokenizer(load_tokenizer(str(tmp_path))).encode("quick brown fox jumps", add_special_tokens=False).ids
    )

    async def then(peer: Peer, engine: VllmEngine) -> None:
        await peer.was_left.wait()

    sampling = SamplingParams(max_tokens=50, stop=("brown",))
    events, _ = ask(tmp_path, [chunk([one]) for one in ids], sampling=sampling, ends=False, then=then)
    assert "".join(event.text for event in events) == "quick "
    assert events[-1].finish_reason == "stop" and events[-1].stopped_by == "brown"


@pytest.mark.parametrize(
    ("peer", "error", "message"),
    [
        ({"chunks": [], "status": 400}, ArgumentError, "vLLM refuses the request: no such thing"),
        ({"chunks": [], "status": 500}, EngineError, "vLLM answers 500: no such thing"),
        ({"chunks": [chunk([60])]}, EngineError, "ended an answer before its text was complete"),
        ({"chunks": [chunk([60]), {"error": {"message": "out of memory"}}]}, EngineError, "out of memory"),
        ({"chunks": [chunk([60]), {"nothing": 1}]}, EngineError, "does not answer"),
    ],
)
def test_answer__refused_or_broken__is_an_error(
    peer: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        ask(tmp_path, **peer)


def test_server__not_there__is_an_engine_error(tmp_path: Path) -> None:
    async def then(peer: Peer, engine: VllmEngine) -> None:
        engine._process.address = str(tmp_path / "none")
        with pytest.raises(EngineError, match="vLLM does not answer"):
            [
                event
                async for event in engine.submit(
                    EngineRequest(request_id="b", prompt=[5], sampling=SamplingParams())
                )
            ]

    ask(tmp_path, [chunk([END])], then=then)
