"""A prompt for a trained model that is of its corpus's own kind: the beginning of the first held-out sequence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from forge.config.data import DataSpec
from forge.data.conversations import ROLES
from forge.data.prepare import open_rows
from forge.data.rows import IGNORED, Arrays
from forge.data.tokenizer_files import prompt_tokenizer
from forge.errors import ForgeError
from forge.plan.inputs import CorpusInfo

_SOURCE_PROMPTS = {"python-stdlib": "def "}
_MAX_TOKENS = 64
_MAX_CHARS = 48


def sample_prompt(facts: CorpusInfo, data: DataSpec, *, tokenizer: Path) -> str:
    """Return the prompt of a run's sample: that of its source if it has one, or else from the held-out text.

    Args:
        tokenizer: folder of the run's tokenizer.
    """
    if data.source in _SOURCE_PROMPTS:
        return _SOURCE_PROMPTS[data.source]
    found = prompt_tokenizer(tokenizer, eot_id=facts.eot_id, special_tokens=data.special_tokens)
    return held_out_prompt(facts, tokenizer=found).removeprefix(data.pair.prefix)  # which is added to every source


def held_out_prompt(facts: CorpusInfo, *, tokenizer: Tokenizer) -> str:
    """Return the first words of the held-out text, on one line; empty if there are none or they are no text."""
    try:
        _, held_out = open_rows(facts)
        if not held_out.num_rows:
            return ""
        row = held_out.read(np.array([0]))
        ids = row["tokens"][0, : _length_of_first(row)].tolist()
    except (ForgeError, OSError, KeyError, IndexError):
        return ""
    if facts.eot_id in ids:
        ids = ids[: ids.index(facts.eot_id)]
    return first_words(tokenizer.decode(ids, skip_special_tokens=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutTurn:
    """What the first held-out conversation asks for."""

    ids: tuple[int, ...]
    """Token ids up to the first turn that carries loss."""
    shown: str
    """The first words of the message before it."""


def held_out_turn(facts: CorpusInfo, *, tokenizer: Tokenizer) -> HeldOutTurn | None:
    """Return the prompt of the first held-out example with targets of its own; None if there is none."""
    try:
        _, held_out = open_rows(facts)
        if not held_out.num_rows:
            return None
        row = held_out.read(np.array([0]))
        first = int(np.flatnonzero(row["targets"][0] != IGNORED)[0])
    except (ForgeError, OSError, KeyError, IndexError):
        return None
    ids = row["tokens"][0, : first + 1].tolist()
    parts: list[list[int]] = [[]]
    for token in ids:
        if tokenizer.decode([token], skip_special_tokens=True):
            parts[-1].append(token)
        elif parts[-1]:
            parts.append([])
    texts = [text for text in (tokenizer.decode(part).strip() for part in parts) if text]
    asked = texts[-2] if len(texts) > 1 else "".join(texts)  # the last one asks for the answer
    role, _, content = asked.partition("\n")
    return HeldOutTurn(ids=tuple(ids), shown=first_words(content if role in ROLES and content else asked))


def _length_of_first(row: Arrays) -> int:
    """Tokens of the first example of a row, whose positions restart at the next; at most `_MAX_TOKENS`."""
    restarts = np.flatnonzero(row["position_ids"][0] == 0)[1:] if "position_ids" in row else ()
    return min([_MAX_TOKENS, *map(int, restarts)])


def first_words(text: str) -> str:
    """Return the first line that has printable text, cut after a word."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if not line.isprintable() or len(line) <= _MAX_CHARS:
        return line if line.isprintable() else ""
    return line[: _MAX_CHARS + 1].rpartition(" ")[0] or line[:_MAX_CHARS]
