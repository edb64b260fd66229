"""docs/extending.md: its snippets are valid, and do what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forge.data.formats.base import FormatContext
from forge.data.sources.base import Record
from forge.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def snippet(name: str) -> dict[str, Any]:
    """The names that the page's Python block with `class <name>` defines."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    names: dict[str, Any] = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    exec(next(block for block in blocks if f"class {name}" in block), names)
    return names


def test_format_of_the_page__record__becomes_an_example() -> None:
    def encode(text: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array([len(word) for word in text.split()], dtype=np.int64)

    context = FormatContext(
        seq_len=3,
        text_key="text",
        eot_id=0,
        vocab_size=16,
        encode=encode,
        tokenizer=train_tokenizer(["a"], vocab_size=300),
    )
    reviews = snippet("Reviews")["Reviews"](context)
    records = [Record(name="r:1", location="r:1", fields={"review": text}) for text in ("a bb ccc d e f g", "one")]
    (example,) = [example for record in records for example in reviews.examples(record)]
    assert example.arrays["tokens"].tolist() == [1, 2, 3]
    assert example.arrays["targets"].tolist() == [2, 3, 1]
    assert example.weight == 3.0
    assert reviews.counts() == {"empty reviews": 1}
    assert context.noted.listed == {"empty reviews": ("r:1",)}


@pytest.mark.parametrize("name", re.findall(r"\]\(([^)#]+)\)", PAGE))
def test_page__link__leads_somewhere(name: str) -> None:
    assert (ROOT / "docs" / name).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(forge/[a-z_/]+\.py)`", PAGE))))
def test_page__module_it_names__exists(path: str) -> None:
    assert (ROOT / path).exists()
