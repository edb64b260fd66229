"""An agent whose supervisor sends what it cannot carry out."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from forge.elastic.agent import Agent
from forge.elastic.agent_config import AgentConfig
from forge.elastic.messages import pack
from forge.elastic.rpc import Channel, Endpoint, Listener
from forge.events import Event, StepMetrics

SECRET = bytes(32)
START: dict[str, Any] = {
    "command": "start", "generation": 1, "world_size": 1, "ranks": [0], "number": 0,
    "source": {"generation": 1, "first": 0, "endpoints": pack([]), "lists": [pack([0])]},
}  # fmt: skip


class NoRecorder:
    """A recorder that discards everything."""

    async def write(self, records: list[tuple[str, Event | StepMetrics]]) -> None:
        pass


def configured(folder: Path) -> AgentConfig:
    return AgentConfig(
        node="node-1", host="127.0.0.1", num_slots=1, num_guaranteed=1, num_cores=1, devices=("cpu",),
        run_folder=str(folder), plan_json="{}", checkpoints=str(folder), keep=1, secret=SECRET.hex(),
    )  # fmt: skip


def test_gpu__driver_answers_late__is_reported_and_in_the_next_registration(tmp_path: Path) -> None:
    received: list[Any] = []

    async def run() -> None:
        async def serve(channel: Channel) -> None:
            registration = await channel.receive()
            received.append(registration["gpu"])
            if len(received) == 1:  # the driver answers after the registration; then the connection is lost
                has_registered.set()
                while (report := await channel.receive())["report"] != "gpu":
                    pass
                received.append(report["gpu"])
            else:
                await channel.send({"command": "shut_down"})
                await channel.receive()

        has_registered = threading.Event()

        def find_gpu() -> tuple[str, int]:
            assert has_registered.wait(10)
            return "Tesla T4", 15 * 2**30

        listener = Listener(host="127.0.0.1", secret=SECRET, serve=serve)

        async def locate() -> Endpoint:
            return listener.endpoint

        agent = Agent(configured(tmp_path), find_supervisor=locate, recorder=NoRecorder(), find_gpu=find_gpu)
        try:
            await asyncio.wait_for(agent.run(), timeout=20)
        finally:
            listener.close()

    asyncio.run(run())
    assert received == [None, ["Tesla T4", 15 * 2**30], ["Tesla T4", 15 * 2**30]]


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ({}, "KeyError: 'command'"),
        ({"command": "start"}, "KeyError: 'ranks'"),
        ({"command": "endpoints", "first": 0, "endpoints": 7}, "TypeError: argument should be"),
        ({"command": "endpoints", "first": 0, "endpoints": "AAAA"}, "error: Error -3 while decompressing"),
        (START, "KeyError: 0"),
        (START | {"source": START["source"] | {"lists": []}}, "ZeroDivisionError: "),
    ],
)
def test_command__cannot_be_carried_out__agent_ends_with_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], command: dict[str, Any], problem: str
) -> None:
    async def run() -> None:
        async def serve(channel: Channel) -> None:
            await channel.receive()
            await channel.send(command)
            await channel.receive()

        listener = Listener(host="127.0.0.1", secret=SECRET, serve=serve)

        async def locate() -> Endpoint:
            return listener.endpoint

        try:
            agent = Agent(configured(tmp_path), find_supervisor=locate, recorder=NoRecorder())
            await asyncio.wait_for(agent.run(), timeout=20)
        finally:
            listener.close()

    asyncio.run(run())
    said = capfd.readouterr().err
    assert said.startswith("a command of the supervisor cannot be carried out (" + problem)
    assert said.count("\n") == 1
