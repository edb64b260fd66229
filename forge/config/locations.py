"""Where in the job file each key stands, so that a later stage can blame a line.

The loader knows only the types; that `model.hidden_size` is no multiple of the heads, transformers knows.
Whoever finds such a thing raises `source.error("model.hidden_size", "is no multiple of ...")`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from forge.config.secret import is_secret
from forge.config.yaml_reader import YamlNode, join_key
from forge.errors import JobFileError


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLocation:
    """Where one key stands and what is written there.

    Args:
        line: 1-based; None for what `--set` gave.
        text: a scalar as written; `[...]` or `{...}` for a list or mapping.
    """

    line: int | None
    text: str

    @property
    def is_scalar(self) -> bool:
        """Whether something is written there that can be shown in a few words."""
        return self.text[:1] not in ("", "{", "[")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceMap:
    """The place of every dotted key that was written: `training.zero`, `data.files[0]`; `` is the whole job."""

    path: str
    places: Mapping[str, SourceLocation]

    def error(self, key: str, problem: str, *, nearest: str | None = None, show_value: bool = True) -> JobFileError:
        """A JobFileError that blames `key`; if it was not written, the section it belongs to."""
        place = self.places.get(key)
        blamed = place or self._nearest_place(key)
        is_shown = show_value and place is not None and place.is_scalar and not is_secret(key.rpartition(".")[2])
        return JobFileError(
            problem,
            path=self.path if blamed.line is not None else "--set",
            line=blamed.line,
            key=key or None,
            value=blamed.text if is_shown else None,
            nearest=nearest,
        )

    def _nearest_place(self, key: str) -> SourceLocation:
        while key:
            key = parent_key(key)
            if key in self.places:
                return self.places[key]
        return SourceLocation(line=1, text="")


def map_source(root: YamlNode, *, path: str) -> SourceMap:
    """The places of a job's nodes."""
    places: dict[str, SourceLocation] = {}

    def visit(node: YamlNode, key: str) -> None:
        places[key] = SourceLocation(line=node.line, text=node.text)
        if isinstance(node.value, dict):
            for name, child in node.value.items():
                visit(child, join_key(key, name))
        elif isinstance(node.value, list):
            for index, child in enumerate(node.value):
                visit(child, f"{key}[{index}]")

    visit(root, "")
    return SourceMap(path=path, places=places)


def parent_key(key: str) -> str:
    """`training.zero` → `training`; `data.files[0]` → `data.files`; `name` → ``."""
    return key[: max(key.rfind("."), key.rfind("["), 0)]
