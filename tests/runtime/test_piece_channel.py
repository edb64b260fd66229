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
from forge.serve.calls import GenerateCall, ReplicaLostError, TextDelta, TextOptions
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
        self._senders = PieceSenders()
        self.responses: list[Response] = []

    def options(self, **options: Any) -> Replica:
        return self

    @property
    def generate(self) -> Replica:
        return self

    def remote(self, call: GenerateCall, address: ReturnAddress) -> Response:
        self.responses.append(Response(self._answer(address)))
        return self.responses[-1]

    async def _answer(self, address: ReturnAddress) -> AsyncGenerator[Item, None]:
        sender = await self._senders.to(address.path if self._is_near else "/nowhere")
        assert (sender is not None) == self._is_near
        for item in self._items:
            await asyncio.sleep(self._pause_s)
            if sender is None:
                yield item
            else:
                sender.send(address.call, item)


async def answered(replica: Replica) -> tuple[str, int, int]:
    """The text, its number of tokens and of pieces."""
    backend = RayBackend(replica, app="app", info=info_of())
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
        backend = RayBackend(replica, app="app", info=info_of())
        batches = backend.generate(CALL)
        await anext(batches)
        await batches.aclose()
        backend.close()

    asyncio.run(run())
    assert replica.responses[0].is_cancelled


def test_receiver__closed__leaves_no_folder_and_senders_connect_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as root:  # short, since the path of a socket is
        monkeypatch.setattr(tempfile, "tempdir", root)

        async def run() -> tuple[PieceSender | None, ...]:
            senders, receiver = PieceSenders(), PieceReceiver()
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
