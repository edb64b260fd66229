"""Keep `${env:NAME}` in the files that forge writes, instead of the variable's value.

A job is checked and run with the values. What is written of it - `job.yaml`, `plan.json` and the configuration in
the tracker - has the text of the job file at every key whose value is still what that text stands for. Numbers are
written as numbers. Keys are named by JSON pointers (RFC 6901): `/data/files/0`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from forge.config.scalar import variables_in, with_environment
from forge.config.yaml_reader import YamlNode


def templates_of(root: YamlNode) -> dict[str, str]:
    """Return the texts with `${env:NAME}` of a file, by their JSON pointers."""
    return dict(_templates(root, ""))


def with_templates(body: Any, templates: Mapping[str, str]) -> Any:
    """Return a dumped job with `${env:NAME}` at the keys whose value is what that stands for now."""

    def written(value: str, template: str) -> str:
        return template if _expanded(template) in (value, None) else value

    return _replaced(body, templates, written)


def without_templates(body: Any, templates: Mapping[str, str]) -> Any:
    """Return a dumped job with the values of environment variables; a text stays if one of them is not set.

    Raises: ValueError if a variable is a credential.
    """

    def read(value: str, template: str) -> str:
        return with_environment(value) if value == template and _expanded(template) is not None else value

    for template in templates.values():
        _expanded(template)
    return _replaced(body, templates, read)


def variables_of(templates: Mapping[str, str]) -> set[str]:
    """Return the names of all variables in some texts."""
    return {name for template in templates.values() for name in variables_in(template)}


def _templates(node: YamlNode, pointer: str) -> Iterator[tuple[str, str]]:
    if node.template is not None:
        yield pointer, node.template
    elif isinstance(node.value, dict):
        for name, child in node.value.items():
            yield from _templates(child, f"{pointer}/{_escaped(name)}")
    elif isinstance(node.value, list):
        for index, child in enumerate(node.value):
            yield from _templates(child, f"{pointer}/{index}")


def _replaced(
    body: Any, templates: Mapping[str, str], replace: Callable[[str, str], str], pointer: str = ""
) -> Any:
    if isinstance(body, dict):
        return {
            name: _replaced(value, templates, replace, f"{pointer}/{_escaped(name)}")
            for name, value in body.items()
        }
    if isinstance(body, list):
        # A single text is read as a list of one, as in `files: corpus.txt`.
        is_single = len(body) == 1 and pointer in templates
        return [
            _replaced(value, templates, replace, pointer if is_single else f"{pointer}/{index}")
            for index, value in enumerate(body)
        ]
    if isinstance(body, str) and pointer in templates:
        return replace(body, templates[pointer])
    return body


def _expanded(template: str) -> str | None:
    """Return a text with the values of its variables; None if one is not set.

    Raises: ValueError for a credential, and for any other `${...}`.
    """
    if any(name not in os.environ for name in variables_in(template)):
        return None
    return with_environment(template)


def _escaped(name: str) -> str:
    return str(name).replace("~", "~0").replace("/", "~1")
