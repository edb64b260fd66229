"""Parse YAML text into a tree of nodes that keep their line number and how they were written.

PyYAML's parser produces events, and the nodes are built here, because no library does all of this: scalars follow
the core schema of YAML 1.2 (`forge.config.scalar`), every problem of a file is collected with its key and line, not
only the first, secrets never appear in a message, and size, depth and aliases are limited, so that no file can
exhaust the machine. A prototype on ruamel.yaml was 28 of 316 lines shorter, but lost three of the error reports,
parsed 40 times slower, and its own scalars read `1_000` as a number and `2024-01-31` as a date.

Only text, numbers, true, false, null, lists and mappings can result; tags are rejected. Text that is not YAML
raises; problems of single keys are collected.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from forge.config.scalar import has_control_characters, resolve, url_problem, with_environment
from forge.config.secret import SECRET_PROBLEM, is_secret
from forge.environment import looked_in
from forge.errors import JobFileError, printable

_MAX_BYTES = 2**20
_MAX_DEPTH = 24
_MAX_NODES = 10_000
"""With every alias expanded; a job file has about a hundred."""
_MAX_ERRORS = 50

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NOT_YAML = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""YAML 1.2.2, section 5.1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class YamlNode:
    """A value of the file: a scalar, or a list or mapping of nodes.

    Args:
        value: `str`, `int`, `float`, `bool`, `None`, `list[YamlNode]` or `dict[str, YamlNode]`.
        line: 1-based line of the key, or of the value if it has no key; None for a value from `--set`.
        text: a scalar as written; `[...]` or `{...}` for a list or mapping.
        template: a text in which `${env:NAME}` was replaced, before that.
        size: number of nodes in this one, itself included, with every alias expanded.
        height: number of levels below it.
    """

    value: Any
    line: int | None
    text: str
    template: str | None = None
    size: int = 1
    height: int = 0

    def plain(self, *, is_written: bool = False) -> Any:
        """Return the value as plain Python data, without lines.

        Args:
            is_written: `${env:NAME}` stays as it is written.
        """
        if isinstance(self.value, dict):
            return {key: child.plain(is_written=is_written) for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain(is_written=is_written) for child in self.value]
        return self.template if is_written and self.template is not None else self.value


def read_text(path: Path) -> str:
    """Read a file.

    Raises: JobFileError if it is missing, unreadable, larger than 1 MiB or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise JobFileError(f"no such file{looked_in(path)}", path=str(path)) from None
    except IsADirectoryError:
        raise JobFileError("is a folder; give the path of a file in it", path=str(path)) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise JobFileError(f"cannot be read: {reason}", path=str(path)) from None
    if len(data) > _MAX_BYTES:
        raise JobFileError("is larger than 1 MiB; a job file is a few kilobytes", path=str(path))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise JobFileError("is not UTF-8 text", path=str(path), line=line) from None


def compose(text: str, *, path: str, key: str = "", errors: list[JobFileError]) -> YamlNode:
    """Parse YAML text into nodes.

    Args:
        path: the file, or `--set` for a value from the command line.
        key: dotted key whose value the text is; empty for a whole file.
        errors: problems of single keys are appended; such keys are left out, or have their text as value.

    Raises: JobFileError if the text is not one YAML document.
    """
    if match := _NOT_YAML.search(text):
        line = None if path == "--set" else text.count("\n", 0, match.start()) + 1
        problem = f"contains the character U+{ord(match[0]):04X}, which YAML does not allow"
        raise JobFileError(problem, path=path, line=line, key=key or None)
    return _Composer(text, path=path, errors=errors).document(key)


class _Composer:
    """Builds the nodes of one text from parser events; `_event` is the next event, not yet consumed."""

    def __init__(self, text: str, *, path: str, errors: list[JobFileError]) -> None:
        self._text = text
        self._path = path
        self._errors = errors
        self._anchors: dict[str, YamlNode] = {}
        self._num_nodes = 0
        self._events: Iterator[Any] = iter(())
        self._event: Any = None

    def document(self, key: str) -> YamlNode:
        try:
            self._events = yaml.parse(self._text, Loader=_LOADER)
            self._advance()  # to the start of the stream
            self._advance()  # to the start of the document
            if isinstance(self._event, yaml.StreamEndEvent):
                return YamlNode(value=None, line=self._line(self._event), text="")
            self._advance()
            node = self._node(key, depth=0)
            self._advance()  # over the end of the document
            if not isinstance(self._event, yaml.StreamEndEvent):
                raise self._error("a second document starts here; only one is allowed", event=self._event, key=key)
        except yaml.YAMLError as error:
            line = None if self._path == "--set" else _syntax_line(error)
            problem = _syntax_problem(error, text=self._text)
            raise JobFileError(problem, path=self._path, line=line, key=key or None) from None
        except (ValueError, OverflowError):  # raised by PyYAML itself for "\UFFFFFFFF" and similar
            problem = "is not valid YAML: an escape or a directive has an impossible number"
            raise self._error(problem, event=self._event, key=key) from None
        return node

    def _node(self, key: str, *, depth: int) -> YamlNode:
        event = self._event
        if depth > _MAX_DEPTH:
            raise self._error(f"is nested more than {_MAX_DEPTH} levels deep", event=event, key=key)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(key, depth=depth)
        if event.tag is not None:
            tag = printable(event.tag.replace("tag:yaml.org,2002:", "!!", 1), limit=60)
            self._complain(f"YAML tags are not supported; remove {tag}", event=event, key=key)
        if isinstance(event, yaml.ScalarEvent):
            node = self._scalar(key)
        elif isinstance(event, yaml.MappingStartEvent):
            node = self._mapping(key, depth=depth)
        else:
            node = self._sequence(key, depth=depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _alias(self, key: str, *, depth: int) -> YamlNode:
        event = self._event
        # An anchor is registered when its node is complete, so that no node can contain itself.
        node = self._anchors.get(event.anchor)
        if node is None:
            raise self._error("this alias (*) has no anchor (&) with its name above it", event=event, key=key)
        if depth + node.height > _MAX_DEPTH:
            raise self._error(f"is nested more than {_MAX_DEPTH} levels deep", event=event, key=key)
        self._count(node.size, event=event)
        self._advance()
        return replace(node, line=self._line(event))

    def _scalar(self, key: str) -> YamlNode:
        event = self._event
        written: str | None = " ".join(self._text[event.start_mark.index : event.end_mark.index].split())
        value, template = event.value, None
        try:
            value = with_environment(value)
            template = event.value if value != event.value else None
            if event.implicit[0]:
                value = resolve(value)
            if isinstance(value, str) and has_control_characters(value):
                raise ValueError("contains a control character")
            if isinstance(value, str) and (problem := url_problem(value)) is not None:
                written = None  # not shown
                raise ValueError(problem)
        except ValueError as error:
            self._complain(str(error), event=event, key=key, value=written)
        self._count(1, event=event)
        self._advance()
        template = template if isinstance(value, str) else None
        return YamlNode(
            value=value, line=self._line(event), text="…" if written is None else written, template=template
        )

    def _mapping(self, key: str, *, depth: int) -> YamlNode:
        start = self._event
        children: dict[str, YamlNode] = {}
        lines: dict[str, int | None] = {}
        self._advance()
        while not isinstance(self._event, yaml.MappingEndEvent):
            event = self._event
            num_errors = len(self._errors)
            name = self._name(key, depth=depth)
            child_key = join_key(key, name) if name is not None else key
            child = self._node(child_key, depth=depth + 1)
            if name is None:
                continue
            if is_secret(name):
                del self._errors[num_errors:]  # they may contain the value
                self._complain(SECRET_PROBLEM, event=event, key=child_key)
            elif name in lines:
                first = f"; first on line {lines[name]}" if lines[name] else ""
                self._complain(f"duplicate key{first}", event=event, key=child_key)
            else:
                children[name] = replace(child, line=self._line(event))
            lines.setdefault(name, self._line(event))
        self._advance()
        return self._collection(children, list(children.values()), event=start, text="{...}")

    def _name(self, key: str, *, depth: int) -> str | None:
        """Consume the key of a mapping's next entry; return None, with the error collected, if it is not valid."""
        event = self._event
        if not isinstance(event, yaml.ScalarEvent):
            self._node(key, depth=depth + 1)
            self._complain("a key must be text, not a list, mapping or alias", event=event, key=key)
            return None
        self._count(1, event=event)
        self._advance()
        problem = _name_problem(event)
        if problem:
            self._complain(problem, event=event, key=key)
            return None
        name: str = event.value
        return name

    def _sequence(self, key: str, *, depth: int) -> YamlNode:
        start = self._event
        children: list[YamlNode] = []
        self._advance()
        while not isinstance(self._event, yaml.SequenceEndEvent):
            children.append(self._node(f"{key}[{len(children)}]", depth=depth + 1))
        self._advance()
        return self._collection(children, children, event=start, text="[...]")

    def _collection(self, value: Any, children: list[YamlNode], *, event: Any, text: str) -> YamlNode:
        self._count(1, event=event)
        size = 1 + sum(child.size for child in children)
        height = 1 + max((child.height for child in children), default=0)
        return YamlNode(value=value, line=self._line(event), text=text, size=size, height=height)

    def _count(self, num_nodes: int, *, event: Any) -> None:
        self._num_nodes += num_nodes
        if self._num_nodes > _MAX_NODES:
            raise self._error(f"contains more than {_MAX_NODES} values, with aliases expanded", event=event, key="")

    def _advance(self) -> None:
        self._event = next(self._events)

    def _line(self, event: Any) -> int | None:
        return None if self._path == "--set" else event.start_mark.line + 1

    def _complain(self, problem: str, *, event: Any, key: str, value: str | None = None) -> None:
        if len(self._errors) < _MAX_ERRORS:
            self._errors.append(self._error(problem, event=event, key=key, value=value))

    def _error(self, problem: str, *, event: Any, key: str, value: str | None = None) -> JobFileError:
        line = None if event is None else self._line(event)
        return JobFileError(problem, path=self._path, line=line, key=key or None, value=value)


def join_key(section: str, name: str) -> str:
    """`training`, `zero` → `training.zero`; the key of the whole file is empty."""
    return f"{section}.{name}" if section else name


def _name_problem(event: Any) -> str | None:
    if event.tag is not None:
        return "a key must be plain text, without a tag"
    if event.implicit[0] and event.value == "<<":
        return "merge keys ('<<') are not supported; write the keys out"
    if not event.value or has_control_characters(event.value):
        return "a key must not be empty or contain control characters"
    try:
        is_text = not event.implicit[0] or isinstance(resolve(event.value), str)
    except ValueError:
        is_text = False
    return None if is_text else f"a key must be text; write {printable(event.value, limit=60)} in quotes"


def _syntax_line(error: yaml.YAMLError) -> int | None:
    """Return the line to look at; for a key or quote that does not end, the line where it starts."""
    mark = getattr(error, "problem_mark", None)
    if "scanning" in (getattr(error, "context", None) or ""):
        mark = getattr(error, "context_mark", None) or mark
    return None if mark is None else int(mark.line) + 1


def _syntax_problem(error: yaml.YAMLError, *, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is not None and text[mark.index - 1 : mark.index + 1] == "${":
        return "inside {} and [], ${env:NAME} must be in quotes"
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    for fragment, sentence in _SYNTAX_PROBLEMS.items():
        if fragment in problem:
            return sentence
    return f"is not valid YAML: {problem}"


_SYNTAX_PROBLEMS = {
    "mapping values are not allowed": "a ':' is not allowed here: the line before may lack one or be "
    "indented differently, or text that contains ': ' may lack quotes",
    "could not find expected ':'": "a ':' is missing after this key",
    "did not find expected key": "a key was expected: the indentation may differ from the lines above, "
    "or a quote or bracket may be open",
    "expected <block end>": "the indentation differs from the lines above, or a key is missing",
    "<document start>": "this does not continue the document above: "
    "its indentation may differ from the first line's",
    "found a tab character": "a tab is not allowed here; indent with spaces",
    "did not find expected '-'": "the indentation differs from the list items above",
    "cannot start any token": "a value cannot start with this character: indent with spaces, not tabs, "
    "and write text with special characters in quotes",
    "did not find expected ',' or '}'": "a ',' or '}' is missing here or above",
    "did not find expected ',' or ']'": "a ',' or ']' is missing here or above",
    "found unexpected end of stream": "the quote that starts here is never closed",
}
"""libyaml's messages, in words that do not require its grammar."""
