"""`forge serve` on Ray Serve: what listens, a lost replica, new weights, the end, and memory over many requests.

In the slow set, because it takes minutes: `pytest -m slow tests/serve/http/test_ray_serve.py`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import openai
import psutil
import pytest
from ray.util import get_node_ip_address

from forge.process import free_port
from forge.runtime.servers import (
    ServerStatus,
    await_ready,
    find_server,
    server_process,
    start_server,
    update_server,
)
from forge.serve.http.settings import ServerSettings
from tests.support.ports import answers, open_ports, requires_token
from tests.support.serving import write_causal_lm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NUM_CLIENTS = 200
NUM_REQUESTS = 10_000
NUM_CONCURRENT = 48
MOST_S = 600.0
MAX_GROWTH_BYTES = 30 * 2**20
"""Of all processes of the server together over 10,000 requests."""
GREEDY: dict[str, Any] = {"model": "tiny", "prompt": "the quick", "max_tokens": 16, "temperature": 0}


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server of two replicas, and a folder with other weights for it."""

    settings: ServerSettings
    other: Path

    @property
    def status(self) -> ServerStatus:
        return find_server(self.settings.name)

    @property
    def processes(self) -> list[psutil.Process]:
        process = psutil.Process(self.status.record["pid"])
        return [process, *process.children(recursive=True)]

    @property
    def replicas(self) -> list[psutil.Process]:
        return [process for process in self.processes if "ServeReplica" in " ".join(process.cmdline())]

    def client(self, **options: Any) -> openai.AsyncOpenAI:
        limits = httpx.Limits(max_connections=NUM_CLIENTS)
        return openai.AsyncOpenAI(
            base_url=f"{self.settings.url}/v1",
            api_key="none",
            http_client=httpx.AsyncClient(limits=limits, trust_env=False, timeout=120),
            **options,
        )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("serving")
    before = dict(os.environ)
    os.environ |= {"FORGE_STATE": str(root / "state"), "FORGE_USD_PER_HOUR": "0.5"}
    os.environ.pop("RAY_worker_niceness", None)  # which tests set
    settings = ServerSettings(
        name="test",
        source=str(write_causal_lm(root / "model")),
        model_name="tiny",
        port=free_port("127.0.0.1"),
        min_replicas=2,
        max_replicas=2,
    )
    try:
        start_server(settings)
        await_ready("test", on_message=print)
        yield Served(settings=settings, other=write_causal_lm(root / "other", seed=1))
    finally:
        process = server_process("test")
        if process is not None:
            process.request_stop()
            process.wait()
        os.environ.clear()
        os.environ.update(before)


def await_replicas(served: Served, count: int) -> None:
    deadline = time.monotonic() + 120
    while served.status.record["replicas"] != count or len(served.replicas) != count:
        assert time.monotonic() < deadline, f"{served.status.record['replicas']} replicas"
        time.sleep(0.2)


async def ask(client: openai.AsyncOpenAI, **changes: Any) -> str:
    """The outcome of one request: `ok`, or the status of its error."""
    try:
        answer = await client.completions.create(**(GREEDY | changes))
    except openai.APIStatusError as error:
        assert set(error.response.json()["error"]) == {"message", "type", "param", "code"}
        return str(error.status_code)
    assert answer.usage is not None and answer.usage.completion_tokens == changes.get("max_tokens", 16)
    return "ok"


def test_replicas__beside_other_work__have_the_priority_of_other_programs(served: Served) -> None:
    assert [replica.nice() for replica in served.replicas] == [os.nice(0)] * 2


def test_server__its_listening_ports__loopback_or_token(served: Served) -> None:
    host = get_node_ip_address()
    await_replicas(served, 2)
    ports = open_ports(served.processes, host=host)
    assert ports, "Ray's own, which require its token"
    for (address, port), command in ports.items():
        assert answers(address, port) == [], (port, command)
        assert requires_token(address, port), (port, command)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{host}:{served.settings.port}/health", trust_env=False)


def test_200_clients__one_replica_is_killed__every_request_ends_well_or_with_a_clear_status(served: Served) -> None:
    await_replicas(served, 2)

    async def load(num_rounds: int, *, kill: bool) -> tuple[Counter[str], float]:
        found: Counter[str] = Counter()
        began = time.monotonic()
        async with served.client(max_retries=0) as client:

            async def one() -> None:
                for _ in range(num_rounds):
                    found[await ask(client)] += 1

            clients = [asyncio.ensure_future(one()) for _ in range(NUM_CLIENTS)]
            if kill:
                await asyncio.sleep(1.0)
                served.replicas[0].send_signal(signal.SIGKILL)
            await asyncio.gather(*clients)
        return found, NUM_CLIENTS * num_rounds / (time.monotonic() - began)

    async def run() -> None:
        before, rate_before = await load(2, kill=False)
        during, _ = await load(4, kill=True)
        await asyncio.to_thread(await_replicas, served, 2)
        rate_after = 0.0
        for _ in range(3):  # other work on this machine may make one round slow
            after, rate = await load(2, kill=False)
            assert set(after) == {"ok"}
            rate_after = max(rate_after, rate)
            if rate_after > 0.5 * rate_before:
                break
        print(f"\nbefore {before} {rate_before:.0f}/s, with a kill {during}, after {rate_after:.0f}/s")
        assert set(before) == {"ok"}
        assert set(during) <= {"ok", "503"} and during["ok"] > during["503"]
        assert sum(during.values()) == 4 * NUM_CLIENTS
        assert rate_after > 0.5 * rate_before

    asyncio.run(run())


def test_update__under_load__drops_no_request_and_changes_the_weights(served: Served) -> None:
    await_replicas(served, 2)
    before = served.status.record["digest"]

    async def run() -> Counter[str]:
        found: Counter[str] = Counter()
        is_over = asyncio.Event()
        async with served.client(max_retries=0) as client:

            async def one() -> None:
                while not is_over.is_set():
                    found[await ask(client)] += 1

            clients = [asyncio.ensure_future(one()) for _ in range(8)]
            changes = {"source": str(served.other)}
            await asyncio.to_thread(update_server, "test", changes, on_message=print)
            is_over.set()
            await asyncio.gather(*clients)
        return found

    found = asyncio.run(run())
    assert set(found) == {"ok"} and found["ok"] > 8
    after = served.status.record["digest"]
    assert after != before
    answer = httpx.post(f"{served.settings.url}/v1/completions", json=GREEDY, trust_env=False, timeout=60).json()
    assert answer["system_fingerprint"] == f"fp_{after[:16]}"


@pytest.mark.timeout(MOST_S + 300)
def test_memory__10_000_requests__does_not_grow(served: Served) -> None:
    await_replicas(served, 2)

    async def load(count: int) -> None:
        numbers = iter(range(count))
        async with aiohttp.ClientSession(served.settings.url, connector=aiohttp.TCPConnector(limit=0)) as session:

            async def client() -> None:
                for number in numbers:
                    changes: dict[str, Any] = {"prompt": f"{number} the quick", "max_tokens": 4}
                    if number % 10 == 0:  # a client that goes away
                        changes = {"max_tokens": 64, "stream": True}
                    async with session.post("/v1/completions", json=GREEDY | changes) as answer:
                        assert answer.status == 200
                        await answer.content.readline()
                        if number % 10 == 0:
                            answer.close()

            await asyncio.gather(*(client() for _ in range(NUM_CONCURRENT)))

    def memory() -> int:
        return sum(process.memory_full_info().uss for process in served.processes)

    asyncio.run(load(1000))  # caches and pools fill
    before, began = memory(), time.monotonic()
    asyncio.run(asyncio.wait_for(load(NUM_REQUESTS), MOST_S))
    seconds, growth = time.monotonic() - began, memory() - before
    print(
        f"\n{growth / 2**20:.1f} MiB over {NUM_REQUESTS} requests in {seconds:.0f} s, of {before / 2**20:.0f} MiB"
    )
    assert growth < MAX_GROWTH_BYTES
    deadline = time.monotonic() + 10  # the record is written once a second
    while (record := served.status.record)["running"] or record["waiting"]:
        assert time.monotonic() < deadline, record
        time.sleep(0.1)
    assert record["usd_per_million_tokens"] > 0


def test_stop__a_running_stream__is_finished_first(served: Served) -> None:
    async def run() -> None:
        async with served.client(max_retries=0) as client:
            stream = await client.completions.create(
                **(GREEDY | {"max_tokens": 110, "stream": True, "stream_options": {"include_usage": True}})
            )
            events = aiter(stream)
            await anext(events)
            process = server_process("test")
            assert process is not None
            process.request_stop()
            last = None
            async for event in events:
                last = event
            assert last is not None and last.usage is not None and last.usage.completion_tokens == 110
            await asyncio.to_thread(process.wait)

    asyncio.run(run())
    assert served.status.state == "stopped"
