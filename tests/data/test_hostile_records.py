"""Records that others made to fill the memory or the plan."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from forge.data.conversations import conversation_of
from forge.data.formats.base import LabelSettings
from forge.data.labels import names_of
from forge.data.sources.base import Record
from forge.errors import DataError


def record(**fields: Any) -> Record:
    return Record(name="a:1", location="a:1", fields=fields)


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        ("a" * 1001, "'label' has 1,001 characters; a label has at most 1,000"),
        ("a\ud800", "'label' has half a surrogate pair at character 1"),
    ],
)
def test_names_of__label_that_no_config_can_hold__is_refused(label: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        names_of(record(label=label), LabelSettings())


def test_conversation_of__role_of_megabytes__is_refused_without_much_memory() -> None:
    role = "assistan" * (1 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="message 1 has the role 'assistan"):
            conversation_of(record(messages=[{"role": role, "content": "a"}]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(role)  # comparing all of it with the known roles takes 40 bytes for a character
