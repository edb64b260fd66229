"""The ways to save one training state that `benchmarks.checkpoint` compares, behind the same few calls."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

from benchmarks.peers.llama import CORPUS, deepspeed_engine
from forge.checkpoint.manifest import Progress
from forge.config.job import JobSpec
from forge.plan.curve import config_digest
from forge.train.async_checkpoint import AsyncCheckpointer, CheckpointWritten
from forge.train.engine import Engine


class Checkpointer(Protocol):
    """One way to save; every call is collective."""

    def save(self, step: int) -> None:
        """Begin a checkpoint after this step; its duration counts as stall."""

    def before_update(self) -> None:
        """Wait until the state may change; its duration counts as stall."""

    def complete(self) -> float:
        """Wait until the checkpoint is complete. Returns: seconds from `save` to then, on this rank."""


class ForgeCheckpointer:
    """forge's `AsyncCheckpointer`, called as its training loop calls it. Complete when
    it is written, flushed and committed."""

    def __init__(self, engine: Engine, *, spec: JobSpec, folder: Path) -> None:
        self._checkpointer = AsyncCheckpointer(engine.state, url=str(folder), keep=1)
        self._config_digest = config_digest(spec, code=None)

    def save(self, step: int) -> None:
        self._checkpointer.begin(
            Progress(step=step, num_tokens=step, config_digest=self._config_digest, corpus=CORPUS)
        )

    def before_update(self) -> None:
        self._checkpointer.settle()

    def complete(self) -> float:
        (outcome,) = self._checkpointer.finish()
        if not isinstance(outcome, CheckpointWritten):
            raise RuntimeError(outcome.reason)
        return outcome.seconds

    def close(self) -> None:
        """End the writer process."""
        self._checkpointer.close()


class DeepSpeedCheckpointer:
    """`engine.save_checkpoint`, which returns when all is written; it does not flush."""

    def __init__(self, engine: Engine, *, folder: Path, is_zipped: bool) -> None:
        """Args:
        is_zipped: DeepSpeed's default for `checkpoint: {checkpoint_serialization}`.
        """
        self._engine, self._folder, self._seconds = deepspeed_engine(engine), folder, 0.0
        # What DeepSpeed makes of that setting, without a second engine.
        self._writer = TorchCheckpointEngine()
        self._writer.zipfile_serialization = is_zipped

    def save(self, step: int) -> None:
        began = time.perf_counter()
        self._engine.checkpoint_engine = self._writer
        self._engine.save_checkpoint(str(self._folder), tag=tag_of(step))
        dist.barrier()
        self._seconds = time.perf_counter() - began

    def before_update(self) -> None:
        pass

    def complete(self) -> float:
        _keep_newest(self._folder)
        return self._seconds


class DcpCheckpointer:
    """torch's `async_save`, staged by a thread into memory that is kept for the next time; it flushes.

    The rank's flat fp32 vectors are saved as they are: fewer and larger tensors than any user has. The
    state is staged while the next forward and backward run, and awaited before the update, as forge does.
    """

    def __init__(self, engine: Engine, *, folder: Path, kind: AsyncCheckpointerType) -> None:
        optimizer = deepspeed_engine(engine).optimizer
        self._folder, self._kind, self._group = folder, kind, dist.new_group(backend="gloo")
        self._tensors: dict[str, Any] = {}
        for group, flat in enumerate(optimizer.single_partition_of_fp32_groups):
            moments = optimizer.optimizer.state[flat]
            for name, tensor in {"master": flat.detach(), **moments}.items():
                self._tensors[f"rank{dist.get_rank()}/{name}/{group}"] = tensor
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=kind is AsyncCheckpointerType.PROCESS,
                use_async_staging=True,
                use_non_blocking_copy=False,
            )
        )
        self._under_way: Any = None
        self._began = self._ended = 0.0

    def save(self, step: int) -> None:
        self._began = time.perf_counter()
        self._under_way = async_save(
            self._tensors,
            checkpoint_id=str(self._folder / tag_of(step)),
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
            process_group=self._group,
        )
        self._under_way.upload_completion.add_done_callback(self._note_end)

    def before_update(self) -> None:
        self._under_way.staging_completion.result()

    def complete(self) -> float:
        self._under_way.upload_completion.result()
        dist.barrier()
        _keep_newest(self._folder)
        return self._ended - self._began

    def _note_end(self, _: Any) -> None:
        self._ended = time.perf_counter()


def checkpointers_of(engine: Engine, *, spec: JobSpec, folder: Path) -> dict[str, Callable[[], Checkpointer]]:
    """Every contender by its name, not yet built."""
    return {
        "forge": lambda: ForgeCheckpointer(engine, spec=spec, folder=folder / "forge"),
        "deepspeed": lambda: DeepSpeedCheckpointer(engine, folder=folder / "deepspeed", is_zipped=True),
        "dcp process": lambda: DcpCheckpointer(engine, folder=folder / "dcp", kind=AsyncCheckpointerType.PROCESS),
        "deepspeed unzipped": lambda: DeepSpeedCheckpointer(engine, folder=folder / "unzipped", is_zipped=False),
        "dcp thread": lambda: DcpCheckpointer(
            engine, folder=folder / "dcp-thread", kind=AsyncCheckpointerType.THREAD
        ),
    }


def tag_of(step: int) -> str:
    """The peers' name of a step's checkpoint."""
    return f"step-{step:08d}"


def _keep_newest(folder: Path) -> None:
    """Remove all checkpoints but the last, as forge's writer process does."""
    if dist.get_rank() == 0:
        for old in sorted(path for path in folder.iterdir() if path.is_dir())[:-1]:
            shutil.rmtree(old)
