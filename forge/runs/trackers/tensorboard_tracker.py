"""TensorBoard: event files in the run's folder `tensorboard/`.

A step is one record, so that a kill leaves a step whole or absent. A resumed run adds a file to the folder;
TensorBoard shows all of them as one run. Only the record writer and the message types of the package `tensorboard`
are used, which import neither TensorFlow nor torch.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from forge.foreign import open_file
from forge.runs.trackers.base import EVENT_KEY, RunStatus, StepRanges, TrackedRow, TrackedRun

FOLDER = "tensorboard"
_PREFIX = "events.out.tfevents."
_LENGTH = struct.Struct("<Q")
_HEADER_BYTES, _FOOTER_BYTES = 12, 4
"""Of a record: its length with a checksum, and the checksum of its content. Source: TensorFlow, "TFRecord"."""
_MAX_RECORD_BYTES = 16 * 2**20
"""A record has the metrics of one step, or the job file."""
_CONFIG_KEY, _STATUS_KEY = "job", "status"


class TensorboardTracker:
    """Writes a run as TensorBoard's event files."""

    name: ClassVar[str] = "TensorBoard"
    max_rows: ClassVar[int] = 500
    pause_s: ClassVar[float] = 0.0

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._folder = run.folder / FOLDER
        self._writer: Any = None
        self._last_step = 0

    def start(self) -> StepRanges:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(exist_ok=True)
        known = StepRanges(step for path in sorted(self._folder.glob(f"{_PREFIX}*")) for step in _steps_in(path))
        is_new = not any(self._folder.iterdir())
        name = f"{_PREFIX}{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._writer = RecordWriter((self._folder / name).open("xb"))
        self._write(wall_time=time.time(), file_version="brain.Event:2")
        if is_new:
            config = json.dumps(self._run.config, indent=2)
            self._write_text(_CONFIG_KEY, f"```json\n{config}\n```", step=0, time_s=time.time())
        self._writer.flush()
        return known

    def send(self, rows: Sequence[TrackedRow]) -> None:
        for row in rows:
            values = [{"tag": key, "simple_value": value} for key, value in row.metrics.items()]
            self._write(step=row.step, wall_time=row.time, summary={"value": values})
            if row.events:
                self._write_text(EVENT_KEY, "\n\n".join(row.events), step=row.step, time_s=row.time)
            self._last_step = row.step
        self._writer.flush()

    def finish(self, status: RunStatus, events: Sequence[str]) -> None:
        text = "\n\n".join([*events, status])
        self._write_text(_STATUS_KEY, text, step=self._last_step, time_s=time.time())
        self.abandon()

    def abandon(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write_text(self, tag: str, text: str, *, step: int, time_s: float) -> None:
        """Write a text for TensorBoard's "Text" page."""
        from tensorboard.compat.proto import types_pb2

        tensor = {
            "dtype": types_pb2.DT_STRING,
            "string_val": [text.encode()],
            "tensor_shape": {"dim": [{"size": 1}]},
        }
        value = {"tag": tag, "metadata": {"plugin_data": {"plugin_name": "text"}}, "tensor": tensor}
        self._write(step=step, wall_time=time_s, summary={"value": [value]})

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto import event_pb2

        self._writer.write(event_pb2.Event(**fields).SerializeToString())


def _steps_in(path: Path) -> Iterator[int]:
    """Yield the steps of all complete records of metrics in an event file."""
    from tensorboard.compat.proto import event_pb2

    for content in _records_in(path):
        event = event_pb2.Event.FromString(content)
        if any(value.HasField("simple_value") for value in event.summary.value):
            yield event.step


def _records_in(path: Path) -> Iterator[bytes]:
    with os.fdopen(open_file(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while len(header := file.read(_HEADER_BYTES)) == _HEADER_BYTES:
            (length,) = _LENGTH.unpack_from(header)
            if file.tell() + length + _FOOTER_BYTES > size:
                return
            if length > _MAX_RECORD_BYTES:
                raise ValueError(
                    f"{path.name} has a record of {length} bytes; forge reads at most {_MAX_RECORD_BYTES}"
                )
            yield file.read(length)
            file.seek(_FOOTER_BYTES, os.SEEK_CUR)
