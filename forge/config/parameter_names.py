"""Patterns for names of parameters, as `model.freeze` and `training.optimizer.groups` use them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that a glob pattern matches, and those below a name that it matches."""
    return [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]


def near(pattern: str, names: Iterable[str]) -> str:
    """Suggest up to three names of parameters or modules that resemble a pattern, as the end of a message."""
    names = list(names)
    modules = {name.rpartition(".")[0] for name in names}
    found = difflib.get_close_matches(pattern.replace("*", ""), sorted({*names, *modules}), n=3, cutoff=0.4)
    return f"; names like it are {', '.join(found)}" if found else ""
