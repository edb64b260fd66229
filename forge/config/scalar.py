"""What a scalar of the job file stands for: text, number, true, false or null.

The rules are those of YAML 1.2.2's core schema (section 10.3.2), so `no` and `on` are text, `1e-3` is a
number and a date stays text. Octal and hexadecimal numbers are left out: they stay text.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata

from forge.errors import printable

_NULL = re.compile(r"|~|null|Null|NULL")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_VARIABLE = re.compile(r"\$\{([^}]*)\}?")
_NAME = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")


def resolve(text: str) -> str | int | float | bool | None:
    """The value of an unquoted scalar.

    Raises: ValueError for a number that is infinite, no number or 2⁶³ and more.
    """
    if _NULL.fullmatch(text):
        return None
    if match := _BOOL.fullmatch(text):
        return match[1] is not None
    if _NOT_FINITE.fullmatch(text):
        raise ValueError("must be a finite number")
    if _INT.fullmatch(text):
        # int() refuses more than 4,300 digits; the leading zeros do not count.
        if len(text.lstrip("+-0")) > 19 or abs(int(text)) >= 2**63:
            raise ValueError("is too large a number")
        return int(text)
    if _FLOAT.fullmatch(text):
        value = float(text)
        if not math.isfinite(value):
            raise ValueError("is too large a number")
        return value
    return text


def with_environment(text: str) -> str:
    """`text` with every `${env:NAME}` replaced.

    Raises: ValueError if a variable is not set, or `${` begins anything else.
    """
    return _VARIABLE.sub(_variable, text)


def has_control_characters(text: str) -> bool:
    """Whether a string holds what neither a name nor a path should: control characters, half a surrogate pair."""
    return any(unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t" for character in text)


def _variable(match: re.Match[str]) -> str:
    name = _NAME.fullmatch(match[1])
    if not name or not match[0].endswith("}"):
        raise ValueError("only ${env:NAME} is replaced; there is no other ${...}")
    if name[1] not in os.environ:
        raise ValueError(f"the environment variable {printable(name[1], limit=80)} is not set")
    return os.environ[name[1]]
