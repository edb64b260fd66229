"""A job file's text as a tree of nodes that remember their line and how they were written.

YAML is read by PyYAML's parser, event by event, and constructed here, for four reasons: scalars are those
of YAML 1.2; every node keeps its line; a duplicate key is an error instead of the last one winning; and
nesting, aliases and size are bounded, so that no file can exhaust the machine. Only text, numbers, true,
false, null, lists and mappings can come out: tags are refused.

What makes the text unreadable is raised; what is wrong with one key is collected, so that a user is told
of everything at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from forge.config.scalar import has_control_characters, resolve, with_environment
from forge.config.secret import SECRET_PROBLEM, is_secret
from forge.errors import JobFileError, printable

_MAX_BYTES = 2**20
_MAX_DEPTH = 24
_MAX_NODES = 10_000
"""Counted with every alias written out; a job file has about a hundred."""
_MAX_ERRORS = 50

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NOT_YAML = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""YAML 1.2.2, section 5.1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class YamlNode:
    """A value of the file: a scalar, or a list or mapping of nodes.

    Args:
        value: `str`, `int`, `float`, `bool`, `None`, `list[Node]` or `dict[str, Node]`.
        line: 1-based; that of the key, where there is one; None for what `--set` gave.
        text: a scalar as written; `[...]` or `{...}` for a list or mapping.
        size: nodes in this one, with every alias written out.
        height: levels beneath it.
    """

    value: Any
    line: int | None
    text: str
    size: int = 1
    height: int = 0

    def plain(self) -> Any:
        """The value without lines: what a YAML library would have given."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


def read_text(path: Path) -> str:
    """The file's text.

    Raises: JobFileError if it is missing, unreadable, larger than 1 MiB or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise JobFileError("there is no such file", path=str(path)) from None
    except IsADirectoryError:
        raise JobFileError("is a folder; give the job file itself", path=str(path)) from None
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
    """Read YAML text into nodes.

    Args:
        path: the file, or `--set` for a value from the command line.
        key: where in the job the text belongs; empty for the whole.
        errors: gets what is wrong with single keys; they are left out, or hold their text.

    Raises: JobFileError if the text is not one YAML document.
    """
    if match := _NOT_YAML.search(text):
        line = None if path == "--set" else text.count("\n", 0, match.start()) + 1
        problem = f"holds the character U+{ord(match[0]):04X}, which has no place in text"
        raise JobFileError(problem, path=path, line=line, key=key or None)
    return _Composer(text, path=path, errors=errors).document(key)


class _Composer:
    """One text on its way from events to nodes. `_event` is the next one, not yet taken."""

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
                raise self._error("a second document begins here; a job is one", event=self._event, key=key)
        except yaml.YAMLError as error:
            line = None if self._path == "--set" else _syntax_line(error)
            problem = _syntax_problem(error, text=self._text)
            raise JobFileError(problem, path=self._path, line=line, key=key or None) from None
        except (ValueError, OverflowError):  # PyYAML's own parser, for "\UFFFFFFFF" and the like
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
            self._complain(f"tags are not used in a job, and here is {tag}", event=event, key=key)
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
        # An anchor is known once its node is complete, so no node can hold itself.
        node = self._anchors.get(event.anchor)
        if node is None:
            raise self._error("this alias (*) has no anchor (&) of its name above", event=event, key=key)
        if depth + node.height > _MAX_DEPTH:
            raise self._error(f"is nested more than {_MAX_DEPTH} levels deep", event=event, key=key)
        self._count(node.size, event=event)
        self._advance()
        return replace(node, line=self._line(event))

    def _scalar(self, key: str) -> YamlNode:
        event = self._event
        written = " ".join(self._text[event.start_mark.index : event.end_mark.index].split())
        value = event.value
        try:
            value = with_environment(value)
            if event.implicit[0]:
                value = resolve(value)
            if isinstance(value, str) and has_control_characters(value):
                raise ValueError("holds a control character")
        except ValueError as error:
            self._complain(str(error), event=event, key=key, value=written)
        self._count(1, event=event)
        self._advance()
        return YamlNode(value=value, line=self._line(event), text=written)

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
                del self._errors[num_errors:]  # they may show the value
                self._complain(SECRET_PROBLEM, event=event, key=child_key)
            elif name in lines:
                first = f"; first on line {lines[name]}" if lines[name] else ""
                self._complain(f"is written twice{first}", event=event, key=child_key)
            else:
                children[name] = replace(child, line=self._line(event))
            lines.setdefault(name, self._line(event))
        self._advance()
        return self._collection(children, list(children.values()), event=start, text="{...}")

    def _name(self, key: str, *, depth: int) -> str | None:
        """The key of a mapping's next entry; None, and an error collected, if it cannot be one."""
        event = self._event
        if not isinstance(event, yaml.ScalarEvent):
            self._node(key, depth=depth + 1)
            self._complain("a key must be text, and here is something else", event=event, key=key)
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
            raise self._error(f"holds more than {_MAX_NODES} values, aliases written out", event=event, key="")

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
    """`training`, `zero` → `training.zero`; the whole job's name is empty."""
    return f"{section}.{name}" if section else name


def _name_problem(event: Any) -> str | None:
    if event.tag is not None:
        return "a key must be plain text, without a tag"
    if event.implicit[0] and event.value == "<<":
        return "'<<' merges nothing here; write the keys out"
    if not event.value or has_control_characters(event.value):
        return "a key must not be empty nor hold control characters"
    try:
        is_text = not event.implicit[0] or isinstance(resolve(event.value), str)
    except ValueError:
        is_text = False
    return None if is_text else f"a key must be text, and {printable(event.value, limit=60)} is not"


def _syntax_line(error: yaml.YAMLError) -> int | None:
    """Where to look: for a key or a quote that does not end, where it began."""
    mark = getattr(error, "problem_mark", None)
    if "scanning" in (getattr(error, "context", None) or ""):
        mark = getattr(error, "context_mark", None) or mark
    return None if mark is None else int(mark.line) + 1


def _syntax_problem(error: yaml.YAMLError, *, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is not None and text[mark.index - 1 : mark.index + 1] == "${":
        return "inside {} and [] a ${env:NAME} must be in quotes"
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    for fragment, sentence in _SYNTAX_PROBLEMS.items():
        if fragment in problem:
            return sentence
    return f"is not valid YAML: {problem}"


_SYNTAX_PROBLEMS = {
    "mapping values are not allowed": "a ':' is out of place: the line before may lack one or be "
    "indented differently, or a text with ': ' in it may lack quotes",
    "could not find expected ':'": "a ':' is missing after this key",
    "did not find expected key": "a key was expected: the indentation may differ from the lines above, "
    "or a quote or bracket may be open",
    "expected <block end>": "the indentation differs from the lines above, or a key is missing",
    "<document start>": "what came before is complete, and this does not belong to it: "
    "the indentation may differ from the first line's",
    "found a tab character": "a tab stands here; indent by spaces",
    "did not find expected '-'": "the indentation differs from the list items above",
    "cannot start any token": "a value cannot begin with this character: indent by spaces, not tabs, "
    "and write text with special characters in quotes",
    "did not find expected ',' or '}'": "a ',' or '}' is missing here or above",
    "did not find expected ',' or ']'": "a ',' or ']' is missing here or above",
    "found unexpected end of stream": "the quote that begins here is never closed",
}
"""What libyaml says, for those who do not know its grammar."""
