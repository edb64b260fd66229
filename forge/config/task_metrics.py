"""`metrics:` of a task file: what is computed of the outputs of a model, and how."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from forge.config.section import FieldError, Section

TaskKind = Literal["generate", "multiple-choice", "log-likelihood", "classify", "embed"]

_LABELS: tuple[TaskKind, ...] = ("generate", "multiple-choice", "classify")


class MetricOptions(Section):
    """A metric without options."""

    kinds: ClassVar[tuple[TaskKind, ...]] = _LABELS
    """The kinds of tasks that the metric can be computed of."""


def _read_averages(value: Any) -> Any:
    values = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
    known = ("macro", "micro", "weighted")
    if not isinstance(values, tuple) or not values or not set(values) <= set(known):
        raise ValueError(f"must be one or several of {', '.join(known)}")
    return values


Averages = Annotated[
    tuple[str, ...],
    BeforeValidator(_read_averages),
    WithJsonSchema({"type": ["string", "array"], "items": {"enum": ["macro", "micro", "weighted"]}}),
]


def _read_ranks(value: Any) -> Any:
    values = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else value
    is_list = isinstance(values, tuple) and values
    if not is_list or not all(type(one) is int and 0 < one <= 1_000_000 for one in values):
        raise ValueError("must be one or several whole numbers from 1 to 1,000,000")
    return values


Ranks = Annotated[
    tuple[int, ...],
    BeforeValidator(_read_ranks),
    WithJsonSchema({"type": ["integer", "array"], "items": {"type": "integer", "minimum": 1}}),
]


class ByClassOptions(MetricOptions):
    """Averages over the classes."""

    average: Averages = ("macro",)
    """`macro`: the mean over the classes that occur or are predicted. `micro`: of all their counts together.
    `weighted`: the mean weighted by how often a class occurs. As scikit-learn's `average`."""

    per_class: bool = False
    """Whether the score of each class is reported as well, as `f1/CLASS`."""


class NormalizedAccuracyOptions(MetricOptions):
    """Accuracy of the choice with the largest log-likelihood per unit of its length."""

    kinds: ClassVar[tuple[TaskKind, ...]] = ("multiple-choice",)

    by: Literal["characters", "bytes", "tokens"] = "characters"
    """The unit. `characters` is `acc_norm` of lm-eval."""


class BleuOptions(MetricOptions):
    """BLEU-4 of a corpus, by sacrebleu, from 0 to 100."""

    kinds: ClassVar[tuple[TaskKind, ...]] = ("generate",)

    tokenize: Literal["13a", "intl", "char", "zh", "none"] = "13a"
    """The tokenizer of sacrebleu: `zh` for Chinese, `char` for Japanese and other languages without blanks."""

    lowercase: bool = False
    """Whether upper and lower case are the same."""

    smooth: Literal["exp", "floor", "add-k", "none"] = "exp"
    """Smoothing of n-grams without a match."""


class ChrfOptions(MetricOptions):
    """chrF, the F-score of character n-grams, by sacrebleu, from 0 to 100."""

    kinds: ClassVar[tuple[TaskKind, ...]] = ("generate",)

    word_order: int = Field(0, ge=0, le=4)
    """Longest n-grams of words; 2 is chrF++."""

    lowercase: bool = False
    """Whether upper and lower case are the same."""


class RougeOptions(MetricOptions):
    """ROUGE-1, ROUGE-2 and ROUGE-L: mean F-scores over the examples, from 0 to 1."""

    kinds: ClassVar[tuple[TaskKind, ...]] = ("generate",)

    stem: bool = False
    """Whether English words are compared by their stems (Porter)."""

    tokenize: Literal["rouge-score", "words"] = "rouge-score"
    """`rouge-score`: that package's tokenizer, whose tokens are runs of a to z and 0 to 9: all other letters are
    dropped. `words`: runs of letters and digits of any script, one for each character of Chinese and Japanese."""

    @model_validator(mode="after")
    def _stems_english(self) -> RougeOptions:
        if self.stem and self.tokenize != "rouge-score":
            raise FieldError("stem", "is only for tokenize: rouge-score", depends_on=("tokenize",))
        return self


class TextMatchOptions(MetricOptions):
    """Comparison of a short answer with the expected ones."""

    kinds: ClassVar[tuple[TaskKind, ...]] = ("generate",)

    normalize: Literal["squad", "none"] = "squad"
    """`squad`: lower case, without punctuation and the articles a, an and the. `none`: as it is."""


class WordErrorOptions(MetricOptions):
    """Edit distance by the length of the reference, as jiwer: of words or characters."""

    kinds: ClassVar[tuple[TaskKind, ...]] = ("generate",)

    lowercase: bool = False
    """Whether upper and lower case are the same."""

    punctuation: Literal["keep", "remove"] = "keep"
    """`remove`: characters that Unicode calls punctuation are removed before the comparison."""


class PerplexityOptions(MetricOptions):
    """The exponential of the mean negative log-likelihood."""

    kinds: ClassVar[tuple[TaskKind, ...]] = ("log-likelihood",)

    unit: Literal["token", "word", "byte"] = "token"
    """What the mean is taken over. Only `word` and `byte` can be compared between tokenizers."""


class LikelihoodOptions(MetricOptions):
    """A metric of log-likelihoods, without options."""

    kinds: ClassVar[tuple[TaskKind, ...]] = ("log-likelihood",)


class NumberOptions(MetricOptions):
    """A metric of numbers, without options."""

    kinds: ClassVar[tuple[TaskKind, ...]] = ("generate", "classify")


class MrrOptions(MetricOptions):
    """Mean reciprocal rank of the first text that belongs to a query."""

    kinds: ClassVar[tuple[TaskKind, ...]] = ("embed",)

    k: Ranks = (1_000_000,)
    """Ranks beyond this one count 0."""


class RankingOptions(MetricOptions):
    """A metric of the first k texts that are found for a query."""

    kinds: ClassVar[tuple[TaskKind, ...]] = ("embed",)

    k: Ranks = (1, 10)
    """One or several k."""


LOWER_IS_BETTER = frozenset({"wer", "cer", "perplexity", "bits_per_byte", "mse"})
"""The metrics of which less is better; of the others more is."""


class MetricsSpec(Section):
    """The metrics of a task: a list of names, or a mapping from names to options."""

    accuracy: MetricOptions | None = None
    """The share of right answers; of several labels that of the examples where all are right; of tags, of words."""

    normalized_accuracy: NormalizedAccuracyOptions | None = None
    """Accuracy of the choice with the largest log-likelihood per character, byte or token."""

    precision: ByClassOptions | None = None
    """Of the examples predicted to be of a class, the share that is."""

    recall: ByClassOptions | None = None
    """Of the examples of a class, the share that is predicted to be."""

    f1: ByClassOptions | None = None
    """The harmonic mean of precision and recall."""

    matthews: MetricOptions | None = None
    """Matthews' correlation coefficient, from -1 to 1, of two or more classes."""

    exact_match: TextMatchOptions | None = None
    """The share of answers that are equal to one of the references."""

    token_f1: TextMatchOptions | None = None
    """The F1 score of the words of answer and reference, for question answering (SQuAD)."""

    bleu: BleuOptions | None = None
    """BLEU-4, with sacrebleu's signature."""

    chrf: ChrfOptions | None = None
    """chrF, with sacrebleu's signature."""

    rouge: RougeOptions | None = None
    """ROUGE-1, ROUGE-2 and ROUGE-L."""

    wer: WordErrorOptions | None = None
    """Word error rate."""

    cer: WordErrorOptions | None = None
    """Character error rate."""

    perplexity: PerplexityOptions | None = None
    """Perplexity by token, word or byte."""

    bits_per_byte: LikelihoodOptions | None = None
    """Negative log-likelihood in bits by the bytes of the text in UTF-8; the same for every tokenizer."""

    greedy_accuracy: LikelihoodOptions | None = None
    """The share of targets that greedy decoding would write."""

    mse: NumberOptions | None = None
    """Mean squared error."""

    r2: NumberOptions | None = None
    """Coefficient of determination."""

    pearson: NumberOptions | None = None
    """Pearson's correlation coefficient."""

    mrr: MrrOptions | None = None
    """Mean reciprocal rank."""

    recall_at_k: RankingOptions | None = None
    """Of the texts that belong to a query, the share found in the first k."""

    ndcg: RankingOptions | None = None
    """Normalised discounted cumulative gain of the first k."""

    @model_validator(mode="before")
    @classmethod
    def _of_names(cls, values: Any) -> Any:
        """Read a name or a list of names, and names without options in a mapping."""
        if isinstance(values, str):
            values = [values]
        if isinstance(values, list):
            for name in values:
                if name not in cls.model_fields:
                    near = difflib.get_close_matches(str(name), cls.model_fields, n=1)
                    problem = f"{name!r:.60} is not a metric; they are {', '.join(cls.model_fields)}"
                    raise FieldError("", problem, nearest=near[0] if near else None)
            return {name: {} for name in values}
        return {k: {} if v is None else v for k, v in values.items()} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _has_one(self) -> MetricsSpec:
        if not self.chosen:
            raise FieldError("", "must name at least one metric")
        return self

    @property
    def chosen(self) -> dict[str, MetricOptions]:
        """The options of each metric of the task, by its name, in the order of this table."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: options for name, options in found.items() if options is not None}
