"""Values of YAML scalars: text, number, true, false or null.

The rules are the core schema of YAML 1.2.2 (section 10.3.2): `no` and `on` are text, `1e-3` is a number, and a date
stays text. The one difference: octal and hexadecimal numbers (`0o7`, `0x10`) stay text too.
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
    """Return the value of an unquoted scalar.

    Raises: ValueError for a number that is infinite or not a number, or an integer of 2⁶³ or more.
    """
    if _NULL.fullmatch(text):
        return None
    if match := _BOOL.fullmatch(text):
        return match[1] is not None
    if _NOT_FINITE.fullmatch(text):
        raise ValueError("must be a finite number")
    if _INT.fullmatch(text):
        # int() refuses more than 4,300 digits, not counting leading zeros.
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
    """Return `text` with every `${env:NAME}` replaced.

    Raises: ValueError if a variable is not set, or `${` starts anything else.
    """
    return _VARIABLE.sub(_variable, text)


def has_control_characters(text: str) -> bool:
    """Whether a string contains control characters (other than newline and tab) or unpaired surrogates."""
    return any(unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t" for character in text)


def _variable(match: re.Match[str]) -> str:
    name = _NAME.fullmatch(match[1])
    if not name or not match[0].endswith("}"):
        raise ValueError("only ${env:NAME} is supported, no other ${...}")
    if name[1] not in os.environ:
        raise ValueError(f"the environment variable {printable(name[1], limit=80)} is not set")
    return os.environ[name[1]]
