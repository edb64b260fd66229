"""The examples of a task: records with their prompts, targets and few-shot examples.

The same file, data and seed give the same examples in the same order on every machine. Memory grows with the number
of examples that are scored, not with that of the records.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from forge.config.load import LoadedTask
from forge.config.task import TaskDataSpec, TaskSpec, is_template
from forge.data.bad_records import BadRecords
from forge.data.sources.base import Record
from forge.data.sources.build import build_source
from forge.environment import expand_home
from forge.errors import ArgumentError, DataError
from forge.evaluate.answers import Reader, build_reader, normalized
from forge.evaluate.metrics.base import Answer
from forge.evaluate.prompt import Expression, build_expression
from forge.units import counted

Message = Mapping[str, str]
HELD_OUT_PROBLEM = (
    "means the records that a run held out, which is not known of a folder of weights; name files in the task "
    "(data.files), or evaluate the run"
)
HeldOut = Callable[[], Iterable[Record]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskExample:
    """One question to a model, and what is right."""

    id: str
    """The name of its record, `test.jsonl:17`; with a number if several have that name."""
    question: str = ""
    """The prompt alone."""
    prompt: str = ""
    """With the instruction and the few-shot examples; of `classify` and `embed` the text alone."""
    shared: str = ""
    """What the prompts of all examples of the task begin with: the instruction and the few-shot examples."""
    messages: tuple[Message, ...] = ()
    """The same as turns, with `prompt_format: chat`; the last is the user's."""
    words: tuple[str, ...] = ()
    """Of `classify`, if the prompt is a list of words."""
    text_pair: str | None = None
    separator: str = ""
    """What is between the prompt and a continuation."""
    choices: tuple[str, ...] = ()
    """Texts to choose from; of `log-likelihood` the text, alone; of `embed` more candidates."""
    target: Answer = None
    gains: tuple[float, ...] = ()
    """Of `embed`: how relevant each of the targets is; 1 each if it is empty."""

    @property
    def continuations(self) -> tuple[str, ...]:
        """What is scored after the prompt."""
        return tuple(f"{self.separator}{choice}" for choice in self.choices)

    @property
    def own_texts(self) -> tuple[str, ...]:
        """What the example asks, without few-shot examples, and what is right."""
        asked = self.question or " ".join(self.words)
        return (asked, self.text_pair or "", *(_texts(self.target) if self.target is not None else ()))

    @property
    def digest(self) -> str:
        """Digest of what the model is asked, 32 hex digits."""
        asked = [self.prompt, list(self.messages), self.words, self.text_pair, self.continuations]
        text = json.dumps(asked, sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task whose templates and patterns were found to be valid."""

    spec: TaskSpec
    read: Reader
    _prompt: Expression = field(repr=False)
    _target: Expression = field(repr=False)
    _text_pair: Expression | None = field(repr=False)
    _choices: Expression | tuple[Expression, ...] | None = field(repr=False)

    def examples(self, *, held_out: HeldOut | None = None) -> TaskExamples:
        """Read the data of the task.

        Args:
            held_out: gives the held-out records of the run, for `data.held_out`.

        Raises: DataError for data that cannot be read, and records that cannot be used; ArgumentError for
            `data.held_out` without a run.
        """
        return _read_examples(self, held_out=held_out)

    def example_of(self, record: Record) -> TaskExample:
        """The example of one record, without few-shot examples. Raises: DataError if it cannot be used."""
        asked = self._prompt(record)
        words = _strings(asked, record=record, key="prompt") if isinstance(asked, list) else ()
        if words and not (self.spec.kind == "classify" and self.spec.label_kind == "token"):
            raise DataError(f"{record.location}: the prompt is a list; only tags of words have one")
        question = "" if words else _text(asked, record=record, key="prompt")
        pair, choices = self._text_pair, self._choices_of(record)
        target, gains = self._target_of(record, choices=choices)
        if self.spec.kind == "log-likelihood":
            choices = (str(target),)
        return TaskExample(
            id=record.name,
            question=question,
            prompt=question,
            words=words,
            text_pair=None if pair is None else _text(pair(record), record=record, key="text_pair"),
            choices=choices,
            target=target,
            gains=gains,
        )

    def _choices_of(self, record: Record) -> tuple[str, ...]:
        if self._choices is None or self.spec.kind == "generate":
            return ()
        if isinstance(self._choices, tuple):
            return tuple(_text(choice(record), record=record, key="choices") for choice in self._choices)
        return _strings(self._choices(record), record=record, key="choices")

    def _target_of(self, record: Record, *, choices: tuple[str, ...]) -> tuple[Answer, tuple[float, ...]]:
        given, spec = self._target(record), self.spec
        if spec.kind == "multiple-choice":
            return _choice(given, choices=choices, record=record), ()
        if spec.kind == "embed":
            return _relevant(given, record=record)
        if spec.kind == "classify":
            return _label(given, kind=spec.label_kind, record=record), ()
        if spec.kind == "generate" and isinstance(given, list):
            references = _strings(given, record=record, key="target")
            return tuple(self._normal(one, record=record) for one in references), ()
        text = _text(given, record=record, key="target")
        if spec.kind == "log-likelihood":
            if not text:
                raise DataError(f"{record.location}: the target is empty")
            return text, ()
        return self._normal(text, record=record), ()

    def _normal(self, text: str, *, record: Record) -> str:
        """A target as answers are read."""
        text = normalized(text, spec=self.spec.answer)
        if self.spec.answer.read == "label":
            choices = self.spec.choices or ()
            label = next((choice for choice in choices if choice.casefold() == text.casefold()), None)
            if label is None:
                raise DataError(f"{record.location}: the target {text!r:.60} is none of the choices")
            return label
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskExamples:
    """The examples of a task, in the order of its records, and what was read."""

    examples: tuple[TaskExample, ...]
    num_records: int
    """Records that could be used; some are no examples if there is a `limit` or few-shot examples are of them."""
    num_skipped: int
    skipped: tuple[str, ...]
    """`FILE:LINE: what is wrong`, of the first ones."""

    @property
    def candidates(self) -> tuple[str, ...]:
        """Of `embed`: all texts that are searched, each once: the targets of all examples, then more candidates."""
        targets = (text for example in self.examples for text in _texts(example.target))
        more = (text for example in self.examples for text in example.choices)
        return tuple(dict.fromkeys([*targets, *more]))


def build_task(loaded: LoadedTask) -> Task:
    """Check the templates and the pattern of a task file.

    Raises: JobFileError with the line of the key.
    """
    spec = loaded.task

    def built(text: str, *, key: str) -> Expression:
        try:
            return build_expression(text, key=key)
        except ArgumentError as error:
            raise loaded.source.error(key, str(error), show_value=False) from None

    choices = spec.choices
    try:
        read = build_reader(spec.answer, choices=choices if isinstance(choices, tuple) else ())
    except ArgumentError as error:
        raise loaded.source.error("answer.pattern", str(error)) from None
    if spec.answer.read == "label" and not isinstance(choices, tuple):
        raise loaded.source.error("choices", "must be a list of labels with answer: label")
    of_list: Expression | tuple[Expression, ...] | None = None
    if isinstance(choices, tuple):
        of_list = tuple(_choice_expression(one, built=built, at=at) for at, one in enumerate(choices))
    elif choices is not None:
        of_list = built(choices, key="choices")
    return Task(
        spec=spec,
        read=read,
        _prompt=built(spec.prompt, key="prompt") if spec.prompt else lambda record: "",
        _target=built(spec.target, key="target"),
        _text_pair=None if spec.text_pair is None else built(spec.text_pair, key="text_pair"),
        _choices=of_list,
    )


def _choice_expression(text: str, *, built: Callable[..., Expression], at: int) -> Expression:
    """A choice of a list, which is a text as it is unless it is a template."""
    return built(text, key=f"choices[{at}]") if is_template(text) else lambda record: text


def task_records(data: TaskDataSpec, *, held_out: HeldOut | None) -> Iterable[Record]:
    """The records of a task.

    Raises: ArgumentError for held-out records without a run; DataError as the source.
    """
    if data.held_out:
        if held_out is None:
            raise ArgumentError(f"data.held_out: true {HELD_OUT_PROBLEM}")
        return held_out()
    spec = data.as_data()
    files = None if spec.files is None else tuple(map(_expanded, spec.files))
    dataset = None if spec.dataset is None else _expanded(spec.dataset)
    return build_source(spec.model_copy(update={"files": files, "dataset": dataset})).records()


def first_example(task: Task) -> TaskExample | None:
    """Read the first example of a task that has data of its own; None if it is left out as a bad record.

    Raises: DataError for data that cannot be found, or a record that is no example of the task.
    """
    bad = BadRecords(action=task.spec.data.on_bad_record)
    records = task_records(task.spec.data, held_out=None)
    found = next(_usable(task, islice(records, 1), bad=bad, count=Counter()), None)
    bad.close()
    return found[1] if found is not None else None


def _expanded(path: str) -> str:
    return path if "://" in path or "::" in path else expand_home(path)


def _read_examples(task: Task, *, held_out: HeldOut | None) -> TaskExamples:
    spec, shots = task.spec, task.spec.few_shot
    own_shots = shots.num if shots.data is None else 0
    bad = BadRecords(action=spec.data.on_bad_record)
    count = Counter[str]()
    usable = _usable(task, task_records(spec.data, held_out=held_out), bad=bad, count=count)
    most = None if spec.limit is None else spec.limit + own_shots
    chosen = _drawn(usable, most=most, seed=spec.seed)
    bad.close()
    if shots.data is not None:
        other = BadRecords(action=shots.data.on_bad_record)
        records = task_records(shots.data, held_out=held_out)
        drawn = _drawn(_usable(task, records, bad=other, count=Counter()), most=shots.num, seed=shots.seed)
        other.close()
    else:
        drawn = sorted(_drawn(iter(chosen), most=shots.num, seed=shots.seed))
        taken = {number for number, _ in drawn}
        chosen = [(number, example) for number, example in chosen if number not in taken]
    if len(drawn) < shots.num:
        raise DataError(f"few_shot.num is {shots.num}, more than the {counted(len(drawn), 'record')} to take from")
    if not chosen:
        raise DataError("there are no examples: none of the records can be used")
    examples = [_with_shots(example, task=spec, shots=[shot for _, shot in drawn]) for _, example in chosen]
    return TaskExamples(
        examples=tuple(_with_unique_ids(examples)),
        num_records=count["usable"],
        num_skipped=bad.count,
        skipped=tuple(bad.listed),
    )


def _usable(
    task: Task, records: Iterable[Record], *, bad: BadRecords, count: Counter[str]
) -> Iterator[tuple[int, TaskExample]]:
    for record in bad.usable(records):
        try:
            example = task.example_of(record)
        except DataError as error:
            bad.add(str(error))
            continue
        yield count["usable"], example
        count["usable"] += 1


def _drawn(
    examples: Iterator[tuple[int, TaskExample]], *, most: int | None, seed: int
) -> list[tuple[int, TaskExample]]:
    """At most so many examples, drawn by the hash of their numbers, in their order. Memory is that of the drawn."""
    if most is None:
        return list(examples)
    key = seed.to_bytes(8, "little")

    def draw(numbered: tuple[int, TaskExample]) -> bytes:
        return hashlib.blake2b(numbered[0].to_bytes(8, "little"), digest_size=16, key=key).digest()

    return sorted(heapq.nsmallest(most, examples, key=draw), key=lambda numbered: numbered[0])


def _with_shots(example: TaskExample, *, task: TaskSpec, shots: Sequence[TaskExample]) -> TaskExample:
    """Put the instruction and the few-shot examples before the prompt of an example."""
    if task.kind in ("classify", "embed"):
        return example
    if task.prompt_format == "chat":
        turns = [{"role": "system", "content": task.instruction}] if task.instruction else []
        for shot in shots:
            turns.append({"role": "user", "content": shot.prompt})
            turns.append({"role": "assistant", "content": _texts(shot.target)[0]})
        return replace(example, messages=(*turns, {"role": "user", "content": example.prompt}))
    parts = [task.instruction] if task.instruction else []
    parts += [shot.prompt + _separator(shot.prompt, task=task) + _texts(shot.target)[0] for shot in shots]
    shared = "".join(part + task.few_shot.separator for part in parts)
    prompt = shared + example.prompt
    return replace(example, prompt=prompt, shared=shared, separator=_separator(prompt, task=task))


def _separator(prompt: str, *, task: TaskSpec) -> str:
    return "" if not prompt or prompt[-1].isspace() else task.separator


def _with_unique_ids(examples: Sequence[TaskExample]) -> Iterator[TaskExample]:
    """Files of the same name in several folders, and pieces of a long text, get numbers."""
    often = Counter(example.id for example in examples)
    seen = Counter[str]()
    for example in examples:
        seen[example.id] += 1
        yield replace(example, id=f"{example.id}#{seen[example.id]}") if often[example.id] > 1 else example


def _texts(target: Answer) -> tuple[str, ...]:
    return tuple(str(one) for one in (target if isinstance(target, tuple) else (target,)))


def _text(value: Any, *, record: Record, key: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{record.location}: '{key}' is {value}, which is neither a text nor a number of JSON")
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise DataError(f"{record.location}: '{key}' must be a text, not {type(value).__name__}")


def _strings(value: Any, *, record: Record, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{record.location}: '{key}' must be a list of texts that is not empty")
    return tuple(_text(one, record=record, key=key) for one in value)


def _choice(given: Any, *, choices: tuple[str, ...], record: Record) -> str:
    """The right choice, by its text or its number."""
    twice = next((choice for at, choice in enumerate(choices) if choice in choices[:at]), None)
    if twice is not None:
        raise DataError(f"{record.location}: the choices have {twice!r:.60} twice")
    if isinstance(given, str) and given in choices:
        return given
    number = int(given) if isinstance(given, bool | int) or (isinstance(given, str) and given.isdecimal()) else -1
    if not 0 <= number < len(choices):
        raise DataError(f"{record.location}: the target {given!r:.60} is none of the {len(choices)} choices")
    return choices[number]


def _relevant(given: Any, *, record: Record) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The texts that belong to a query, and their gains."""
    if not isinstance(given, Mapping):
        values = given if isinstance(given, list) else [given]
        return tuple(dict.fromkeys(_strings(values, record=record, key="target"))), ()
    gains = tuple(given.values())
    if not gains or not all(isinstance(gain, int | float) and 0 < gain < 1e9 for gain in gains):
        raise DataError(f"{record.location}: the gains of 'target' must be numbers above 0")
    return tuple(map(str, given)), tuple(map(float, gains))


def _label(given: Any, *, kind: str, record: Record) -> Answer:
    """The label or labels, named as in training."""
    if kind == "regression":
        if isinstance(given, bool) or not isinstance(given, int | float) or not abs(given) < math.inf:
            raise DataError(f"{record.location}: the target must be a finite number, not {given!r:.60}")
        return float(given)
    if kind == "single":
        return _text(given, record=record, key="target")
    if not isinstance(given, list):
        raise DataError(f"{record.location}: the target must be a list of labels, not {given!r:.60}")
    if kind == "token":
        return tuple(None if one is None else _text(one, record=record, key="target") for one in given)
    return tuple(_text(one, record=record, key="target") for one in given)
