"""The task file of `forge eval`: data, prompt, how the answer is read, and metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from forge.config.class_names import SourceName
from forge.config.classification import LabelKind
from forge.config.data import BadRecordAction, DataSpec
from forge.config.mixture import FileType
from forge.config.section import Count, FieldError, Number, Section, Strings, raise_errors
from forge.config.task_metrics import MetricsSpec, TaskKind

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?")
_MARKS = ("{{", "{%")


def is_template(text: str) -> bool:
    """Whether a text is a Jinja template; any other names a field."""
    return any(mark in text for mark in _MARKS)


class TaskDataSpec(Section):
    """The records of a task, as in the `data` section of a job."""

    held_out: bool = False
    """`true`: the held-out documents of the run that is evaluated. Give one of `held_out`, `source`, `files` and
    `dataset`."""

    source: SourceName | None = None
    """A built-in source, such as `python-stdlib`."""

    files: Strings | None = None
    """A glob or fsspec URL, or a list of them, with JSON lines, JSON arrays, CSV, Parquet or text."""

    dataset: str | None = Field(None, min_length=1)
    """A data set in the layout of the Hugging Face hub: a local folder, or `ORG/NAME`."""

    subset: str | None = Field(None, min_length=1)
    """The subset of `dataset`."""

    split: str = Field("test", min_length=1)
    """The split of `dataset` that is read."""

    revision: str | None = Field(None, pattern=r"^[\w./-]{1,200}$")
    """Branch, tag or commit of `dataset` on the hub."""

    file_type: FileType = "auto"
    """What `files` are, if their content does not say it."""

    text_key: str = Field("text", min_length=1)
    """What the field of a text file, which is one record, is called."""

    on_bad_record: BadRecordAction = "fail"
    """What happens if a record cannot be used: a field is missing, the answer is none of the choices. `skip`: it is
    left out, counted and listed."""

    @model_validator(mode="after")
    def _one_origin(self) -> TaskDataSpec:
        origins = [self.held_out or None, self.source, self.files, self.dataset]
        if sum(origin is not None for origin in origins) != 1:
            raise ValueError("give one of 'held_out: true', 'source', 'files' and 'dataset'")
        if not self.held_out:
            self.as_data()
        return self

    def as_data(self) -> DataSpec:
        """The same records as the `data` section of a job. Raises: FieldErrors of pydantic."""
        names = ("source", "files", "dataset", "file_type", "text_key", "on_bad_record")
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.dataset is not None:
            values |= {name: getattr(self, name) for name in ("subset", "split", "revision")}
        return DataSpec.model_validate({name: value for name, value in values.items() if value is not None})


class AnswerSpec(Section):
    """How the answer is read in what a model has written; a name such as `first-line`, or options."""

    read: Literal["whole", "first-line", "number", "label", "json", "regex"] = "whole"
    """`whole`: the text as it is. `first-line`: the first line that is not blank. `number`: a number as people
    write them (1,234.5). `label`: the one of `choices` that is written, as a word, whatever its case. `json`: a
    field of the first JSON object. `regex`: what a pattern finds."""

    pattern: str | None = Field(None, min_length=1, max_length=1000)
    """With `regex`: a regular expression of RE2, whose time is linear in the text: no back-references and no
    look-around. Its first group is the answer, or all of it without groups."""

    field: str | None = Field(None, min_length=1)
    """With `json`: the field; dots lead into objects."""

    which: Literal["first", "last"] | None = None
    """Which of several numbers, labels or matches is the answer; by default the first, of numbers the last, since
    models calculate before they answer."""

    unicode: Literal["none", "NFC", "NFKC"] = "none"
    """Normalisation of answers and targets before metrics compare them: `é` may be one character or two."""

    strip: bool = True
    """Whether blanks around an answer are removed."""

    @model_validator(mode="before")
    @classmethod
    def _of_name(cls, value: Any) -> Any:
        return {"read": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _has_options(self) -> AnswerSpec:
        errors = []
        for name, of in (("pattern", "regex"), ("field", "json")):
            if (getattr(self, name) is None) is (self.read == of):
                problem = f"is missing; read: {of} needs it" if self.read == of else f"is only for read: {of}"
                errors.append(FieldError(name, problem, depends_on=("read",)))
        if self.which is not None and self.read not in ("number", "label", "regex"):
            problem = f"is not for read: {self.read}, which finds one answer"
            errors.append(FieldError("which", problem, depends_on=("read",)))
        raise_errors(errors)
        return self


class FewShotSpec(Section):
    """Examples with their answers before the prompt, the same for every example of the task."""

    num: int = Field(0, ge=0, le=100)
    """How many, drawn at random."""

    data: TaskDataSpec | None = None
    """Where they are from; by default the task's own data, whose drawn records are then not scored."""

    separator: str = Field("\n\n", max_length=100)
    """What is between them."""

    seed: int = Field(1, ge=0, lt=2**63)
    """Of the draw."""


_MIN_TEMPERATURE = 1e-5
"""As `forge.inference.sampling.MIN_TEMPERATURE`."""


class SamplingSpec(Section):
    """How answers are written; only with `kind: generate`."""

    max_tokens: Count = Field(256, ge=1, le=2**20)
    """Most tokens of an answer."""

    temperature: Number = Field(0.0, ge=0, le=100)
    """0: greedy decoding, whose text does not depend on the batch size or the number of workers."""

    top_p: Number = Field(1.0, gt=0, le=1)
    """Tokens are drawn from the most probable ones that have this probability together."""

    top_k: int = Field(0, ge=0)
    """Tokens are drawn from this many most probable ones; 0: from all."""

    repetition_penalty: Number = Field(1.0, gt=0, le=100)
    """As transformers' `repetition_penalty`; 1: none."""

    stop: Strings = ()
    """Texts that end an answer, and are no part of it."""

    num_beams: int = Field(1, ge=1, le=64)
    """Beams of beam search; 1: none."""

    seed: int = Field(1, ge=0, lt=2**63)
    """Of draws; with the number of the example."""

    @model_validator(mode="after")
    def _fit(self) -> SamplingSpec:
        if self.num_beams > 1 and self.temperature > 0:
            raise FieldError("temperature", "must be 0 with beam search", depends_on=("num_beams",))
        for name, neutral in (("top_p", 1.0), ("top_k", 0)):
            if self.temperature == 0 and getattr(self, name) != neutral:
                problem = (
                    "changes nothing at temperature 0, where nothing is drawn; set temperature, or leave it out"
                )
                raise FieldError(name, problem, depends_on=("temperature",))
        if 0 < self.temperature < _MIN_TEMPERATURE:
            raise FieldError("temperature", f"must be 0, or {_MIN_TEMPERATURE} or more")
        if not all(self.stop):
            raise FieldError("stop", "must not have an empty text")
        return self


def _read_choices(value: Any) -> Any:
    if isinstance(value, list | tuple) and not all(isinstance(one, str) for one in value):
        raise ValueError("must be texts; put numbers in quotes")
    return tuple(value) if isinstance(value, list) else value


Choices = Annotated[
    str | tuple[str, ...] | None,
    BeforeValidator(_read_choices),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]


class TaskSpec(Section):
    """One task of `forge eval`: what a model is asked, and how its answers are scored."""

    name: str = Field(max_length=64, json_schema_extra={"pattern": f"^{_NAME.pattern}$"})
    """Lower-case letters, digits and dashes; its scores are called `NAME/METRIC`."""

    description: str = Field("", max_length=1000)
    """What the task measures, for the reader of a report."""

    kind: TaskKind
    """`generate`: the model writes an answer. `multiple-choice`: the most probable of some texts; of a reward
    model, that with the largest reward. `log-likelihood`: how probable a text is. `classify`: the label or number
    of a classifier. `embed`: which texts are nearest to a query."""

    data: TaskDataSpec
    """The records."""

    prompt: str = Field("", max_length=100_000)
    """A Jinja template over the fields of a record, `Question: {{ question }}\\nAnswer:`, in a sandbox; `record` is
    the whole record. Without `{{` it names a field, whose value is taken as it is: of `classify`, also a list of
    words. Only `log-likelihood` may leave it out."""

    text_pair: str | None = Field(None, min_length=1)
    """A second text for a classifier, as `prompt`."""

    target: str = Field(min_length=1)
    """What is right, as `prompt`: the answer, a list of answers of which any is right, a choice by its text or its
    number from 0, labels, a number; of `log-likelihood` the text; of `embed` the text or texts that belong to the
    prompt, or an object with the gain of each."""

    choices: Choices = None
    """With `multiple-choice`, the texts to choose from: the field with the list, or a list of templates. With
    `answer: label`, the labels. With `embed`, a field with more candidates than the targets of all records."""

    label_kind: LabelKind = "single"
    """What `classify` predicts, as `data.labels.kind` of the job that trained the model."""

    instruction: str = Field("", max_length=100_000)
    """Text before the prompt and its few-shot examples, the system message of `prompt_format: chat`."""

    prompt_format: Literal["plain", "chat"] = "plain"
    """`chat`: the prompt is the user's turn in the chat template of the model, and few-shot examples are earlier
    turns. A model without a template cannot be scored so."""

    separator: str = Field(" ", max_length=100)
    """What is between a prompt and its target or choice; only with `prompt_format: plain`, and not if the prompt is
    empty or ends with a blank."""

    few_shot: FewShotSpec = FewShotSpec()
    """Examples before the prompt."""

    sampling: SamplingSpec = SamplingSpec()
    """How answers are written."""

    answer: AnswerSpec = AnswerSpec()
    """How an answer is read."""

    metrics: MetricsSpec
    """What is computed."""

    limit: Count | None = Field(None, ge=1)
    """Most examples; if there are more, they are drawn at random with `seed`."""

    seed: int = Field(1, ge=0, lt=2**63)
    """Of the draw of examples and of the bootstrap."""

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("must have lower-case letters, digits and dashes only, and no dash at its ends")
        return name

    @field_validator("choices")
    @classmethod
    def _has_choices(cls, choices: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if choices is not None and (not choices or not all(choices)):
            raise FieldError("", "must be the name of a field, or a list of texts, none of them empty")
        if isinstance(choices, str) and is_template(choices):
            raise FieldError("", "must be a field's name or a list of templates, not one template")
        return choices

    @model_validator(mode="after")
    def _parts_fit(self) -> TaskSpec:
        raise_errors(list(self._problems()))
        return self

    def _problems(self) -> Iterator[FieldError]:
        kind = ("kind",)
        if not self.prompt and self.kind != "log-likelihood":
            yield FieldError("prompt", f"is missing; kind: {self.kind} needs one", depends_on=kind)
        is_label = self.answer.read == "label"
        if self.choices is None and (self.kind == "multiple-choice" or is_label):
            yield FieldError("choices", "is missing; give the texts to choose from", depends_on=kind)
        if self.choices is not None and not is_label and self.kind not in ("multiple-choice", "embed"):
            yield FieldError("choices", f"is not for kind: {self.kind} without answer: label", depends_on=kind)
        for key, default, kinds in _ONLY_FOR:
            if getattr(self, key) != default and self.kind not in kinds:
                yield FieldError(key, f"is only for kind: {' or '.join(kinds)}, not {self.kind}", depends_on=kind)
        for name, options in self.metrics.chosen.items():
            if self.kind not in options.kinds:
                problem = f"is only for kind: {' or '.join(options.kinds)}, not {self.kind}"
                yield FieldError(f"metrics.{name}", problem, depends_on=kind)
        yield from self._problems_of_labels()

    def _problems_of_labels(self) -> Iterator[FieldError]:
        chosen = set(self.metrics.chosen)
        numbers = {"mse", "r2", "pearson"}
        is_number = self.label_kind == "regression" if self.kind == "classify" else self.answer.read == "number"
        for name in sorted(chosen & numbers if not is_number else chosen - numbers - {"accuracy"}):
            if self.kind == "classify" or name in numbers:
                what = "only for" if name in numbers else "not for"
                yield FieldError(
                    f"metrics.{name}", f"is {what} numbers", depends_on=("kind", "label_kind", "answer")
                )
        if self.label_kind == "regression" and "accuracy" in chosen:
            yield FieldError("metrics.accuracy", "is not for numbers", depends_on=("label_kind",))
        if self.label_kind == "multi" and "matthews" in chosen:
            yield FieldError("metrics.matthews", "is not defined for several labels", depends_on=("label_kind",))


_ONLY_FOR: tuple[tuple[str, Any, tuple[TaskKind, ...]], ...] = (
    ("sampling", SamplingSpec(), ("generate",)),
    ("answer", AnswerSpec(), ("generate",)),
    ("text_pair", None, ("classify",)),
    ("label_kind", "single", ("classify",)),
    ("few_shot", FewShotSpec(), ("generate", "multiple-choice", "log-likelihood")),
    ("instruction", "", ("generate", "multiple-choice", "log-likelihood")),
    ("prompt_format", "plain", ("generate", "multiple-choice", "log-likelihood")),
)
"""Keys, their defaults, and the kinds of tasks that have them."""
