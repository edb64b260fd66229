"""Locations of the keys in a job file, so that later checks can report a line.

The loader checks types only; for instance, only transformers knows that `model.hidden_size` must be a multiple of
the number of heads. Such a check raises `source.error("model.hidden_size", "is not a multiple of ...")`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from forge.config.secret import has_credential, is_secret
from forge.config.section import FieldErrors
from forge.config.yaml_reader import YamlNode, join_key
from forge.errors import JobFileError


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLocation:
    """Line and text of one key.

    Args:
        line: 1-based; None for a value from `--set`.
        text: a scalar as written; `[...]` or `{...}` for a list or mapping.
    """

    line: int | None
    text: str

    @property
    def is_scalar(self) -> bool:
        """Whether the value is a scalar, which an error message can show."""
        return self.text[:1] not in ("", "{", "[")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceMap:
    """Location of every key in the file, by dotted key: `training.zero`, `data.files[0]`; `` is the whole file."""

    path: str
    locations: Mapping[str, SourceLocation]

    def error(self, key: str, problem: str, *, nearest: str | None = None, show_value: bool = True) -> JobFileError:
        """Return a JobFileError with the line of `key` or, if the file does not have it, of its section."""
        own = self.locations.get(key)
        location = own or self._nearest_location(key)
        is_hidden = is_secret(key.rpartition(".")[2]) or key == "alerts.webhook"
        is_shown = show_value and own is not None and own.is_scalar and not is_hidden
        return JobFileError(
            problem,
            path=self.path if location.line is not None else "--set",
            line=location.line,
            key=key or None,
            value=location.text if is_shown and not _has_credential(location.text) else None,
            nearest=nearest,
        )

    def errors(self, found: FieldErrors) -> JobFileError:
        """Return one JobFileError of several fields, given by their dotted keys."""
        return combined([self.error(error.key, str(error), nearest=error.nearest) for error in found.errors])

    def _nearest_location(self, key: str) -> SourceLocation:
        while key:
            key = parent_key(key)
            if key in self.locations:
                return self.locations[key]
        return SourceLocation(line=1, text="")


def _has_credential(text: str) -> bool:
    """Whether a value as written is a URL that must not be shown."""
    return "://" in text and has_credential(text.strip("'\""))


def map_source(root: YamlNode, *, path: str) -> SourceMap:
    """Return the locations of all nodes below `root`."""
    locations: dict[str, SourceLocation] = {}

    def visit(node: YamlNode, key: str) -> None:
        locations[key] = SourceLocation(line=node.line, text=node.text)
        if isinstance(node.value, dict):
            for name, child in node.value.items():
                visit(child, join_key(key, name))
        elif isinstance(node.value, list):
            for index, child in enumerate(node.value):
                visit(child, f"{key}[{index}]")

    visit(root, "")
    return SourceMap(path=path, locations=locations)


def combined(errors: Sequence[JobFileError]) -> JobFileError:
    """Combine errors into one, in the order of the file, `--set` last."""
    first, *others = sorted(errors, key=lambda error: math.inf if error.line is None else error.line)
    return JobFileError(
        first.problem,
        path=first.path,
        line=first.line,
        key=first.key,
        value=first.value,
        nearest=first.nearest,
        others=tuple(others),
    )


def parent_key(key: str) -> str:
    """`training.zero` → `training`; `data.files[0]` → `data.files`; `name` → ``."""
    return key[: max(key.rfind("."), key.rfind("["), 0)]
