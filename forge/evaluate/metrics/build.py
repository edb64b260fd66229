"""Build the metrics that a task names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from forge.config.classification import LabelKind
from forge.config.task_metrics import MetricsSpec
from forge.errors import ArgumentError
from forge.evaluate.metrics import classes, likelihoods, numbers, ranking
from forge.evaluate.metrics.base import Metric, ScoredExample


def build_metrics(
    spec: MetricsSpec, *, examples: Sequence[ScoredExample], label_kind: LabelKind = "single"
) -> dict[str, Metric]:
    """Return the metrics of a task by their names in the task file.

    Args:
        examples: what they will be computed of; of several models that are compared, those of all of them: they
            decide which labels there are.
        label_kind: what the label of an example is.

    Raises: ArgumentError if a package is missing; DataError for outputs that have no labels.
    """
    try:
        return dict(_built(spec, examples=examples, kind=label_kind))
    except ModuleNotFoundError as error:
        raise ArgumentError(
            f"the metrics of this task need the package {error.name}; install it with: pip install "
            "'forge-train[eval]'"
        ) from error


def _built(
    spec: MetricsSpec, *, examples: Sequence[ScoredExample], kind: LabelKind
) -> Iterator[tuple[str, Metric]]:
    chosen: Mapping[str, Any] = spec.chosen
    by_class = {"precision", "recall", "f1", "matthews"} & set(chosen)
    labels = classes.labels_of(examples, kind=kind) if by_class else ()
    for name, options in chosen.items():
        if name in ("precision", "recall", "f1"):
            average, per_class = options.average, options.per_class
            yield (
                name,
                classes.ByClass(name=name, kind=kind, labels=labels, average=average, per_class=per_class),
            )
        elif name == "accuracy":
            yield name, classes.Accuracy(kind=kind)
        elif name == "normalized_accuracy":
            yield name, classes.NormalizedAccuracy(by=options.by)
        elif name == "matthews":
            yield name, classes.Matthews(kind=kind, labels=labels)
        elif name == "perplexity":
            yield name, likelihoods.Perplexity(unit=options.unit)
        elif name == "bits_per_byte":
            yield name, likelihoods.BitsPerByte()
        elif name == "greedy_accuracy":
            yield name, likelihoods.GreedyAccuracy()
        elif name in ("mse", "r2", "pearson"):
            origin = next((numbers.number_of(example.target) for example in examples), 0.0)
            yield name, numbers.NumberScore(name=name, origin=origin)
        elif name in ("mrr", "recall_at_k", "ndcg"):
            yield name, ranking.Ranking(name=name, ranks=options.k)
        else:
            yield name, _of_texts(name, options=options, examples=examples)


def _of_texts(name: str, *, options: Any, examples: Sequence[ScoredExample]) -> Metric:
    """A metric of texts, which needs the packages of `forge-train[eval]`."""
    if name in ("bleu", "chrf"):
        from forge.evaluate.metrics import translation

        numbers_of_references = {len(x.target) if isinstance(x.target, tuple) else 1 for x in examples}
        count = numbers_of_references.pop() if len(numbers_of_references) == 1 else -1
        build = translation.build_bleu if name == "bleu" else translation.build_chrf
        metric: Metric = build(options, num_references=count)
        return metric
    from forge.evaluate.metrics import texts

    if name in ("wer", "cer"):
        return texts.ErrorRate(name=name, options=options)
    built: Metric = getattr(texts, f"build_{name}")(options)
    return built
