"""An agent whose supervisor sends what it cannot carry out."""

from __future__ import annotations

import asyncio
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

        config = AgentConfig(
            node="node-1", host="127.0.0.1", num_slots=1, num_guaranteed=1, num_cores=1, devices=("cpu",),
            run_folder=str(tmp_path), plan_json="{}", checkpoints=str(tmp_path), keep=1, secret=SECRET.hex(),
        )  # fmt: skip
        try:
            agent = Agent(config, find_supervisor=locate, recorder=NoRecorder())
            await asyncio.wait_for(agent.run(), timeout=20)
        finally:
            listener.close()

    asyncio.run(run())
    said = capfd.readouterr().err
    assert said.startswith("a command of the supervisor cannot be carried out (" + problem)
    assert said.count("\n") == 1
