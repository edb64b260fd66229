"""Pieces of texts between replicas and the server's process: by the socket, through Ray, lost and late."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from forge.runtime.piece_channel import Inbox, Item, PieceReceiver, PieceSender, PieceSenders, ReturnAddress
from forge.runtime.serve_replica import RayBackend
from forge.serve.calls import GenerateCall, ReplicaLostError, TextDelta, TextOptions, TextsCall
from forge.serve.http.errors import ApiError
from tests.support.serving import info_of

CALL = GenerateCall(request_id="1", model="tiny", options=TextOptions())


def delta(text: str, **changes: Any) -> TextDelta:
    return TextDelta(**({"index": 0, "text": text, "num_tokens": 1} | changes))


class Response:
    """What a deployment handle returns for a streaming call."""

    def __init__(self, items: AsyncGenerator[Item, None]) -> None:
        self._items = items
        self.is_cancelled = False

    def __aiter__(self) -> AsyncGenerator[Item, None]:
        return self._items

    def cancel(self) -> None:
        self.is_cancelled = True


class Replica:
    """Stands in for a deployment handle; answers each call as `ModelReplica.generate` does."""

    def __init__(self, items: Sequence[Item], *, is_near: bool = True, pause_s: float = 0.0) -> None:
        self._items, self._is_near, self._pause_s = items, is_near, pause_s
        self.senders = PieceSenders(self._work)
        self.responses: list[Response] = []
        self.num_ended_early = 0

    def options(self, **options: Any) -> Replica:
        return self

    @property
    def generate(self) -> Replica:
        return self

    def remote(self, call: GenerateCall, address: ReturnAddress) -> Response:
        self.responses.append(Response(self._answer(address)))
        return self.responses[-1]

    async def _answer(self, address: ReturnAddress) -> AsyncGenerator[Item, None]:
        sender = await self.senders.to(address.path if self._is_near else "/nowhere")
        assert (sender is not None) == self._is_near
        async for item in self._work(CALL):
            if sender is None:
                yield item
            else:
                sender.send(address.call, item)

    async def _work(self, call: GenerateCall | TextsCall) -> AsyncGenerator[Item, None]:
        try:
            for item in self._items:
                await asyncio.sleep(self._pause_s)
                if isinstance(item, ZeroDivisionError):
                    raise item
                yield item
        except (asyncio.CancelledError, GeneratorExit):
            self.num_ended_early += 1
            raise


def backend_of(replica: Replica, *, is_single: bool = False) -> RayBackend:
    return RayBackend(replica, app="app", info=info_of(), is_single=is_single)


async def text_of(backend: RayBackend) -> str:
    async with aclosing(backend.generate(CALL)) as batches:
        return "".join([each.text async for batch in batches for each in batch])


async def answered(replica: Replica) -> tuple[str, int, int]:
    """The text, its number of tokens and of pieces."""
    backend = backend_of(replica)
    text, num_tokens, num_pieces = "", 0, 0
    try:
        async with aclosing(backend.generate(CALL)) as batches:
            async for batch in batches:
                text += "".join(each.text for each in batch)
                num_tokens += sum(each.num_tokens for each in batch)
                num_pieces += len(batch)
    finally:
        assert await backend.wait_idle(timeout_s=0)
        backend.close()
    return text, num_tokens, num_pieces


@pytest.mark.parametrize("is_near", [True, False])
def test_generate__on_this_machine_or_another__whole_text(is_near: bool) -> None:
    replica = Replica([[delta("a")], [delta("b"), delta("c")], None], is_near=is_near)
    assert asyncio.run(answered(replica))[:2] == ("abc", 3)
    assert not replica.responses[0].is_cancelled


def test_generate__pieces_that_wait__are_merged_by_text() -> None:
    async def run() -> Sequence[TextDelta] | None:
        inbox = Inbox()
        inbox.put([delta("a", prompt_tokens=5), delta("x", index=1)])
        inbox.put([delta("b", finish_reason="stop")])
        found = await inbox.take()
        inbox.put(None)
        assert await inbox.take() is None
        return found

    first, second = asyncio.run(run()) or ()
    assert first == delta("ab", num_tokens=2, finish_reason="stop", prompt_tokens=5)
    assert second == delta("x", index=1)


@pytest.mark.parametrize("error", [ApiError("too long"), ReplicaLostError("the engine failed")])
@pytest.mark.parametrize("is_near", [True, False])
def test_generate__an_expected_error__comes_after_the_pieces(error: Exception, is_near: bool) -> None:
    with pytest.raises(type(error), match=str(error)):
        asyncio.run(answered(Replica([[delta("a")], error], is_near=is_near)))


def test_generate__a_replica_returns_without_an_end__it_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.runtime.serve_replica._LATE_S", 0.05)
    with pytest.raises(ReplicaLostError, match="no end"):
        asyncio.run(answered(Replica([[delta("a")]])))


def test_generate__closed_in_the_middle__is_cancelled() -> None:
    replica = Replica([[delta("a")], [delta("b")], None], pause_s=0.05)

    async def run() -> None:
        backend = backend_of(replica)
        batches = backend.generate(CALL)
        await anext(batches)
        await batches.aclose()
        backend.close()

    asyncio.run(run())
    assert replica.responses[0].is_cancelled


@pytest.mark.parametrize(("is_single", "num_by_ray"), [(True, 1), (False, 3)])
def test_generate__later_calls_of_a_single_replica__take_its_connection(is_single: bool, num_by_ray: int) -> None:
    replica = Replica([[delta("a")], [delta("b")], None])

    async def run() -> list[str]:
        backend = backend_of(replica, is_single=is_single)
        first = await text_of(backend)
        found = [first, *await asyncio.gather(text_of(backend), text_of(backend))]
        backend.close()
        return found

    assert asyncio.run(run()) == ["ab"] * 3
    assert len(replica.responses) == num_by_ray


def test_generate__closed_in_the_middle_of_a_call_by_the_connection__ends_in_the_replica() -> None:
    replica = Replica([[delta("a")], [delta("b")], None], pause_s=0.05)

    async def run() -> None:
        backend = backend_of(replica, is_single=True)
        await text_of(backend)
        batches = backend.generate(CALL)
        await anext(batches)
        await batches.aclose()
        while not replica.num_ended_early:
            await asyncio.sleep(0.01)
        assert await text_of(backend) == "ab"
        backend.close()

    asyncio.run(asyncio.wait_for(run(), 20))
    assert len(replica.responses) == 1


def test_generate__a_fault_in_a_call_by_the_connection__is_raised() -> None:
    replica = Replica([[delta("a")], None])

    async def run() -> None:
        backend = backend_of(replica, is_single=True)
        await text_of(backend)
        replica._items = [[delta("a")], ZeroDivisionError("by zero")]
        with pytest.raises(RuntimeError, match="ZeroDivisionError: by zero"):
            await text_of(backend)
        backend.close()

    asyncio.run(run())


def test_generate__the_connection_ends__its_calls_are_lost_and_later_ones_reach_the_next_replica() -> None:
    replica = Replica([[delta("a")], [delta("b")], None], pause_s=0.05)

    async def run() -> str:
        backend = backend_of(replica, is_single=True)
        await text_of(backend)
        batches = backend.generate(CALL)
        await anext(batches)
        for sender in replica.senders._senders.values():
            (await sender)._writer.close()  # type: ignore[union-attr]
        with pytest.raises(ReplicaLostError, match="process has ended"):
            await anext(batches)
        found = await text_of(backend) + await text_of(backend)
        backend.close()
        return found

    assert asyncio.run(run()) == "abab"
    assert len(replica.responses) == 2  # the first call of each connection


def test_generate__the_engine_failed__later_calls_go_through_ray_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replica = Replica([[delta("a")], ReplicaLostError("the engine failed")])

    async def run() -> list[int]:
        backend = backend_of(replica, is_single=True)
        found = []
        for avoid_s in (10.0, 0.0, 0.0):
            monkeypatch.setattr("forge.runtime.piece_channel._AVOID_S", avoid_s)
            with pytest.raises(ReplicaLostError, match="the engine failed"):
                await text_of(backend)
            found.append(len(replica.responses))
        backend.close()
        return found

    assert asyncio.run(run()) == [1, 2, 2]


def test_receiver__closed__leaves_no_folder_and_senders_connect_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as root:  # short, since the path of a socket is
        monkeypatch.setattr(tempfile, "tempdir", root)

        async def run() -> tuple[PieceSender | None, ...]:
            senders, receiver = PieceSenders(Replica([])._work), PieceReceiver()
            path = await receiver.listen()
            assert Path(path).parent.stat().st_mode & 0o077 == 0
            first = await senders.to(path)
            assert first is await senders.to(path)
            receiver.close()
            assert not list(Path(root).iterdir())
            first._writer.close()  # type: ignore[union-attr]
            return first, await senders.to(path)

        first, second = asyncio.run(run())
    assert first is not None and second is None


def test_listen__the_path_is_too_long__returns_through_ray(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert asyncio.run(answered(Replica([[delta("a")], None], is_near=False)))[0] == "a"
    assert "through Ray" in caplog.text


def test_module_of_replicas__imported__does_not_import_torch() -> None:
    """A replica sets torch's threads in the environment, which torch reads when it is imported."""
    code = "import forge.runtime.serve_replica, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
