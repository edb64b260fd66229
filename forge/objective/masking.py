"""Which tokens are masked, and what stands in their place.

Of the chosen tokens 80 % become the mask token, 10 % a random token, and 10 % stay. A sequence has an exact number
of them: the share times its tokens, rounded, at least one.

Source: Devlin et al., arXiv 1810.04805, section 3.1 and appendix A.1; whole words: the release notes of BERT of May
2019.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.config.training import MaskingSpec, TrainingSpec
from forge.data.rows import IGNORED, Arrays
from forge.data.tokenizer_files import read_json, role_token, special_ids
from forge.errors import DataError

_SHARE_MASKED, _SHARE_RANDOM = 0.8, 0.1
_WORD_MARKS = ("▁", "Ġ", "Ċ", "ĉ")
"""First characters of tokens that begin a word: of SentencePiece, and space, newline and tab of byte-level BPE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenKinds:
    """What masking must know of a vocabulary.

    Shapes: ordinary: int64[k], the ids that may be masked and may stand for others; is_ordinary: bool[V];
    begins_word: bool[V].
    """

    mask_id: int
    ordinary: NDArray[np.int64]
    is_ordinary: NDArray[np.bool_]
    begins_word: NDArray[np.bool_]

    @classmethod
    def of(cls, folder: Path) -> TokenKinds:
        """Read them from a tokenizer's folder.

        Raises: DataError if it has no mask token, or cannot be read.
        """
        name, special = role_token(folder, "mask_token"), special_ids(folder)
        if name is None or name not in special:
            raise DataError(f"the tokenizer in {folder} has no mask token")
        content = read_json(folder / "tokenizer.json")
        vocabulary, begins = _vocabulary(content), _begins_word(content)
        size = max([*vocabulary.values(), *special.values()]) + 1
        is_ordinary, begins_word = np.zeros(size, dtype=np.bool_), np.ones(size, dtype=np.bool_)
        is_ordinary[list(vocabulary.values())] = True
        is_ordinary[list(special.values())] = False
        for token, number in vocabulary.items():
            begins_word[number] = begins(token)
        return cls(
            mask_id=special[name],
            ordinary=np.flatnonzero(is_ordinary),
            is_ordinary=is_ordinary,
            begins_word=begins_word,
        )


def draw_masks(
    tokens: NDArray[np.int64],
    *,
    is_token: NDArray[np.bool_],
    seeds: NDArray[np.uint64],
    spec: MaskingSpec,
    kinds: TokenKinds,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Mask tokens of sequences; the same for the same tokens and seeds.

    Shapes: tokens: int64[n, L]; is_token: bool[n, L]; seeds: uint64[n].
    Returns: the tokens with masks, and the targets: the masked tokens, -100 elsewhere. Both int64[n, L].
    """
    masked, targets = tokens.copy(), np.full_like(tokens, IGNORED)
    for i, seed in enumerate(seeds.tolist()):
        draw = np.random.Generator(np.random.Philox(key=seed))
        candidates = np.flatnonzero(is_token[i] & kinds.is_ordinary[tokens[i]])
        if not len(candidates):
            continue
        chosen = _chosen(candidates, tokens=tokens[i], spec=spec, kinds=kinds, draw=draw)
        targets[i, chosen] = tokens[i, chosen]
        fate = draw.random(len(chosen))
        masked[i, chosen[fate < _SHARE_MASKED]] = kinds.mask_id
        replaced = chosen[(fate >= _SHARE_MASKED) & (fate < _SHARE_MASKED + _SHARE_RANDOM)]
        masked[i, replaced] = draw.choice(kinds.ordinary, size=len(replaced))
    return masked, targets


def show_masks(arrays: Arrays, *, seed: int, training: TrainingSpec, tokenizer: Path) -> Arrays:
    """Mask one example as a step might; every step draws other masks.

    Shapes: arrays: `tokens` int[n] and others. Returns: the same with masks in `tokens`, and new `targets`.
    """
    tokens = np.asarray(arrays["tokens"], dtype=np.int64)[None]
    masked, targets = draw_masks(
        tokens,
        is_token=np.ones(tokens.shape, dtype=np.bool_),
        seeds=np.array([seed], dtype=np.uint64),
        spec=training.masking,
        kinds=_kinds_of(tokenizer),
    )
    return {**arrays, "tokens": masked[0], "targets": targets[0]}


@lru_cache(maxsize=1)
def _kinds_of(tokenizer: Path) -> TokenKinds:
    return TokenKinds.of(tokenizer)


def _chosen(
    candidates: NDArray[np.int64],
    *,
    tokens: NDArray[np.int64],
    spec: MaskingSpec,
    kinds: TokenKinds,
    draw: np.random.Generator,
) -> NDArray[np.int64]:
    count = max(1, round(spec.share * len(candidates)))
    if not spec.whole_words:
        return np.sort(draw.permutation(candidates)[:count])
    words = list(_words(candidates, tokens=tokens, kinds=kinds))
    chosen: list[int] = []
    for index in draw.permutation(len(words)).tolist():
        word = words[index]
        if not chosen or len(chosen) + len(word) <= count:  # the first is taken whatever its length
            chosen += word
        if len(chosen) >= count:
            break
    return np.array(sorted(chosen), dtype=np.int64)


def _words(candidates: NDArray[np.int64], *, tokens: NDArray[np.int64], kinds: TokenKinds) -> Iterator[list[int]]:
    """Positions of each word: a token that begins one, and the tokens right after it that do not."""
    word: list[int] = []
    for position in candidates.tolist():
        continues = word and position == word[-1] + 1 and not kinds.begins_word[tokens[position]]
        if word and not continues:
            yield word
            word = []
        word.append(position)
    yield word


def _vocabulary(content: Mapping[str, Any]) -> dict[str, int]:
    """Token → id of a tokenizer's model; of a unigram model the position in its list."""
    vocabulary = content.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):
        return {str(entry[0]): number for number, entry in enumerate(vocabulary)}
    return dict(vocabulary)


def _begins_word(content: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return what decides whether a token begins a word.

    WordPiece marks the tokens that continue one; SentencePiece and byte-level BPE mark the space before a word, and
    punctuation begins one.
    """
    model = content.get("model", {})
    if model.get("type") == "WordPiece":
        prefix = str(model.get("continuing_subword_prefix") or "##")
        return lambda token: not token.startswith(prefix)
    is_ascii_only = "ByteLevel" in json.dumps(content.get("decoder"))  # other first characters are parts of letters

    def begins(token: str) -> bool:
        if token.startswith(_WORD_MARKS):
            return True
        return not token[:1].isalnum() and not (is_ascii_only and not token.isascii())

    return begins
