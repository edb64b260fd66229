"""Divide the examples of a task into shards, and read what models answered.

A shard has a fixed number of examples, whatever the number of workers. It says what a model is asked, and nothing
of what is right or how answers are scored: a task with other metrics uses the answers that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.evaluate.metrics.base import ScoredExample
from forge.evaluate.metrics.ranking import ranks_of
from forge.evaluate.task import Task, TaskExample, TaskExamples

_SIZES = {"generate": 32, "multiple-choice": 32, "log-likelihood": 32, "classify": 128, "embed": 128}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskShards:
    """What models are asked in one task."""

    task: Task
    data: TaskExamples

    def inputs(self) -> Iterator[dict[str, Any]]:
        """The inputs of each shard, as JSON values."""
        spec = self.task.spec
        asked: dict[str, Any] = {"kind": spec.kind}
        if spec.kind == "generate":
            asked |= {"sampling": spec.sampling.model_dump(mode="json")}
        elif self.data.examples and self.data.examples[0].shared:
            asked |= {"shared": self.data.examples[0].shared}
        items = self._texts if spec.kind == "embed" else [_asked(one, kind=spec.kind) for one in self.data.examples]
        size = _SIZES[spec.kind]
        for start in range(0, len(items), size):
            yield {**asked, "examples": items[start : start + size]}

    @property
    def count(self) -> int:
        """Number of shards."""
        items = self._texts if self.task.spec.kind == "embed" else self.data.examples
        return -(-len(items) // _SIZES[self.task.spec.kind])

    def scored(self, results: Sequence[Any]) -> list[ScoredExample]:
        """What was answered and what was expected, example by example.

        Args:
            results: of each shard, in their order.
        """
        answers = [answer for result in results for answer in result]
        if self.task.spec.kind == "embed":
            return list(self._ranked(dict(zip(self._texts, answers, strict=True))))
        readers: dict[str, Callable[[TaskExample, Any], ScoredExample]] = {
            "generate": self._written,
            "multiple-choice": _chosen,
            "log-likelihood": _likelihood,
            "classify": self._labelled,
        }
        read = readers[self.task.spec.kind]
        return [read(example, answer) for example, answer in zip(self.data.examples, answers, strict=True)]

    @property
    def _texts(self) -> list[str]:
        """Of `embed`: every text that needs a vector."""
        queries = [example.prompt for example in self.data.examples]
        return list(dict.fromkeys([*queries, *self.data.candidates]))

    def _ranked(self, vectors: Mapping[str, Any]) -> Iterator[ScoredExample]:
        candidates = self.data.candidates
        numbers = {text: number for number, text in enumerate(candidates)}
        matrix = np.array([vectors[text] for text in candidates], dtype=np.float32)
        for example in self.data.examples:
            targets = example.target if isinstance(example.target, tuple) else (str(example.target),)
            similarities: NDArray[np.float32] = (matrix * np.float32(vectors[example.prompt])).sum(axis=1)
            ranks = ranks_of(similarities, relevant=[numbers[str(text)] for text in targets])
            yield ScoredExample(ranks=ranks, gains=example.gains)

    def _written(self, example: TaskExample, answer: Mapping[str, Any]) -> ScoredExample:
        return ScoredExample(prediction=self.task.read(answer["text"]), target=example.target)

    def _labelled(self, example: TaskExample, answer: Mapping[str, Any]) -> ScoredExample:
        kind = self.task.spec.label_kind
        prediction = answer["value"] if kind == "regression" else answer["label"]
        if kind in ("multi", "token"):
            prediction = tuple(answer["labels"])
        return ScoredExample(prediction=prediction, target=example.target)


def _asked(example: TaskExample, *, kind: str) -> dict[str, Any]:
    """What a model needs of an example; nothing that is empty."""
    found: dict[str, Any] = {
        "prompt": "" if example.messages else example.prompt,
        "messages": [dict(message) for message in example.messages],
        "words": list(example.words),
        "text_pair": example.text_pair,
    }
    if kind in ("multiple-choice", "log-likelihood"):
        found["continuations"] = list(example.continuations)
    return {key: value for key, value in found.items() if value or key == "prompt"}


def _chosen(example: TaskExample, answer: Sequence[Any]) -> ScoredExample:
    totals = tuple(float(total) for total, _, _ in answer)
    return ScoredExample(
        prediction=example.choices[max(range(len(totals)), key=totals.__getitem__)],
        target=example.target,
        choices=example.choices,
        log_likelihoods=totals,
        num_tokens=tuple(int(count) for _, _, count in answer),
    )


def _likelihood(example: TaskExample, answer: Sequence[Any]) -> ScoredExample:
    total, is_greedy, count = answer[0]
    return ScoredExample(
        target=example.target,
        choices=example.choices,
        log_likelihoods=(float(total),),
        num_tokens=(int(count),),
        is_greedy=is_greedy,
    )
