"""Metrics beside their reference libraries, on recorded predictions, worked examples and hostile outputs."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.preprocessing import MultiLabelBinarizer

from forge.config.task_metrics import MetricsSpec
from forge.errors import DataError
from forge.evaluate.bootstrap import MetricScore, score_examples, score_metric
from forge.evaluate.metrics.base import MAX_CHARS, ScoredExample
from forge.evaluate.metrics.build import build_metrics
from forge.evaluate.metrics.ranking import ranks_of
from forge.evaluate.metrics.texts import squad_normal, unicode_words
from tests.support.seeds import SEED

sacrebleu = pytest.importorskip("sacrebleu")
jiwer = pytest.importorskip("jiwer")
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")

RECORDED = json.loads((Path(__file__).parent / "recorded.json").read_text(encoding="utf-8"))
"""Translations that a small model has written, and its references; labels that a classifier has given."""
TEXTS = [
    ScoredExample(prediction=prediction, target=tuple(references))
    for prediction, references in RECORDED["translations"]
]
LABELS = [ScoredExample(prediction=predicted, target=expected) for predicted, expected in RECORDED["labels"]]


def scores_of(
    metrics: Any, examples: Sequence[ScoredExample], *, kind: Any = "single", num_resamples: int = 20
) -> dict[str, MetricScore]:
    spec = MetricsSpec.model_validate(metrics)
    found: dict[str, MetricScore] = {}
    for metric in build_metrics(spec, examples=examples, label_kind=kind).values():
        found |= score_metric(metric, examples, num_resamples=num_resamples)
    return found


def values_of(metrics: Any, examples: Sequence[ScoredExample], *, kind: Any = "single") -> dict[str, float]:
    return {name: score.value for name, score in scores_of(metrics, examples, kind=kind).items()}


def streams(examples: Sequence[ScoredExample]) -> tuple[list[str], list[list[str | None]]]:
    """Predictions and references as sacrebleu takes them."""
    most = max(len(example.target) for example in examples)  # type: ignore[arg-type]
    padded = [[*example.target, *[None] * most][:most] for example in examples]  # type: ignore[misc]
    return [str(example.prediction) for example in examples], [list(one) for one in zip(*padded, strict=True)]


@pytest.mark.parametrize(
    "options", [{}, {"tokenize": "intl", "lowercase": True}, {"tokenize": "char", "smooth": "add-k"}]
)
def test_bleu__recorded_translations__is_sacrebleus_with_its_signature(options: Mapping[str, Any]) -> None:
    own = dict(options)
    reference = sacrebleu.BLEU(smooth_method=own.pop("smooth", "exp"), **own)
    expected = reference.corpus_score(*streams(TEXTS))
    found = scores_of({"bleu": dict(options)}, TEXTS)["bleu"]
    assert found.value == expected.score > 1
    assert found.signature == f"bleu|{reference.get_signature()}"
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("word_order", [0, 2])
def test_chrf__recorded_translations__is_sacrebleus_with_its_signature(word_order: int) -> None:
    reference = sacrebleu.CHRF(word_order=word_order)
    expected = reference.corpus_score(*streams(TEXTS))
    found = scores_of({"chrf": {"word_order": word_order}}, TEXTS)["chrf"]
    assert found.value == expected.score > 1
    assert found.signature == f"chrf|{reference.get_signature()}"


@pytest.mark.parametrize("stem", [False, True])
def test_rouge__recorded_translations__are_those_of_rouge_score(stem: bool) -> None:
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stem)
    expected = [scorer.score_multi(list(one.target), one.prediction) for one in TEXTS]  # type: ignore[arg-type]
    found = values_of({"rouge": {"stem": stem}}, TEXTS)
    for name in ("rouge1", "rouge2", "rougeL"):
        assert found[name] == pytest.approx(np.mean([one[name].fmeasure for one in expected]), abs=1e-12)


def test_rouge__words_of_other_scripts__count_only_with_tokenize_words() -> None:
    examples = [
        ScoredExample(prediction="Öl läuft über", target="Öl läuft über"),
        ScoredExample(prediction="東京", target="東京都"),
    ]
    assert values_of("rouge", examples)["rouge1"] == pytest.approx(0.5)  # what is left of German
    assert values_of({"rouge": {"tokenize": "words"}}, examples)["rouge1"] == pytest.approx((1 + 4 / 5) / 2)
    assert unicode_words("Cafe\u0301 2.0 東京") == ["café", "2", "0", "東", "京"]


def test_error_rates__recorded_translations__are_those_of_jiwer() -> None:
    examples = [ScoredExample(prediction=one.prediction, target=one.target[0]) for one in TEXTS]  # type: ignore[index]
    references, predictions = [str(one.target) for one in examples], [str(one.prediction) for one in examples]
    found = values_of(["wer", "cer"], examples)
    assert found["wer"] == pytest.approx(jiwer.wer(references, predictions), abs=1e-12)
    assert found["cer"] == pytest.approx(jiwer.cer(references, predictions), abs=1e-12)


def test_error_rates__options__fold_case_and_remove_punctuation() -> None:
    examples = [ScoredExample(prediction="Hello, World!", target="hello world")]
    assert values_of("wer", examples)["wer"] == 1
    assert values_of({"wer": {"lowercase": True, "punctuation": "remove"}}, examples)["wer"] == 0


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
def test_classes__recorded_labels__are_scikit_learns(average: str) -> None:
    expected, predicted = zip(*((one.target, one.prediction) for one in LABELS), strict=True)
    options = {"average": average, "per_class": True}
    found = values_of(
        {"precision": options, "recall": options, "f1": options, "accuracy": {}, "matthews": {}}, LABELS
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, score in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
            assert found[f"{name}_{average}"] == pytest.approx(
                score(expected, predicted, average=average), abs=1e-12
            )
            labels = sorted({*expected, *predicted})
            for label, one in zip(labels, score(expected, predicted, average=None, labels=labels), strict=True):
                assert found[f"{name}/{label}"] == pytest.approx(one, abs=1e-12)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(expected, predicted), abs=1e-12)
    assert found["matthews"] == pytest.approx(sk.matthews_corrcoef(expected, predicted), abs=1e-12)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), min_size=1, max_size=30))
@settings(deadline=None, max_examples=8)
def test_classes__any_labels__are_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    examples = [ScoredExample(prediction=a, target=b) for a, b in pairs]
    predicted, expected = zip(*pairs, strict=True)
    found = values_of(["f1", "matthews"], examples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["f1_macro"] == pytest.approx(sk.f1_score(expected, predicted, average="macro"), abs=1e-12)
        assert found["matthews"] == pytest.approx(sk.matthews_corrcoef(expected, predicted), abs=1e-12)


def test_classes__several_labels__are_scikit_learns() -> None:
    draw = random.Random(SEED)
    sets = [tuple(tuple(name for name in "abcde" if draw.random() < 0.4) for _ in range(2)) for _ in range(50)]
    examples = [ScoredExample(prediction=a, target=b) for a, b in sets]
    binary = MultiLabelBinarizer(classes=list("abcde"))
    predicted, expected = binary.fit_transform([a for a, _ in sets]), binary.transform([b for _, b in sets])
    found = values_of({"accuracy": {}, "f1": {"average": ["macro", "micro"]}}, examples, kind="multi")
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(expected, predicted))
    for average in ("macro", "micro"):
        wanted = sk.f1_score(expected, predicted, average=average, zero_division=0)
        assert found[f"f1_{average}"] == pytest.approx(wanted)


def test_classes__tags_of_words__are_scored_word_by_word() -> None:
    examples = [
        ScoredExample(prediction=("N", "V", "N"), target=("N", "V", "V")),
        ScoredExample(prediction=("N", "N"), target=("N", None)),  # the second word has no tag
    ]
    found = values_of(["accuracy", "f1"], examples, kind="token")
    assert found["accuracy"] == pytest.approx(3 / 4)
    expected = sk.f1_score(["N", "V", "V", "N"], ["N", "V", "N", "N"], average="macro")
    assert found["f1_macro"] == pytest.approx(expected)
    with pytest.raises(DataError, match="1 tag predicted for 2 words"):
        values_of(["accuracy"], [ScoredExample(prediction=("N",), target=("N", "V"))], kind="token")


def test_classes__no_answers__are_wrong_and_of_no_class() -> None:
    examples = [ScoredExample(prediction=None, target="a"), ScoredExample(prediction="b", target="b")]
    found = values_of({"accuracy": {}, "f1": {"average": ["macro", "micro"]}, "matthews": {}}, examples)
    assert found == pytest.approx(
        {
            "accuracy": 0.5,
            "f1_macro": 0.5,
            "f1_micro": 2 / 3,
            "matthews": sk.matthews_corrcoef(["a", "b"], ["none", "b"]),
        }
    )


def test_classes__one_class_only__has_no_correlation_and_no_nan() -> None:
    examples = [ScoredExample(prediction="a", target="a")] * 3
    found = scores_of(["accuracy", "f1", "matthews"], examples)
    assert {name: score.value for name, score in found.items()} == {"accuracy": 1, "f1_macro": 1, "matthews": 0}
    assert found["f1_macro"].low == found["f1_macro"].high == 1


def test_normalized_accuracy__longer_choice__wins_only_by_its_length() -> None:
    example = ScoredExample(
        prediction="no",
        target="certainly",
        choices=("no", "certainly"),
        log_likelihoods=(-2.0, -3.0),
        num_tokens=(1, 4),
    )
    assert values_of(["accuracy"], [example])["accuracy"] == 0
    for by in ("characters", "bytes", "tokens"):
        assert values_of({"normalized_accuracy": {"by": by}}, [example])["normalized_accuracy"] == 1
    broken = ScoredExample(target="a", choices=("a", "b"), log_likelihoods=(math.nan, -1.0), num_tokens=(1, 1))
    assert values_of(["normalized_accuracy"], [broken])["normalized_accuracy"] == 0


SQUAD = [  # prediction, references, exact match, F1: worked by hand with the rules of SQuAD 2.0
    ("The Eiffel Tower", ("Eiffel tower.",), 1, 1),
    ("in the year 1889", ("1889", "year 1889!"), 0, 0.8),
    ("", ("",), 1, 1),
    (None, ("anything",), 0, 0),
    ("the", ("a",), 1, 1),
    ("to be or not to be", ("to be",), 0, 0.5),
]


@pytest.mark.parametrize(("prediction", "references", "exact", "f1"), SQUAD)
def test_question_answering__worked_cases__follow_squad(
    prediction: str | None, references: tuple[str, ...], exact: float, f1: float
) -> None:
    found = values_of(["exact_match", "token_f1"], [ScoredExample(prediction=prediction, target=references)])
    assert found == pytest.approx({"exact_match": exact, "token_f1": f1})


def test_squad_normal__articles_within_words__stay() -> None:
    assert squad_normal("  The an-them,  A  b\n theory ") == "anthem b theory"


def likelihood(
    text: str, log_likelihood: float, *, num_tokens: int, is_greedy: bool | None = None
) -> ScoredExample:
    return ScoredExample(
        choices=(text,), log_likelihoods=(log_likelihood,), num_tokens=(num_tokens,), is_greedy=is_greedy
    )


def test_likelihoods__worked_example__are_of_all_texts_together() -> None:
    examples = [
        likelihood("ab cd", -3.0, num_tokens=2, is_greedy=True),
        likelihood("é", -1.0, num_tokens=2, is_greedy=False),
    ]
    metrics = {"perplexity": {}, "bits_per_byte": {}, "greedy_accuracy": {}}
    assert values_of(metrics, examples) == pytest.approx(
        {
            "perplexity": math.exp(4 / 4),
            "bits_per_byte": 4 / 7 / math.log(2),
            "greedy_accuracy": 0.5,
        }
    )
    assert values_of({"perplexity": {"unit": "word"}}, examples) == pytest.approx(
        {"word_perplexity": math.exp(4 / 3)}
    )
    assert values_of({"perplexity": {"unit": "byte"}}, examples) == pytest.approx(
        {"byte_perplexity": math.exp(4 / 7)}
    )


@pytest.mark.parametrize(
    ("log_likelihood", "expected"), [(-math.inf, math.inf), (-1e9, math.inf), (math.nan, math.nan)]
)
def test_perplexity__impossible_and_undefined_texts__are_inf_and_nan(
    log_likelihood: float, expected: float
) -> None:
    examples = [likelihood("a", -1.0, num_tokens=1), likelihood("b", log_likelihood, num_tokens=1)]
    assert values_of("perplexity", examples)["perplexity"] == pytest.approx(expected, nan_ok=True)


def test_likelihoods__model_that_does_not_decode__greedy_accuracy_is_refused() -> None:
    with pytest.raises(DataError, match="decode texts token by token"):
        values_of("greedy_accuracy", [likelihood("a", -1.0, num_tokens=1)])


def test_ranks_of__ties_and_nan__are_behind() -> None:
    scores = np.array([0.5, 0.9, 0.5, math.nan, 0.1])
    assert ranks_of(scores, relevant=[1]) == (1,)
    assert ranks_of(scores, relevant=[0]) == (3,)
    assert ranks_of(scores, relevant=[0, 2]) == (2, 3)
    assert ranks_of(scores, relevant=[3]) == (5,)
    assert ranks_of(np.zeros(4), relevant=[2]) == (4,)


@given(st.integers(2, 20), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=8)
def test_ranking__random_scores__are_those_of_scikit_learn(count: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    scores, relevant = draw.permutation(count) / count, sorted({0, int(draw.integers(count))})
    gains = draw.integers(1, 4, size=len(relevant)).astype(float)
    truth = np.zeros(count)
    truth[relevant] = gains
    example = ScoredExample(ranks=ranks_of(scores, relevant=relevant), gains=tuple(gains))
    found = values_of({"ndcg": {"k": [1, 3, 50]}, "mrr": {}, "recall_at_k": {"k": 3}}, [example])
    for k in (1, 3, 50):
        assert found[f"ndcg@{k}"] == pytest.approx(sk.ndcg_score([truth], [scores], k=k))
    best = min(int((scores > scores[one]).sum()) + 1 for one in relevant)
    assert found["mrr"] == pytest.approx(1 / best)
    top = set(np.argsort(-scores)[:3].tolist())
    assert found["recall@3"] == pytest.approx(len(top & set(relevant)) / len(relevant))


def test_numbers__far_from_zero__keep_their_digits() -> None:
    draw = np.random.default_rng(SEED)
    targets = 1e9 + draw.normal(size=200)
    predictions = targets + draw.normal(size=200) / 2
    examples = [
        ScoredExample(prediction=float(a), target=float(b)) for a, b in zip(predictions, targets, strict=True)
    ]
    found = values_of(["mse", "r2", "pearson"], examples, kind="regression")
    assert found["mse"] == pytest.approx(sk.mean_squared_error(targets, predictions), rel=1e-6)
    assert found["r2"] == pytest.approx(sk.r2_score(targets, predictions), rel=1e-6)
    assert found["pearson"] == pytest.approx(np.corrcoef(targets, predictions)[0, 1], rel=1e-6)


def test_numbers__unread_answer__makes_the_value_undefined() -> None:
    examples = [ScoredExample(prediction="3", target="3"), ScoredExample(prediction=None, target="4")]
    assert math.isnan(values_of(["mse"], examples)["mse"])
    assert values_of(["mse"], examples[:1])["mse"] == 0


EVERY_TEXT_METRIC = ["accuracy", "exact_match", "token_f1", "bleu", "chrf", "rouge", "wer", "cer"]
HOSTILE = [
    "",
    " ",
    "\x00\x1b[2J\u202e",
    "\ud800",
    "a" * 500,
    "a " * 500,
    "é",
    "e\u0301",
    "𝔘𝔫𝔦",
    "{{ x }}",
    "\n" * 100,
]


def test_text_metrics__hostile_outputs__have_finite_scores_and_intervals() -> None:
    pairs = [(a, b) for a in HOSTILE for b in HOSTILE]
    examples = [ScoredExample(prediction=a, target=(b,)) for a, b in pairs]
    for name, score in scores_of(EVERY_TEXT_METRIC, examples).items():
        assert math.isfinite(score.value) and score.low <= score.value <= score.high, name


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_text_metrics__empty_answers_to_empty_references__do_not_fail(text: str) -> None:
    found = values_of(EVERY_TEXT_METRIC, [ScoredExample(prediction=text, target=("",))])
    assert found["exact_match"] == found["token_f1"] == 1
    assert math.isnan(found["cer"])  # by no characters
    assert values_of("cer", [ScoredExample(prediction="ab", target="")])["cer"] == 2


def test_text_metrics__no_examples__are_nan() -> None:
    found = scores_of([*EVERY_TEXT_METRIC, "f1", "matthews"], [])
    assert found and all(math.isnan(score.value) and score.num_examples == 0 for score in found.values())


def test_text_metrics__huge_text__is_refused() -> None:
    with pytest.raises(DataError, match="1,048,577 characters"):
        values_of("rouge", [ScoredExample(prediction="a" * (MAX_CHARS + 1), target="a")])


def test_text_metrics__long_repetition__costs_no_memory_of_a_table() -> None:
    words = " ".join(str(one % 100) for one in range(20_000))
    example = ScoredExample(prediction=words, target=words + " end")
    assert values_of(["rouge", "wer"], [example])["wer"] == pytest.approx(1 / 20_001)


def test_score_examples__every_example__has_its_own_value() -> None:
    spec = MetricsSpec.model_validate(["exact_match", "bleu", "f1"])
    examples = [ScoredExample(prediction="a b c d", target="a b c d"), ScoredExample(prediction="x", target="y")]
    found: dict[str, Any] = {}
    for metric in build_metrics(spec, examples=examples).values():
        found |= {name: values.tolist() for name, values in score_examples(metric, examples).items()}
    assert found == {"exact_match": [1, 0], "bleu": [pytest.approx(100), 0]}
