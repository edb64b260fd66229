"""Which tokens are masked, and what replaces them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from forge.config.training import MaskingSpec
from forge.data.rows import IGNORED
from forge.errors import DataError
from forge.objective.masking import TokenKinds, draw_masks
from tests.support.objectives import write_tokenizer

SEEDS = np.arange(1, 65, dtype=np.uint64)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> TokenKinds:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return TokenKinds.of(folder)


def some_tokens(kinds: TokenKinds, *, count: int = 64, length: int = 100) -> np.ndarray:
    return np.random.default_rng(0).choice(kinds.ordinary, size=(count, length))


def test_draw_masks__any_sequence__has_the_share_and_the_three_fates(kinds: TokenKinds) -> None:
    tokens = some_tokens(kinds, length=1000)
    whole = np.ones(tokens.shape, dtype=bool)
    masked, targets = draw_masks(tokens, is_token=whole, seeds=SEEDS, spec=MaskingSpec(), kinds=kinds)
    chosen = targets != IGNORED
    assert (chosen.sum(axis=1) == 150).all()
    assert (targets[chosen] == tokens[chosen]).all() and (masked[~chosen] == tokens[~chosen]).all()
    is_mask, is_same = masked[chosen] == kinds.mask_id, masked[chosen] == tokens[chosen]
    assert is_mask.mean() == pytest.approx(0.8, abs=0.02)
    assert is_same.mean() == pytest.approx(0.1, abs=0.02)
    assert kinds.is_ordinary[masked[chosen][~is_mask]].all()


def test_draw_masks__same_seed__same_masks_whatever_is_beside_it(kinds: TokenKinds) -> None:
    tokens = some_tokens(kinds)
    whole = np.ones(tokens.shape, dtype=bool)
    masked, _ = draw_masks(tokens, is_token=whole, seeds=SEEDS, spec=MaskingSpec(), kinds=kinds)
    one, _ = draw_masks(tokens[5:6], is_token=whole[5:6], seeds=SEEDS[5:6], spec=MaskingSpec(), kinds=kinds)
    assert (one == masked[5:6]).all()
    other, _ = draw_masks(tokens, is_token=whole, seeds=SEEDS + np.uint64(1), spec=MaskingSpec(), kinds=kinds)
    assert (other != masked).any(axis=1).all()


def test_draw_masks__special_tokens_and_padding__are_never_masked(kinds: TokenKinds) -> None:
    tokens = some_tokens(kinds)
    special = np.flatnonzero(~kinds.is_ordinary)
    tokens[:, ::3] = special[0]
    is_token = np.ones(tokens.shape, dtype=bool)
    is_token[:, 50:] = False
    _, targets = draw_masks(tokens, is_token=is_token, seeds=SEEDS, spec=MaskingSpec(share=0.9), kinds=kinds)
    chosen = targets != IGNORED
    assert not chosen[:, ::3].any() and not chosen[:, 50:].any()
    tokens[:] = special[0]
    _, targets = draw_masks(tokens, is_token=is_token, seeds=SEEDS, spec=MaskingSpec(), kinds=kinds)
    assert (targets == IGNORED).all()


def test_draw_masks__whole_words__are_masked_whole_or_not(kinds: TokenKinds) -> None:
    tokens = some_tokens(kinds)
    whole = np.ones(tokens.shape, dtype=bool)
    spec = MaskingSpec(whole_words=True)
    _, targets = draw_masks(tokens, is_token=whole, seeds=SEEDS, spec=spec, kinds=kinds)
    chosen = targets != IGNORED
    continues = ~kinds.begins_word[tokens[:, 1:]]
    assert continues.any()
    assert (chosen[:, 1:] == chosen[:, :-1])[continues].all()
    assert 8 <= chosen.sum(axis=1).mean() <= 15


@pytest.mark.parametrize(
    ("token", "begins"),
    [("Ġfox", True), ("ox", False), (".", True), ("Ċ", True), ("Ã©", False), ("7", False), ("Ġ", True)],
)
def test_token_kinds__byte_level__words_begin_at_spaces_and_punctuation(
    tmp_path: Path, token: str, begins: bool
) -> None:
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    number = vocabulary.setdefault(token, max(vocabulary.values()) + 1)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert TokenKinds.of(tmp_path).begins_word[number] == begins


def test_token_kinds__word_piece__marks_continue_a_word(tmp_path: Path) -> None:
    added = [{"id": 3, "content": "[MASK]", "special": True}]
    model = {"type": "WordPiece", "continuing_subword_prefix": "##", "vocab": {"un": 0, "##able": 1, "é": 2}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": "[MASK]"}}))
    kinds = TokenKinds.of(tmp_path)
    assert (kinds.mask_id, kinds.begins_word.tolist()) == (3, [True, False, True, True])


def test_token_kinds__no_mask_token__is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="has no mask token"):
        TokenKinds.of(tmp_path)
