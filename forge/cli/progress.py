"""Progress of what comes before a run: preparing a corpus, starting or stopping a cluster."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from rich.console import Group
from rich.live import Live
from rich.text import Text

from forge.cli import display
from forge.cluster.base import NodeProgress
from forge.data.prepare import PrepareProgress
from forge.units import format_bytes, format_count, format_duration

_REFRESH_PER_S = 2


class ClusterScreen:
    """Progress on a cluster's machines: one live line per machine on a terminal, one line per update on a pipe."""

    def __init__(self) -> None:
        self._latest: dict[str, NodeProgress] = {}
        self._began = time.monotonic()
        self._lock = threading.Lock()  # called from one thread per machine
        self._live = Live(console=display.ERR, refresh_per_second=_REFRESH_PER_S * 2, get_renderable=self._lines)

    def __enter__(self) -> ClusterScreen:
        if display.ERR.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live.is_started:
            self._live.stop()

    def show(self, progress: NodeProgress) -> None:
        """Show the progress of one machine."""
        with self._lock:
            self._latest[progress.name] = progress
            if not self._live.is_started:
                display.message(f"{progress.name}: {'! ' if progress.is_failure else ''}{progress.message}")

    def _lines(self) -> Group:
        with self._lock:
            shown = list(self._latest.values())
        room = max(1, display.ERR.height - 2)
        lines = [
            Text(
                display.harmless(f"{progress.name:<16} {progress.message}"),
                style="yellow" if progress.is_failure else "",
                no_wrap=True,
                overflow="ellipsis",
            )
            for progress in shown[-room:]
        ]
        return Group(*lines, Text(f"… {format_duration(time.monotonic() - self._began)}", style="dim"))


@contextlib.contextmanager
def answers_kept() -> Iterator[None]:
    """Say at Ctrl-C that the same command goes on from what was answered."""
    try:
        yield
    except KeyboardInterrupt:
        display.message("stopped; what was answered is kept, and the same command goes on from there")
        raise


class ExportScreen:
    """Progress of an export, or of answers: one updating line on a terminal, nothing on a pipe."""

    def __enter__(self) -> ExportScreen:
        return self

    def show_answers(self, done: int, total: int) -> None:
        """Show how many prompts are answered."""
        self._write(f"{done:,} of {total:,} prompts answered …"[: display.ERR.width - 1])

    def __exit__(self, *_: object) -> None:
        self._write("")

    def show(self, done: int, total: int) -> None:
        """Show how many bytes are written."""
        self._write(f"{format_bytes(done)} of {format_bytes(total)} written …"[: display.ERR.width - 1])

    def _write(self, text: str) -> None:
        if display.ERR.is_terminal:
            sys.stderr.write(f"\r\033[K{text}")
            sys.stderr.flush()


class PrepareScreen:
    """Progress while a corpus is prepared: one updating line on a terminal, one line per phase on a pipe."""

    def __init__(self) -> None:
        self._phase = ""
        self._shown_at = 0.0

    def __enter__(self) -> PrepareScreen:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Remove the line, before something else is printed."""
        if self._phase and display.ERR.is_terminal:
            sys.stderr.write("\r\033[K")
            self._phase = ""

    def show(self, progress: PrepareProgress) -> None:
        """Show the current phase and how many documents are done."""
        now = time.monotonic()
        is_new = progress.phase != self._phase
        if not is_new and now - self._shown_at < 1 / _REFRESH_PER_S:
            return
        self._phase, self._shown_at = progress.phase, now
        text = _PREPARE_PHASES[progress.phase]
        if progress.phase == "tokens" and progress.num_documents:
            done = f"{progress.num_documents:,} documents, {format_count(progress.num_tokens)} tokens"
            text = f"{text}: {done}"
        elif progress.num_documents_in_all:
            text = f"{text}: {progress.num_documents:,} of {progress.num_documents_in_all:,} examples"
        if display.ERR.is_terminal:
            sys.stderr.write("\r\033[K" + f"{text} …"[: display.ERR.width - 1])
            sys.stderr.flush()
        elif is_new:
            display.message(text)


_PREPARE_PHASES = {
    "look": "looking at the corpus",
    "fingerprint": "reading the corpus",
    "waiting": "waiting for another process that is preparing the same corpus",
    "tokenizer": "training the tokenizer",
    "tokens": "tokenizing",
    "outputs": "asking the reference model or the teacher",
}
