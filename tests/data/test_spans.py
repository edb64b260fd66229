"""One example as text: what carries loss, whatever the targets mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from forge.data.rows import IGNORED
from forge.data.spans import SpanReader
from forge.data.tokenizer import train_tokenizer
from forge.plan.data_view import Span

BYTES = Tokenizer.from_str(
    train_tokenizer(["the capital of France is Paris, naïve as it is"] * 3, vocab_size=280).content
)
EOT = 0


def wordpiece() -> Tokenizer:
    words = ["[UNK]", "[CLS]", "[MASK]", "the", "capital", "of", "france", "is", "par", "##is", "."]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[CLS]", "[MASK]"])
    return tokenizer


def metaspace() -> Tokenizer:
    words = ["<unk>", "</s>", "▁the", "▁capital", "▁of", "▁Paris", "▁"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def reader(tokenizer: Tokenizer = BYTES, *, special: set[int] | None = None, **changes: Any) -> SpanReader:
    settings: dict[str, Any] = {"predicts_tokens": True, "max_chars": 400} | changes
    ids = frozenset(special if special is not None else {EOT})
    return SpanReader(tokenizer=tokenizer, special_ids=ids, **settings)


def next_token(ids: list[int], *, learnt: list[bool]) -> dict[str, np.ndarray]:
    """An example that predicts the next token where `learnt` says so of that token."""
    tokens, targets = np.array(ids[:-1]), np.array(ids[1:])
    return {"tokens": tokens, "targets": np.where(learnt[1:], targets, IGNORED)}


def texts(spans: tuple[Span, ...]) -> list[tuple[str, bool]]:
    return [(span.text, span.has_loss) for span in spans]


def test_spans__next_token__carries_loss_where_it_is_predicted() -> None:
    ids = [*BYTES.encode("the capital of France is").ids, *BYTES.encode(" Paris").ids, EOT]
    num_learnt = len(BYTES.encode(" Paris").ids) + 1
    learnt = [False] * (len(ids) - num_learnt) + [True] * num_learnt
    spans = reader().spans(next_token(ids, learnt=learnt))
    assert texts(spans) == [("the capital of France is", False), (" Paris", True), ("<|endoftext|>", True)]
    assert [span.kind for span in spans] == ["text", "text", "special"]


def test_spans__a_name_of_a_special_token_that_is_only_spelt__is_text() -> None:
    BYTES.encode_special_tokens = True
    ids = [*BYTES.encode("<|endoftext|>").ids, EOT]
    spans = reader().spans(next_token(ids, learnt=[True] * len(ids)))
    assert [span.kind for span in spans if span.has_loss] == ["text", "special"]


@pytest.mark.parametrize("tokenizer", [BYTES, wordpiece(), metaspace()], ids=["bytes", "wordpiece", "metaspace"])
@given(data=st.data())
def test_spans__any_mask__join_to_the_text_of_all_tokens(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, min(10, tokenizer.get_vocab_size() - 1)), min_size=2, max_size=30))
    learnt = data.draw(
        st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)).filter(lambda one: any(one[1:]))
    )
    spans = reader(tokenizer, special={0, 1}).spans(next_token(ids, learnt=learnt))
    shown = "".join(span.text for span in spans)
    # What follows the last target is not part of the example's text.
    whole = ids if learnt[-1] else ids[:-1]
    assert shown == tokenizer.decode(whole, skip_special_tokens=False)


def test_spans__masked_tokens__show_what_is_behind_the_mask() -> None:
    tokenizer = wordpiece()
    ids = [1, 3, 4, 2, 6, 7, 2, 9]
    arrays = {"tokens": np.array(ids), "targets": np.full(len(ids), IGNORED)}
    arrays["targets"][[3, 6]] = [5, 8]
    spans = reader(tokenizer, special={1, 2}).spans(arrays)
    assert [(span.text.strip(), span.target) for span in spans if span.has_loss] == [
        ("[MASK]", "of"),
        ("[MASK]", "par"),
    ]
    assert "".join(span.text for span in spans) == tokenizer.decode(ids, skip_special_tokens=False)


def test_spans__tokens_that_predict_themselves__carry_loss_without_a_target() -> None:
    ids = np.array(BYTES.encode("the capital").ids)
    spans = reader().spans({"tokens": ids, "targets": np.where(np.arange(len(ids)) < 2, ids, IGNORED)})
    assert [span.has_loss for span in spans] == [True, False]
    assert not any(span.target for span in spans)


@pytest.mark.parametrize("predicts_tokens", [False, None])
def test_spans__label__is_shown_as_a_number(predicts_tokens: bool | None) -> None:
    tokens = np.array(BYTES.encode("naïve").ids)
    targets = np.full(len(tokens), IGNORED)
    targets[-1] = 3
    spans = reader(predicts_tokens=predicts_tokens).spans({"tokens": tokens, "targets": targets})
    assert [(span.has_loss, span.target) for span in spans] == [(False, ""), (True, "3")]


def test_spans__parts__are_apart_and_each_ends_with_its_own_target() -> None:
    one, other = BYTES.encode("the capital").ids, BYTES.encode("of France").ids
    arrays = {
        "tokens": np.array([*one, *other]),
        "targets": np.array([*[IGNORED] * (len(one) - 1), EOT, *other[1:], EOT]),
        "part": np.array([0] * len(one) + [1] * len(other)),
    }
    spans = reader(part_names={0: "chosen"}).spans(arrays)
    by_part = {part: [span for span in spans if span.part == part] for part in ("chosen", "1")}
    assert texts(tuple(by_part["chosen"])) == [("the capital", False), ("<|endoftext|>", True)]
    first = BYTES.decode(other[:1])
    assert texts(tuple(by_part["1"])) == [
        (first, False),
        ("of France"[len(first) :], True),
        ("<|endoftext|>", True),
    ]


@pytest.mark.parametrize("part", [np.array([-1, 0]), np.array([0.5, 1.0]), np.zeros((2, 3), dtype=int)])
def test_spans__another_kind_of_array_named_part__is_not_taken_for_parts(part: np.ndarray) -> None:
    arrays = {"tokens": np.array([5, 6]), "targets": np.array([6, 7]), "part": part}
    assert all(span.part is None for span in reader().spans(arrays))


def test_spans__a_million_tokens__are_bounded_and_say_so() -> None:
    ids = BYTES.encode("the capital of France is Paris. ").ids * 100_000
    learnt = [False] * len(ids)
    learnt[-1] = True
    spans = reader(max_chars=100).spans(next_token(ids, learnt=learnt))
    assert sum(len(span.text) for span in spans) < 200
    assert any(span.kind == "omitted" and f"{len(ids) - 1:,} tokens in all" in span.text for span in spans)
    assert spans[-1].has_loss and spans[0].text.startswith("the capital")


def test_spans__loss_that_begins_and_ends_thousands_of_times__is_bounded() -> None:
    ids = [5, 6] * 5000
    spans = reader().spans(next_token(ids, learnt=[i % 2 == 0 for i in range(len(ids))]))
    assert len(spans) < 100
    assert any("more parts" in span.text for span in spans)


@pytest.mark.parametrize("before", [0, 45, 52, 3000])
def test_spans__secret_of_the_environment__is_removed_also_where_the_text_is_cut(
    before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "sk-4711-abcdefgh-xyzw"
    monkeypatch.setenv("SUPPLIER_API_KEY", secret)
    ids = BYTES.encode("a" * before + secret + " " + "b" * 5000).ids
    shown = "".join(span.text for span in reader(max_chars=100).spans(next_token(ids, learnt=[True] * len(ids))))
    assert "4711" not in shown and "abcdefgh" not in shown


def test_spans__secret_across_the_border_of_the_loss__is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPPLIER_API_KEY", "sk-4711-abcdefgh-xyzw")
    ids = BYTES.encode("before sk-4711-abcdefgh-xyzw after").ids
    for border in range(1, len(ids) - 1):
        spans = reader().spans(next_token(ids, learnt=[i >= border for i in range(len(ids))]))
        shown = "".join(span.text for span in spans)
        assert shown.replace("***", "").split() == ["before", "after"], border


def test_spans__second_part_that_predicts_itself__carries_loss_whatever_its_length() -> None:
    source = BYTES.encode("the capital").ids
    for target in (BYTES.encode(" is Paris").ids, BYTES.encode("n").ids):
        tokens = np.array([*source, *target])
        part = np.repeat([1, 2], [len(source), len(target)])
        spans = reader().spans({"tokens": tokens, "targets": np.where(part == 2, tokens, IGNORED), "part": part})
        assert texts(spans) == [("the capital", False), (BYTES.decode(target), True)]
        assert not any(span.target for span in spans)


def test_spans__labels_with_names__are_shown_by_them() -> None:
    arrays = {"tokens": np.array([5, 6, 7]), "targets": np.array([IGNORED, 1, 7])}
    spans = reader(predicts_tokens=False, label_names=("games", "net")).spans(arrays)
    assert [span.target for span in spans] == ["", "net", "7"]  # each token by itself
