"""The engine of `forge serve` without HTTP and Ray: clients in the same process call it.

    python -m benchmarks.peers.bare_engine '{"model": FOLDER, "dtype": "bf16", ...}'

Prints one JSON line for each number of clients.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict

from benchmarks.serve_load import build_prompts, measure_load
from forge.inference.loaded import load
from forge.inference.sampling import SamplingParams
from forge.serve.engine import ServingEngine
from forge.serve.request import EngineRequest


def main() -> None:
    """Measure every load of the request."""
    asyncio.run(_measure(json.loads(sys.argv[1])))


async def _measure(request: dict[str, object]) -> None:
    loaded = load(str(request["model"]), dtype=request["dtype"])  # type: ignore[arg-type]
    engine = ServingEngine(loaded)
    numbers = itertools.count()
    sampling = SamplingParams(max_tokens=int(str(request["max_tokens"])))

    async def ask(prompt: str) -> AsyncIterator[str]:
        wanted = EngineRequest(request_id=str(next(numbers)), prompt=loaded.encode(prompt), sampling=sampling)
        stream = engine.submit(wanted)
        while events := await stream.take():
            yield "".join(event.text for event in events)

    def count(text: str) -> int:
        return len(loaded.tokenizer.encode(text, add_special_tokens=False).ids)

    for number, seed, prompts in request["loads"]:  # type: ignore[attr-defined]
        given = build_prompts(prompts, seed=seed)
        result = await measure_load(ask, given, num_clients=number, read=iter, count=count, cpu_s=time.process_time)
        print(json.dumps(asdict(result)), flush=True)
    engine.close()


if __name__ == "__main__":
    main()
