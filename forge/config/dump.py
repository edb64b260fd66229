"""Write a job, or plain values, as YAML; read back what forge wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from forge.config.job import JobSpec
from forge.config.scalar import resolve
from forge.config.templates import with_templates


def dump_job(job: JobSpec, *, templates: Mapping[str, str] | None = None) -> str:
    """Return YAML text from which `load_job` reads an equal job; keys that were not set are left out.

    Args:
        templates: texts with `${env:NAME}` to write instead of the variables' values, as `LoadedJob` has them.
    """
    sections = {"data": job.data.unread_sections(), "training": job.training.unread_sections()}
    unread = {key: {one.key for one in found} for key, found in sections.items()}  # if it was read from a plan
    body = job.model_dump(mode="json", exclude_unset=True, exclude=unread)
    body = with_templates(body, templates or {})
    return yaml.dump(body, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def dump_plain(values: Mapping[str, Any]) -> str:
    """Return YAML text of plain values, which parsers of YAML 1.1 (Ray's launcher, kubectl) and 1.2 read alike."""
    return yaml.dump(dict(values), Dumper=_Unaliased, sort_keys=False, allow_unicode=True, width=110)


def load_plain(text: str) -> Any:
    """Parse YAML 1.1 text that forge itself wrote; job and cluster files go through `forge.config.load`."""
    return yaml.safe_load(text)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `forge.config.scalar` reads as another type, such as `1e3`, which PyYAML does not quote."""


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        is_text = isinstance(resolve(text), str)
    except ValueError:
        is_text = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_text else "'")


_Dumper.add_representer(str, _text_node)


class _Unaliased(_Dumper):
    """Writes repeated values in full instead of as aliases, for readability."""

    def ignore_aliases(self, data: object) -> bool:
        return True
