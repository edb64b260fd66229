"""Score the tasks of a job between two steps, on the ranks that train.

Every rank copies the whole weights into a model of its own, so that training sees nothing of it: the engine, its
hooks, its random numbers and its attention stay as they are. Rank 0 reads the run's examples and sends them; each
rank answers its part of the shards of `forge eval`, and rank 0 computes the values. A rank that is lost ends the
generation, as in any collective operation, and the next one repeats the step and its scores: no value is reported
twice. The answers are those that `forge eval` would get from the checkpoint of the step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from forge.config.evaluate import METRIC_PREFIX
from forge.config.load import load_task_text
from forge.errors import DataError, ForgeError
from forge.evaluate.bootstrap import point_values
from forge.evaluate.metrics.build import build_metrics
from forge.evaluate.shards import TaskShards
from forge.evaluate.stored_examples import stored_examples
from forge.evaluate.task import TaskExamples, build_task
from forge.evaluate.worker import ShardAnswerer
from forge.inference.loaded import LoadedModel, loaded_of_plan
from forge.model.families.base import BuildOptions, DataShape
from forge.model.families.registry import family_of
from forge.objective.registry import Direction
from forge.plan.plan import Plan
from forge.runs.scores import finite
from forge.train.task_scores import TaskScores

_T = TypeVar("_T")
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_WAIT_S = 0.02
_TICK_S = 1.0


class TrainingTasks:
    """The tasks of a job, whose examples are read when they are first scored."""

    def __init__(self, plan: Plan, *, device: torch.device, on_progress: Callable[[], None]) -> None:
        assert plan.job.evaluate is not None, "built for jobs with tasks"
        self._plan, self._spec = plan, plan.job.evaluate
        self._device, self._on_progress = device, on_progress
        self._shards: list[TaskShards] = []

    def is_due(self, step: int) -> bool:
        return self._spec.is_due(step)

    def is_scored(self, step: int, *, is_last: bool) -> bool:
        return self._spec.is_scored(step, is_last=is_last)

    def score(self, weights: Iterator[tuple[str, Tensor]], *, step: int) -> TaskScores:
        if not self._shards:
            data = self._on_rank_0(self._read)
            self._shards = [
                TaskShards(task=build_task(load_task_text(text, path=path)), data=one)
                for (path, text), one in zip(self._plan.tasks.items(), data, strict=True)
            ]
        with torch.random.fork_rng(devices=[]), self._ticking():
            loaded = self._loaded(weights, step=step)
        answers = self._answers(loaded)
        del loaded
        return self._on_rank_0(lambda: self._values(answers))

    def _read(self) -> list[TaskExamples]:
        if self._plan.task_examples is None:
            raise DataError("the plan has tasks but not their examples: it was not made by forge train or tune")
        found = stored_examples(self._plan.task_examples)
        if missing := self._plan.tasks.keys() - found:
            raise DataError(f"the stored examples of evaluate.tasks lack those of {', '.join(sorted(missing))}")
        return [found[path] for path in self._plan.tasks]

    def _loaded(self, weights: Iterator[tuple[str, Tensor]], *, step: int) -> LoadedModel:
        """Build the model and copy the weights into it; collective."""
        plan, training = self._plan, self._plan.job.training
        options = BuildOptions(
            dtype=_DTYPES[training.precision], device=self._device, seed=training.seed, skip_init=True
        )
        model = family_of(plan.job.model).build(plan.job.model, DataShape.of(plan), options=options).eval()
        held = dict([*model.named_parameters(), *model.named_buffers()])
        with torch.no_grad():
            for name, tensor in weights:
                held[name].copy_(tensor)
        model.requires_grad_(requires_grad=False)
        if isinstance(model, PreTrainedModel):  # sampling is decided by the task
            model.generation_config = GenerationConfig()
        model.register_forward_pre_hook(lambda module, arguments: self._on_progress())
        folder = Path(plan.corpus.folder) / "tokenizer"
        return loaded_of_plan(plan, model, tokenizer=folder, name=plan.job.name, step=step, digest="")

    def _answers(self, loaded: LoadedModel) -> list[list[Any]]:
        """The answers to the shards of each task, in their order; collective."""
        answer, rank, size = ShardAnswerer(loaded), dist.get_rank(), dist.get_world_size()
        asked = [inputs for shards in self._shards for inputs in shards.inputs()]
        own = {number: answer(asked[number], report=self._on_progress) for number in range(rank, len(asked), size)}
        found = {number: one for part in self._gathered(own) for number, one in part.items()}
        ordered = iter([found[number] for number in range(len(asked))])
        return [[next(ordered) for _ in range(shards.count)] for shards in self._shards]

    def _values(self, answers: list[list[Any]]) -> TaskScores:
        values: dict[str, float] = {}
        directions: dict[str, Direction] = {}
        for shards, results in zip(self._shards, answers, strict=True):
            spec, outputs = shards.task.spec, shards.scored(results)
            for metric in build_metrics(spec.metrics, examples=outputs, label_kind=spec.label_kind).values():
                for name, value in point_values(metric, outputs).items():
                    key = f"{METRIC_PREFIX}{spec.name}/{name}"
                    directions[key] = metric.directions[name]
                    if finite(value) is not None:
                        values[key] = value
        total = sum(len(shards.data.examples) for shards in self._shards)
        return TaskScores(values=values, directions=directions, num_examples=total)

    def _on_rank_0(self, work: Callable[[], _T]) -> _T:
        """Do a work on rank 0 and return its result on every rank; collective. Raises: what it raised."""
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                with self._ticking():
                    found = [work()]
            except ForgeError as error:
                found = [error]
        self._wait()
        dist.broadcast_object_list(found, src=0)
        if isinstance(found[0], ForgeError):
            raise found[0]
        result: _T = found[0]
        return result

    def _gathered(self, own: _T) -> list[_T]:
        found: list[Any] = [None] * dist.get_world_size()
        self._wait()
        dist.all_gather_object(found, own)
        return found

    def _wait(self) -> None:
        """Wait until every rank has come here, and say meanwhile that this one does not hang."""
        work = dist.all_reduce(torch.zeros(1, device=self._device), async_op=True)
        while not work.is_completed():
            self._on_progress()
            time.sleep(_WAIT_S)
        work.wait()

    @contextmanager
    def _ticking(self) -> Iterator[None]:
        """Report progress while something is done that cannot report it itself."""
        is_over = threading.Event()

        def tick() -> None:
            while not is_over.wait(_TICK_S):
                self._on_progress()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
