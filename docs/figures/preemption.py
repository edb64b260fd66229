"""Draw `docs/figures/preemption.svg`: a real run on three simulated machines that loses one and gets another.

    python docs/figures/preemption.py

It starts a local cluster, trains a small model, kills a machine without warning, adds one, gives one a preemption
notice, and draws what `metrics.jsonl` and `events.jsonl` recorded: the loss of every step and the number of
workers.
Needs forge's environment and about two minutes on two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

FORGE = str(Path(sys.executable).with_name("forge"))
TARGET = Path(__file__).with_suffix(".svg")
JOB = Path(__file__).parents[2] / "jobs" / "pretrain.yaml"
SETTINGS = {
    "name": "preemption",
    "model.hidden_size": 128,
    "model.intermediate_size": 512,
    "model.num_hidden_layers": 2,
    "data.seq_len": 128,
    "training.total_steps": 320,
    "training.global_batch_size": 24,
    "checkpoint.snapshot_every": 1,
    "resources.workers": "2..3",
}
KILL_AT, GROW_AT, NOTICE_AT = 80, 150, 230
WIDTH, HEIGHT, LEFT, RIGHT, TOP = 860, 380, 64, 20, 34
LOSS_HEIGHT, WORKERS_TOP, WORKERS_HEIGHT = 210, 292, 48
INK, GRID, LOSS, WORKERS, LOST, ADDED = "#24292f", "#d8dee4", "#0969da", "#8250df", "#cf222e", "#1a7f37"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One thing that happened to the machines: at `second` of the run, drawn in `color`."""

    second: float
    text: str
    color: str


def main() -> None:
    """Train, disturb, draw."""
    with tempfile.TemporaryDirectory(prefix="forge-figure-") as name:
        folder = Path(name)
        environment = os.environ | {"FORGE_STATE": str(folder / "home")}

        def forge(*arguments: str) -> str:
            done = subprocess.run(
                [FORGE, *arguments], cwd=folder, env=environment, check=True, text=True, stdout=subprocess.PIPE
            )
            return done.stdout

        forge("cluster", "up", "--nodes", "3")
        try:
            settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
            forge("train", str(JOB), "--detach", *settings)
            run = next((folder / "runs").glob("preemption-*"))
            wait_for_step(run, KILL_AT)
            forge("chaos", "kill", "latest", "--node", "1")
            wait_for_step(run, GROW_AT)
            forge("cluster", "up", "--nodes", "3")
            wait_for_step(run, NOTICE_AT)
            forge("chaos", "notice", "latest", "--node", "2", "--seconds", "10")
            wait_for_step(run, int(SETTINGS["training.total_steps"]))
            TARGET.write_text(draw(steps=records(run / "metrics.jsonl"), events=records(run / "events.jsonl")))
        finally:
            forge("cluster", "down")
    print(TARGET)


def wait_for_step(run: Path, step: int, *, timeout_s: float = 600.0) -> None:
    """Raises: TimeoutError if the run does not record the step in time."""
    deadline = time.monotonic() + timeout_s
    while not any(record["step"] >= step for record in records(run / "metrics.jsonl")[-1:]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{run} has not reached step {step}; see {run / 'logs'}")
        time.sleep(0.05)


def records(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON Lines file that is still being written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def draw(*, steps: list[dict[str, Any]], events: list[dict[str, Any]]) -> str:
    """The figure as SVG: the loss above, the number of workers below, one dashed line for each change."""
    start, end = steps[0]["time"], steps[-1]["time"]
    losses = [record["train/loss"] for record in steps]
    low, high = min(losses), max(losses)

    def x(second: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * second / (end - start)

    def y(loss: float) -> float:
        return TOP + LOSS_HEIGHT * (high - loss) / (high - low)

    body = [*axes(seconds=end - start, low=low, high=high, x=x, y=y)]
    seconds = [x(record["time"] - start) for record in steps]
    body.append(polyline(list(zip(seconds, map(y, losses), strict=True)), color=LOSS, width=0.5))
    body.append(polyline(list(zip(seconds, map(y, moving_average(losses)), strict=True)), color=LOSS, width=2))
    body.append(polyline(list(worker_outline(steps, start=start, x=x)), color=WORKERS, width=2))
    for row, mark in enumerate(marks(events, start=start)):
        at = x(mark.second)
        body.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{WORKERS_TOP + WORKERS_HEIGHT}" '
            f'stroke="{mark.color}" stroke-dasharray="4 3"/>'
        )
        anchor, offset = ("start", 5) if at < WIDTH * 0.6 else ("end", -5)
        body.append(text(at + offset, TOP + 16 + 18 * (row % 4), mark.text, color=mark.color, anchor=anchor))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            'font-family="system-ui, sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
            *body,
            "</svg>\n",
        ]
    )


def marks(events: list[dict[str, Any]], *, start: float) -> Iterator[Mark]:
    """Each change of the membership after the first, with the pause until the next generation trained."""
    began: dict[str, Any] | None = None
    for event in events:
        if event["event"] == "MembershipChangeStarted":
            began = event
        elif event["event"] == "GenerationStarted" and began is not None:
            pause_s = event["time"] - began["time"] + (began["seconds_since_cause"] or 0.0)
            cause = {"loss": "machine killed", "growth": "machine added", "notice": "preemption notice"}
            name = cause.get(began["cause"], began["cause"])
            color = ADDED if began["cause"] == "growth" else LOST
            label = f"{name}: training again after {pause_s:.1f} s"
            yield Mark(second=began["time"] - start, text=label, color=color)
            began = None


def worker_outline(
    steps: list[dict[str, Any]], *, start: float, x: Callable[[float], float]
) -> Iterator[tuple[float, float]]:
    """Corners of the step function `workers(time)`."""
    before: float | None = None
    for record in steps:
        at = x(record["time"] - start)
        level = WORKERS_TOP + WORKERS_HEIGHT * (3 - record["elastic/world_size"]) / 3
        if before is not None and before != level:
            yield at, before
        yield at, level
        before = level


def axes(
    *, seconds: float, low: float, high: float, x: Callable[[float], float], y: Callable[[float], float]
) -> Iterator[str]:
    """Grid lines, tick labels and titles of both plots."""
    yield text(
        LEFT,
        20,
        "One run, one loss curve: training loss per step, while machines come and go (thick: mean of 12 steps)",
        weight=600,
    )
    for loss in range(int(low) + 1, int(high) + 1):
        yield line(LEFT, y(loss), WIDTH - RIGHT, y(loss))
        yield text(LEFT - 8, y(loss) + 4, str(loss), anchor="end")
    for count in range(4):
        level = WORKERS_TOP + WORKERS_HEIGHT * (3 - count) / 3
        yield line(LEFT, level, WIDTH - RIGHT, level)
        yield text(LEFT - 8, level + 4, str(count), anchor="end")
    yield text(LEFT, WORKERS_TOP - 12, "workers", color=WORKERS)
    interval = 10 if seconds < 120 else 30
    for second in range(0, int(seconds) + 1, interval):
        yield text(x(second), WORKERS_TOP + WORKERS_HEIGHT + 20, f"{second} s", anchor="middle")


def moving_average(values: list[float], *, window: int = 12) -> list[float]:
    """The mean of each value and up to `window - 1` before it."""
    return [fmean(values[max(0, index + 1 - window) : index + 1]) for index in range(len(values))]


def polyline(points: list[tuple[float, float]], *, color: str, width: float) -> str:
    """An open line through all points."""
    joined = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    return f'<polyline fill="none" stroke="{color}" stroke-width="{width}" points="{joined}"/>'


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """One grid line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{GRID}"/>'


def text(x: float, y: float, content: str, *, color: str = INK, anchor: str = "start", weight: int = 400) -> str:
    """One label."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(content)}</text>"
    )


if __name__ == "__main__":
    main()
