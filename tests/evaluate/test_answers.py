"""Reading the answer in a text: worked cases, and texts and patterns that take other engines hours."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.config.task import AnswerSpec
from forge.errors import ArgumentError
from forge.evaluate.answers import build_reader, canonical_number

pytest.importorskip("re2")


def read(answer: Any, text: str, choices: tuple[str, ...] = ()) -> str | None:
    return build_reader(AnswerSpec.model_validate(answer), choices=choices)(text)


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("whole", " a b\n", "a b"),
        ({"read": "whole", "strip": False}, " a\n", " a\n"),
        ({"read": "whole", "unicode": "NFC"}, "e\u0301", "é"),
        ("first-line", "\n \n yes \nno", "yes"),
        ("first-line", "\n", None),
        ("number", "10-5 = 5, so 1,234.50 in total.", "1234.5"),
        ("number", "H2O is v1x", None),
        ("number", "x = −3.", "-3"),
        ("number", "about 7e3!", "7000"),
        ({"read": "number", "which": "first"}, "it is .50 or 2", "0.5"),
        ({"read": "json", "field": "a.b"}, 'so {x} {"a": {"b": [1, "é"]}} {"a": 1}', '[1, "é"]'),
        ({"read": "json", "field": "a"}, '{"a": "text"}', "text"),
        ({"read": "json", "field": "a"}, '{"a": null}', None),
        ({"read": "json", "field": "a"}, "none", None),
        ({"read": "regex", "pattern": r"Answer: (\w+)"}, "Answer: x. Answer: y", "x"),
        ({"read": "regex", "pattern": r"Answer: (\w+)", "which": "last"}, "Answer: x. Answer: y\ud800", "y"),
        ({"read": "regex", "pattern": r"[A-D]\b"}, "It is C.", "C"),
        ({"read": "regex", "pattern": "x(y)?"}, "x", None),
    ],
)
def test_reader__worked_cases__are_read(answer: Any, text: str, expected: str | None) -> None:
    assert read(answer, text) == expected


@pytest.mark.parametrize(
    ("text", "which", "expected"),
    [
        ("The answer is Not Positive.", "first", "not positive"),
        ("nonpositive", "first", None),
        ("POSITIVE, then negative", "first", "positive"),
        ("POSITIVE, then negative", "last", "negative"),
        ("", "first", None),
    ],
)
def test_reader__labels__are_whole_words_of_any_case(text: str, which: str, expected: str | None) -> None:
    choices = ("positive", "not positive", "negative")
    assert read({"read": "label", "which": which}, text, choices) == expected


@pytest.mark.parametrize("pattern", ["(", "(?=a)", r"(a)\1", "a{1000}{1000}"])
def test_reader__pattern_that_re2_refuses__is_an_error(pattern: str) -> None:
    with pytest.raises(ArgumentError, match="is not a regular expression of RE2"):
        read({"read": "regex", "pattern": pattern}, "")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"read": "regex", "pattern": "(a+)+b"}, "a" * 300_000),
        ({"read": "regex", "pattern": "(a|a)*(a|a)*b"}, "a" * 300_000),
        *((("number"), text * 300_000) for text in ("1", "1,", "-", "1 ", "1,111", ".")),
        ({"read": "json", "field": "a"}, "{" * 300_000),
        ({"read": "json", "field": "a"}, '{"a":' * 100_000),
        ({"read": "json", "field": "a"}, '{"a": ' + "9" * 300_000 + "}"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_reader__hostile_text__takes_no_time(answer: Any, text: str) -> None:
    start = time.process_time()
    read(answer, text)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,000.0", "1000"),
        ("-0.0", "0"),
        ("1e999999", "1E+999999"),
        ("nan", None),
        ("inf", None),
        ("9" * 401, None),
    ],
)
def test_canonical_number__spellings__are_one(text: str, expected: str | None) -> None:
    assert canonical_number(text) == expected


READERS = [
    build_reader(AnswerSpec.model_validate(answer), choices=("a", "b"))
    for answer in ("whole", "first-line", "number", "label", {"read": "json", "field": "a"})
]


@given(st.text(max_size=200))
@settings(max_examples=20, deadline=None)
def test_reader__any_text__gives_an_answer_or_none(text: str) -> None:
    for reader in READERS:
        found = reader(text)
        assert found is None or isinstance(found, str)


@given(st.integers(-(10**18), 10**18))
@settings(max_examples=20, deadline=None)
def test_reader__whole_number_in_a_sentence__is_read_back(number: int) -> None:
    assert read("number", f"It is {number:,}.") == str(number)
