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
from forge.redact import is_credential

_NULL = re.compile(r"|~|null|Null|NULL")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_VARIABLE = re.compile(r"\$\{([^}]*)\}?")
_NAME = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,30})://((?P<user>[^/\s?#]*)@)?(?P<rest>\S*)")
_AZURE_SCHEMES = ("abfs", "abfss", "wasb", "wasbs", "az")
"""In `abfs://CONTAINER@ACCOUNT.dfs.core.windows.net` the part before the @ is no user."""
_SIGNED = re.compile(
    r"[?&#;][^=&\s]{0,80}(sig|signature|token|secret|password|passwd|credential|api_?-?key|access_?-?key)[^=&\s]{0,80}=",
    re.IGNORECASE,
)
"""A pre-signed URL, or one with a key among its parameters."""
_COPIED = (
    "forge would copy into files, logs and W&B; give credentials to the storage or tracking library, which reads "
    "them from the environment"
)


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

    Raises: ValueError if a variable is not set or is a credential, or `${` starts anything else.
    """
    return _VARIABLE.sub(_variable, text)


def variables_in(text: str) -> set[str]:
    """Return the names of the environment variables that a text refers to."""
    names = (_NAME.fullmatch(match[1]) for match in _VARIABLE.finditer(text))
    return {name[1] for name in names if name}


def url_problem(text: str) -> str | None:
    """Return why a text must not be in a file: it contains a URL with a user name, a password or a key."""
    if "://" not in text:
        return None
    for match in _URL.finditer(text):
        scheme, user, rest = match["scheme"].lower(), match["user"], match["rest"]
        if user is not None and (scheme not in _AZURE_SCHEMES or ":" in user):
            return f"contains the user name or password of a URL, which {_COPIED}"
        if _SIGNED.search(rest):
            return f"contains a key or signature of a URL, which {_COPIED}"
    return None


def has_control_characters(text: str) -> bool:
    """Whether a string contains control characters (other than newline and tab) or unpaired surrogates."""
    return any(unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t" for character in text)


def _variable(match: re.Match[str]) -> str:
    name = _NAME.fullmatch(match[1])
    if not name or not match[0].endswith("}"):
        raise ValueError("only ${env:NAME} is supported, no other ${...}")
    if is_credential(name[1]):
        raise ValueError(
            f"${{env:{printable(name[1], limit=80)}}} may be a credential, which {_COPIED}; or rename the variable "
            "if it is none"
        )
    if name[1] not in os.environ:
        raise ValueError(f"the environment variable {printable(name[1], limit=80)} is not set")
    return os.environ[name[1]]
