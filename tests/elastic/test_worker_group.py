"""The group of workers of one node, with a real fork server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from forge.elastic.workers.fork_client import ForkServerPool


def test_fork_server__cannot_import_what_the_plan_needs__says_how_it_ended(tmp_path: Path) -> None:
    async def end_of_first() -> tuple[dict[str, Any] | None, str]:
        pool = ForkServerPool(log=tmp_path / "logs" / "fork-server.log")
        server = pool.take("{}")  # no plan
        try:
            message = await asyncio.wait_for(server.receive(), timeout=60)
            return message, await server.wait_ended() + pool.log_text
        finally:
            server.kill()

    message, reason = asyncio.run(end_of_first())
    assert message is None
    assert reason.startswith("ended with exit code 1: ") and reason.endswith("(fork-server.log)")
