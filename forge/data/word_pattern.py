"""The words that GPT-2 style tokenizers split a text into, as a pattern of Python's `re`."""

from __future__ import annotations

import re
import unicodedata
from functools import cache


@cache
def word_pattern() -> re.Pattern[str]:
    r"""GPT-2's pattern for Python's `re`, exact for every Unicode version of Python and the tokenizer.

        's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

    Letters and numbers are spelled out as those characters that had the same category in Unicode 3.2
    (2002, which Python includes) as today. Any other character, such as an emoji, is in `doubtful`, and no word
    branch matches next to one. The last branch matches it with its surroundings, up to the end of the text or the
    next visible ASCII character before an ASCII space, as one longer "word" that the tokenizer splits. Words always
    end there, so the ids are the same. (A single space that reaches its own branch belongs to the word after it,
    which no other branch matched.)
    """
    letter, number, space, other, doubtful = _character_classes()
    return re.compile(
        rf"'(?:[stmd]|re|ve|ll)"
        rf"| ?[{letter}]++(?![{doubtful}])"
        rf"| ?[{number}]++(?![{doubtful}])"
        rf"| ?[{other}]++(?![{doubtful}])"
        rf"|[{space}]++\Z"
        rf"|(?>[{space}]+(?=[{space}]))(?![{space}][{doubtful}])"
        rf"|(?! )[{space}](?![{space}{doubtful}])"
        r"|(?s:.+?)(?:(?<=[!-~])(?=[\t-\r ])|\Z)"
    )


def _character_classes() -> list[str]:
    """Character ranges: letters, numbers, spaces, others, and those that differ between Unicode versions."""
    then, now = unicodedata.ucd_3_2_0.category, unicodedata.category
    members: dict[str, list[int]] = {"L": [], "N": [], "space": [], "other": [], "doubtful": []}
    for code in range(0x10000):
        category = now(chr(code))
        if code in _SPACES:
            members["space"].append(code)
        elif category != then(chr(code)) or category in ("Cn", "Cs"):
            members["doubtful"].append(code)
        else:
            members[category[0] if category[0] in "LN" else "other"].append(code)
    members["doubtful"] += range(0x10000, 0x110000)
    return [_as_ranges(codes) for codes in members.values()]


_SPACES = {*map(ord, "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"), *range(0x2000, 0x200B)}
r"""`\s` of the tokenizer's pattern: White_Space of Unicode. (Python's own `\s` adds 0x1c to 0x1f.)"""


def _as_ranges(codes: list[int]) -> str:
    bounds = [code for code, before in zip(codes, [-2, *codes], strict=False) if code != before + 1]
    ends = [code for code, after in zip(codes, [*codes[1:], -2], strict=True) if code != after - 1]
    return "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in zip(bounds, ends, strict=True))
