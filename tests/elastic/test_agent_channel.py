"""The supervisor's end of an agent's connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from forge.elastic.agent_channel import AgentChannel
from forge.elastic.rpc import Channel, Listener, Message, connect

SECRET = bytes(32)


class Pair:
    """Both ends of a connection, and what the supervisor's end receives."""

    def __init__(self, agent: Channel, supervisor: AgentChannel) -> None:
        self.agent, self.supervisor = agent, supervisor
        self.received: list[Message] = []
        self.on_message: Callable[[Message], Any] = self.received.append
        self.task = asyncio.ensure_future(supervisor.receive_all(lambda message: self.on_message(message)))

    async def wait_received(self, count: int) -> list[Message]:
        async with asyncio.timeout(5):
            while len(self.received) < count:
                await asyncio.sleep(0.001)
        return self.received

    async def error(self) -> BaseException:
        """How the supervisor's end has ended."""
        async with asyncio.timeout(5):
            return (await asyncio.gather(self.task, return_exceptions=True))[0] or AssertionError("it returned")


def run_pair(script: Callable[[Pair], Coroutine[Any, Any, None]], *, early: int = 0) -> None:
    """Run a script with a connected pair.

    Args:
        early: messages that the agent sends together with its registration.
    """

    async def run() -> None:
        accepted: asyncio.Future[AgentChannel] = asyncio.get_running_loop().create_future()
        is_over = asyncio.Event()

        async def serve(channel: Channel) -> None:
            assert await channel.receive() == {"report": "register"}
            accepted.set_result(AgentChannel(channel))
            await is_over.wait()

        listener = Listener(host="127.0.0.1", secret=SECRET, serve=serve)
        agent = await connect(listener.endpoint, secret=SECRET)
        await agent.send({"report": "register"})
        for number in range(early):
            await agent.send({"n": number})
        pair = Pair(agent, await accepted)
        try:
            await script(pair)
        finally:
            is_over.set()
            pair.supervisor.close()
            await asyncio.gather(pair.task, return_exceptions=True)
            agent.close()
            listener.close()

    asyncio.run(run())


def test_messages__both_directions__in_order() -> None:
    async def script(pair: Pair) -> None:
        for number in range(100):
            await pair.agent.send({"n": number, "text": "x" * (number * 100)})
            pair.supervisor.send({"m": number})
        assert [message["n"] for message in await pair.wait_received(100)] == list(range(100))
        assert [(await pair.agent.receive())["m"] for _ in range(100)] == list(range(100))

    run_pair(script)


def test_messages__sent_with_the_registration__are_received() -> None:
    async def script(pair: Pair) -> None:
        assert await pair.wait_received(5) == [{"n": number} for number in range(5)]

    run_pair(script, early=5)


def test_send__more_than_the_socket_takes__agent_gets_all_in_order() -> None:
    async def script(pair: Pair) -> None:
        text = "x" * 2**20
        for number in range(24):
            pair.supervisor.send({"m": number, "text": text})
        await pair.agent.send({"n": 0})
        await pair.wait_received(1)  # it is read although much is unsent
        for number in range(24):
            async with asyncio.timeout(5):
                message = await pair.agent.receive()
            assert (message["m"], len(message["text"])) == (number, 2**20)
        pair.supervisor.send({"m": 24})
        assert await pair.agent.receive() == {"m": 24}

    run_pair(script)


def test_agent_closes__end_of_the_connection_and_sending_is_ignored() -> None:
    async def script(pair: Pair) -> None:
        await pair.agent.send({"n": 1})
        pair.agent.close()
        assert isinstance(await pair.error(), (EOFError, ConnectionResetError))
        assert pair.received == [{"n": 1}]
        pair.supervisor.send({"m": 1})

    run_pair(script)


def test_close__receive_all_ends() -> None:
    async def script(pair: Pair) -> None:
        pair.supervisor.close()
        assert isinstance(await pair.error(), EOFError)

    run_pair(script)


@pytest.mark.parametrize("data", [b"\xff" * 100, bytes(100)])
def test_bytes_that_are_no_message__connection_ends(data: bytes) -> None:
    async def script(pair: Pair) -> None:
        pair.agent.socket.send(data)
        assert isinstance(await pair.error(), (ValueError, ConnectionError))
        assert pair.received == []

    run_pair(script)


def test_handler_fails__receive_all_raises() -> None:
    async def script(pair: Pair) -> None:
        pair.on_message = lambda message: pair.received[message["missing"]]  # type: ignore[call-overload]
        await pair.agent.send({"n": 1})
        assert isinstance(await pair.error(), KeyError)

    run_pair(script)
