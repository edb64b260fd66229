"""The group of workers of one node, with a real fork server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from forge.elastic.workers.allocator import allocator_settings
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


def test_fork_server__c_library__keeps_memory_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")

    async def environment() -> dict[str, str]:
        server = ForkServerPool(log=tmp_path / "logs" / "fork-server.log").take("{}")
        try:
            while not (text := Path(f"/proc/{server._pid}/environ").read_text()):
                await asyncio.sleep(0.01)  # the kernel has not completed its start
        finally:
            server.kill()
        return dict(word.split("=", 1) for word in text.split("\0") if word)

    found = asyncio.run(asyncio.wait_for(environment(), timeout=60))
    assert {name: found[name] for name in allocator_settings()} == allocator_settings() | {
        "MALLOC_TRIM_THRESHOLD_": "1000"
    }


@pytest.mark.parametrize(
    ("version", "threshold", "has_huge_pages"),
    [
        ("glibc 2.36", 2**30, True),
        ("glibc 2.35", 2**30, True),
        ("glibc 2.31", 32 * 2**20, False),
        (None, 32 * 2**20, False),
    ],
)
def test_allocator_settings__older_library__threshold_that_it_accepts(
    version: str | None, threshold: int, has_huge_pages: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.confstr", lambda name: version)
    found = allocator_settings()
    assert found["MALLOC_MMAP_THRESHOLD_"] == str(threshold)
    assert ("GLIBC_TUNABLES" in found) == has_huge_pages
