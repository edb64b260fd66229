"""Generate the job file reference from its types: `python -m forge.config.reference > docs/job-file.md`.

It needs a checkout, not only the installed package, because its example is `jobs/pretrain.yaml`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge.config.fields import ANY_KEY, known_sections
from forge.config.job import JobSpec
from forge.config.schema import job_schema
from forge.config.section import Section
from forge.config.yaml_reader import join_key

_EXAMPLE = Path(__file__).parents[2] / "jobs" / "pretrain.yaml"

_INTRODUCTION = """\
# The job file

One YAML file defines what is trained, on which data, for how long and on how many machines. This page is generated
from the types in `forge/config` and lists every key.

- **Strict.** An unknown key, a duplicate key or a value of the wrong type is an error that names file, line, key
  and the nearest valid one. Nothing starts until the whole file is valid.
- **Units.** Sizes, durations, counts and ranges have readable forms: `20M`, `10m`, `50 steps`, `1..2`, `1%`.
- **YAML 1.2, core schema.** Only `true` and `false` are booleans (`no` and `on` are text), `1e-3` is a number, a
  date stays text. Octal and hexadecimal numbers stay text too. Anchors and aliases work; tags and merge keys (`<<`)
  are errors.
- **Environment.** `${env:NAME}` is replaced by the environment variable; unquoted, the result is read as a YAML
  scalar, quoted it is text. Inside `{}` and `[]` YAML requires the quotes.
- **Secrets** are never in the file, because it is copied into every run folder. They come from the environment.
- **Command line.** `--set training.optimizer.lr=1e-3` changes or adds one key; the value is YAML.
"""


def job_reference() -> str:
    """Return the reference as Markdown."""
    schema = job_schema()
    parts = [_INTRODUCTION, f"## Example\n\n```yaml\n{_EXAMPLE.read_text(encoding='utf-8').rstrip()}\n```\n"]
    for key, section in known_sections(JobSpec):
        parts.append(_section(key, section, schema=schema["$defs"][section.__name__] if key else schema))
    return "\n".join(parts)


def _section(key: str, section: type[Section], *, schema: Mapping[str, Any]) -> str:
    lines = [f"## `{key}`" if key else "## Top level", "", schema["description"], ""]
    lines += ["| key | written as | default | meaning |", "|---|---|---|---|"]
    for name, prop in schema["properties"].items():
        is_required = name in schema.get("required", ())
        cells = (
            f"`{name}`",
            _written_as(prop, key=join_key(key, name)),
            "required" if is_required else _default(prop),
            section.model_fields[name].description or "",
        )
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    if schema["additionalProperties"]:
        lines.append("| any other | as in transformers | that of transformers | a key of the transformers config |")
    return "\n".join(lines) + "\n"


def _written_as(prop: Mapping[str, Any], *, key: str) -> str:
    *most, last = _alternatives(prop, key=key)
    return (f"{', '.join(most)} or {last}" if most else last) + _bounds(prop)


def _alternatives(prop: Mapping[str, Any], *, key: str) -> list[str]:
    if "$ref" in prop:
        return [f"[section](#{key.replace('.', '').lower()})"]
    if "$ref" in prop.get("items", {}):
        return [f"a list of [sections](#{key.replace('.', '').lower()})"]
    if "additionalProperties" in prop:
        inner = prop["additionalProperties"]
        below = (
            _alternatives(inner, key=join_key(key, ANY_KEY)) if isinstance(inner, dict) and inner else ["a value"]
        )
        return [f"mapping from keys of the job to {' or '.join(below)}"]
    if "anyOf" in prop:
        return [words for member in prop["anyOf"] for words in _alternatives(member, key=key)]
    if "const" in prop or "enum" in prop:
        return [f"`{value}`" for value in prop.get("enum", [prop.get("const")])]
    examples = " or ".join(f"`{example}`" for example in prop.get("examples", ()))
    words = {**_KINDS, "string": f"like {examples}" if examples else _KINDS["string"]}
    kinds = prop["type"] if isinstance(prop["type"], list) else [prop["type"]]
    return [words[kind] for kind in kinds if kind != "null"]


_KINDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
    "array": "a list of them",
}


def _bounds(prop: Mapping[str, Any]) -> str:
    # Bounds of 64-bit integers are left out: they are not informative.
    bounds = {sign: prop[keyword] for keyword, sign in _SIGNS.items() if abs(prop.get(keyword, 2**63)) < 2**63}
    return "".join(f", {sign} {bound}" for sign, bound in bounds.items())


_SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _default(prop: Mapping[str, Any]) -> str:
    value = prop.get("default")
    if value in (None, []) or isinstance(value, dict):
        return "–"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(job_reference())
