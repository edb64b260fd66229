"""The worker of `forge eval`: a model that answers the shards of tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from forge.data.conversations import Conversation
from forge.errors import ArgumentError
from forge.inference.answer import Answerer
from forge.inference.answer_request import AnswerConfig
from forge.inference.encode import classify, embed
from forge.inference.generate import generate
from forge.inference.loaded import LoadedModel, load
from forge.inference.pseudo import pseudo_log_likelihoods
from forge.inference.sampling import SamplingParams
from forge.inference.score import TextLogLikelihood, log_likelihoods, text_log_likelihoods
from forge.runs.run_files import find_run_files

Example = Mapping[str, Any]


class AnswerWorker(Answerer):
    """Answers prompts (`forge generate`) on machines that may not see the run folder.

    `config` has the fields of `AnswerConfig`, and `packed`: the small files of a run, or None.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        options = dict(config)
        source = find_run_files(Path(options.pop("source")), packed=options.pop("packed"))
        super().__init__(AnswerConfig(source=str(source), **options))


class ShardAnswerer:
    """Answers shards as `forge.evaluate.shards` makes them."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    def __call__(self, inputs: Mapping[str, Any], *, report: Callable[[], None]) -> list[Any]:
        examples: list[Example] = inputs["examples"]
        kind = inputs["kind"]
        if kind == "generate":
            return self._generate(examples, sampling=inputs["sampling"], report=report)
        if kind == "classify":
            return self._classify(examples)
        if kind == "embed":
            texts: Any = examples
            return [vector.tolist() for vector in embed(self._loaded, texts)]
        return self._score(examples, is_text=kind == "log-likelihood", shared=inputs.get("shared", ""))

    def _generate(
        self, examples: list[Example], *, sampling: Mapping[str, Any], report: Callable[[], None]
    ) -> list[Any]:
        params = SamplingParams(**{**sampling, "stop": tuple(sampling["stop"])})
        found: list[Any] = [None] * len(examples)
        for made in generate(self._loaded, [self._prompt(example) for example in examples], params):
            found[made.index] = {
                "text": made.text,
                "finish_reason": made.finish_reason,
                "num_tokens": made.completion_tokens,
                "num_cut": made.cut_tokens,
            }
            report()
        return found

    def _score(self, examples: list[Example], *, is_text: bool, shared: str) -> list[Any]:
        """`[log-likelihood, is greedy, tokens]` of each continuation of each example.

        Args:
            is_text: whether there is one continuation each, which is a whole text if nothing is before it.
            shared: what every prompt of the task begins with, which is computed once.
        """
        if self._loaded.kind == "reward":
            return [self._rewards(example) for example in examples]
        if self._loaded.kind == "masked-lm":
            return [[[one.total, None, one.num_tokens]] for one in self._masked(examples)]
        if is_text and not any(example["prompt"] or example.get("messages") for example in examples):
            texts = [example["continuations"][0] for example in examples]
            return [[[one.total, None, one.num_tokens]] for one in text_log_likelihoods(self._loaded, texts)]
        pairs = [
            (self._prompt(example), continuation)
            for example in examples
            for continuation in example["continuations"]
        ]
        scores = iter(log_likelihoods(self._loaded, pairs, shared=shared))
        return [
            [
                [score.total, score.is_greedy, score.num_tokens]
                for score in islice(scores, len(example["continuations"]))
            ]
            for example in examples
        ]

    def _masked(self, examples: list[Example]) -> list[TextLogLikelihood]:
        if any(example["prompt"] or example.get("messages") for example in examples):
            raise ArgumentError("a masked language model scores whole texts: leave out the prompt of the task")
        return pseudo_log_likelihoods(self._loaded, [example["continuations"][0] for example in examples])

    def _rewards(self, example: Example) -> list[Any]:
        texts = [example["prompt"] + continuation for continuation in example["continuations"]]
        return [[found.value, None, 1] for found in classify(self._loaded, texts)]

    def _classify(self, examples: list[Example]) -> list[Any]:
        texts: list[str | tuple[str, str]] = []
        for example in examples:
            text = " ".join(example["words"]) if example.get("words") else example["prompt"]
            texts.append((text, example["text_pair"]) if "text_pair" in example else text)
        return [
            {"label": found.label, "labels": list(found.labels), "value": found.value}
            for found in classify(self._loaded, texts)
        ]

    def _prompt(self, example: Example) -> str | list[int]:
        """A text, or the token ids of a conversation."""
        if example.get("messages"):
            return self._loaded.encode_chat(Conversation(messages=tuple(example["messages"])))
        prompt: str = example["prompt"]
        return prompt


class EvaluationWorker(ShardAnswerer):
    """The same with a model that it loads.

    `config` has the arguments of `load`, and `packed`: the small files of a run, or None.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        options = dict(config)
        source = find_run_files(Path(options.pop("source")), packed=options.pop("packed"))
        super().__init__(load(source, **options))
