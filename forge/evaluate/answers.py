"""Read the answer in what a model has written.

Regular expressions are RE2's, whose time is linear in the text whatever the pattern: a score must not depend on how
fast a machine is, so a limit of time could only be an error. Every other reading is linear too.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal, InvalidOperation, localcontext
from itertools import islice
from typing import Any

from forge.config.task import AnswerSpec
from forge.errors import ArgumentError

Reader = Callable[[str], str | None]

_NUMBER = re.compile(
    r"(?<![\w.])[-+−]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?:(?<=\d)[eE][-+]?\d{1,6}(?!\w))?"
)
_MAX_NUMBER_CHARS = 400
_MAX_OBJECTS = 16
"""Places at which a JSON object may begin that are tried."""
_RE2_MEMORY_BYTES = 1 << 26


def build_reader(spec: AnswerSpec, *, choices: Sequence[str] = ()) -> Reader:
    """Return the function that reads an answer, or None where the text has none.

    Args:
        choices: the labels, for `read: label`.

    Raises: ArgumentError for a pattern that RE2 does not accept, or if it is not installed.
    """
    read = _reader(spec, choices=choices)

    def reader(text: str) -> str | None:
        answer = read(text)
        return None if answer is None else normalized(answer, spec=spec)

    return reader


def normalized(text: str, *, spec: AnswerSpec) -> str:
    """An answer or a target as metrics compare it: its Unicode form, no blanks around it, numbers as digits."""
    if spec.unicode != "none":
        text = unicodedata.normalize(spec.unicode, text)
    if spec.read == "number":
        return canonical_number(text) or text
    return text.strip() if spec.strip else text


def canonical_number(text: str) -> str | None:
    """`1,234.50` → `1234.5`; None for what is no number."""
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    try:
        with localcontext(prec=_MAX_NUMBER_CHARS):
            number = Decimal(text.strip().replace(",", "").replace("−", "-")).normalize()
    except InvalidOperation:
        return None
    if not number.is_finite():
        return None
    if not number:
        return "0"
    return f"{number:f}" if -20 < number.adjusted() < 20 else str(number)


def _reader(spec: AnswerSpec, *, choices: Sequence[str]) -> Reader:
    is_last = spec.which == "last"
    if spec.read == "first-line":
        return _first_line
    if spec.read == "number":
        is_last = spec.which != "first"
        return lambda text: _number(text, is_last=is_last)
    if spec.read == "label":
        return _label_reader(choices, is_last=is_last)
    if spec.read == "json":
        path = (spec.field or "").split(".")
        return lambda text: _json_field(text, path=path)
    if spec.read == "regex":
        return _regex_reader(spec.pattern or "", is_last=is_last)
    return lambda text: text


def _chosen(found: Iterator[str], *, is_last: bool) -> str | None:
    if not is_last:
        return next(found, None)
    answer = None
    for answer in found:  # noqa: B007
        pass
    return answer


def _first_line(text: str) -> str | None:
    return next((line for line in text.splitlines() if line.strip()), None)


def _number(text: str, *, is_last: bool) -> str | None:
    found: list[str] = _NUMBER.findall(text)
    return next(filter(None, map(canonical_number, reversed(found) if is_last else found)), None)


def _label_reader(choices: Sequence[str], *, is_last: bool) -> Reader:
    """Labels as words of the text, whatever their case; where one begins with another, the longer one."""
    by_folded = {choice.casefold(): choice for choice in reversed(choices)}
    longest_first = sorted(by_folded, key=lambda label: (-len(label), label))
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
    return lambda text: _chosen(
        (by_folded[match[0]] for match in pattern.finditer(text.casefold())), is_last=is_last
    )


def _json_field(text: str, *, path: Sequence[str]) -> str | None:
    """A field of the first JSON object of a text: text as it is, any other value as JSON."""
    decoder = json.JSONDecoder()
    for match in islice(re.finditer(r"\{", text), _MAX_OBJECTS):
        try:
            found: Any = decoder.raw_decode(text, match.start())[0]
        except (ValueError, RecursionError):
            continue
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        if found is None or isinstance(found, str):
            return found
        return json.dumps(found, sort_keys=True, ensure_ascii=False)
    return None


def _regex_reader(pattern: str, *, is_last: bool) -> Reader:
    try:
        import re2
    except ModuleNotFoundError as error:
        raise ArgumentError("answer.pattern needs RE2: pip install 'forge-train[eval]'") from error
    options = re2.Options()
    options.max_mem, options.log_errors = _RE2_MEMORY_BYTES, False
    try:
        compiled = re2.compile(pattern, options)
    except re2.error as error:
        message = error.args[0].decode() if isinstance(error.args[0], bytes) else error
        raise ArgumentError(f"is not a regular expression of RE2: {message}") from None
    group = 1 if compiled.groups else 0

    def read(text: str) -> str | None:
        searched = text.encode("utf-8", "replace").decode()  # RE2 reads UTF-8, which has no half surrogate pairs
        found = (match[group] for match in compiled.finditer(searched))
        return _chosen((one for one in found if one is not None), is_last=is_last)

    return read
