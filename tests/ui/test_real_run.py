"""`forge ui` beside a real run (slow): what its streams say is what the run records, and stop stops it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from forge.runs.lock import driver_pid
from forge.runs.reader import read_metrics, read_run
from tests.support.command import start_forge, survivors

pytestmark = pytest.mark.slow
JOB = """\
name: tiny
model: {architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
data: {files: "corpus.txt", seq_len: 32, tokenizer: {vocab_size: 300}, held_out: 10%}
training: {total_steps: 100000, global_batch_size: 8}
resources: {workers: 1, gpu: none}
tracking: {wandb: {mode: disabled}}
"""
NUM_STEPS = 20
TIMEOUT_S = 150.0


async def messages(session: aiohttp.ClientSession, url: str) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """The size and the content of each message of a stream."""
    async with session.get(url, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        async for line in answer.content:
            if line.startswith(b"data: "):
                yield len(line), json.loads(line[6:])


async def watch_and_stop(url: str) -> tuple[dict[int, float], list[int]]:
    """Follow the list until a run is in it, then the run, and stop it.

    Returns: losses by step, and sizes of messages.
    """
    async with aiohttp.ClientSession() as session:
        page = await (await session.get(url)).text()
        version = re.search(r'data-version="(\d+)"', page)
        csrf = re.search(r'name="csrf" content="([^"]+)"', page)
        assert version is not None and csrf is not None
        async for _, body in messages(session, f"{url}/events?since={version[1]}"):
            rows = body["state"]["runs"]
            (key,) = rows
            if rows[key] is not None and rows[key][1] == "running":
                break
        losses: dict[int, float] = {}
        sizes: list[int] = []
        is_stopping = False
        async for size, body in messages(session, f"{url}/runs/{key}/events?log=driver"):
            losses |= dict(zip(*body.get("points", {}).get("loss", {}).get("training", [[], []]), strict=True))
            sizes.append(size)
            status = body.get("state", {}).get("status", {}).get("status")
            if status == ["stopped"]:
                return losses, sizes
            if len(losses) >= NUM_STEPS and not is_stopping:
                is_stopping = True
                headers = {"Origin": url, "X-Forge-Csrf": csrf[1]}
                async with session.post(f"{url}/runs/{key}/stop", headers=headers) as answer:
                    assert answer.status == 200 and "stops after" in await answer.text()
    raise AssertionError("the stream ended before the run")


def test_real_run__its_page_follows_it_and_stops_it(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "corpus.txt").write_text("the cat sat on a mat and saw one dog run past\n" * 2000)
    (tmp_path / "runs").mkdir()
    ui = start_forge("ui", "runs", "--port", "0", cwd=tmp_path)
    assert ui.stderr is not None
    url = next(found[0] for line in ui.stderr if (found := re.search(r"http://\S+", line)))
    train = start_forge("train", "job.yaml", "--yes", cwd=tmp_path)
    try:
        losses, sizes = asyncio.run(watch_and_stop(url))
        train.communicate(timeout=60)
    finally:
        children = psutil.Process(ui.pid).children(recursive=True)
        ui.send_signal(signal.SIGINT)
        ended_at = time.monotonic()
        assert ui.wait(timeout=20) == 0, ui.stderr.read()
        if train.poll() is None:  # the driver is a process of its own
            for folder in (tmp_path / "runs").iterdir():
                os.kill(driver_pid(folder) or train.pid, signal.SIGTERM)
            train.kill()
    assert time.monotonic() - ended_at < 5 and survivors(children) == []
    (folder,) = (tmp_path / "runs").iterdir()
    recorded = {step["step"]: step["train/loss"] for step in read_metrics(folder)}
    least, most = min(recorded.values()), max(recorded.values())
    assert all(least * (1 - 1e-6) <= loss <= most * (1 + 1e-6) for loss in losses.values()), "means over steps"
    assert set(losses) <= set(recorded)
    run = read_run(folder)
    assert run.status == "stopped" and run.newest("CheckpointSaved") is not None
    assert sorted(sizes)[len(sizes) // 2] < 1500
