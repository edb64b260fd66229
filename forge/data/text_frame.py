"""The special tokens around a whole text: those that its tokenizer puts there, and the end-of-text token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from forge.data.tokenizer import TextTokenizer
from forge.data.tokenizer_backend import tokenizer_errors
from forge.data.tokenizer_files import special_roles
from forge.errors import DataError

_PROBE = "a"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFrame:
    """Token ids before and after those of a text; the last one ends it."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.before) + len(self.after)

    def around(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the ids of a text with those around it."""
        return np.concatenate([self.before, ids, self.after]).astype(np.int64)


def text_frame(tokenizer: TextTokenizer) -> TextFrame:
    """Return what a tokenizer puts around a text when transformers calls it, and an end of text if it puts none.

    T5 puts `</s>` after it, BART `<s>` before and `</s>` after it, a byte-level BPE of its own kind nothing.

    Raises: DataError if it puts a token there that says something about the text, such as its language, or fails.
    """
    with tokenizer_errors():
        backend = Tokenizer.from_str(tokenizer.content)
        plain, whole = (backend.encode(_PROBE, add_special_tokens=added).ids for added in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0) if plain else 0
    before, after = whole[:at], whole[at + len(plain) :]
    roles = special_roles(content=tokenizer.content, config=tokenizer.config, files=tokenizer.files)
    known = {tokenizer.eot_id, *(backend.token_to_id(token) for token in roles.values())}
    strange = [token for token in (*before, *after) if token not in known]
    if strange:
        token = backend.id_to_token(strange[0])
        raise DataError(
            f"the tokenizer puts {token} around every text, and no role of its tokenizer_config.json says what "
            "it is (the language of the text?); pairs of such a tokenizer are not supported"
        )
    if tokenizer.eot_id not in after[-1:]:
        after = [*after, tokenizer.eot_id]
    return TextFrame(before=tuple(before), after=tuple(after))
