"""The files under `cluster/` are templates to edit: each is a valid cluster, also with its commented-out keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from forge.config.cluster import SECTIONS
from forge.config.load import load_cluster

FOLDER = Path(__file__).parents[2] / "cluster"
NAMES = ("aws-spot", "azure-spot", "gcp-spot", "kubernetes", "local", "ssh")
FILES = [FOLDER / f"{name}.yaml" for name in NAMES]
_COMMENTED_OUT = re.compile(r"^# ([a-z][a-z_]*): .*$", re.MULTILINE)


def commented_out(text: str) -> Mapping[str, str]:
    """The commented-out settings of a file: key → its whole line."""
    return {match[1]: match[0] for match in _COMMENTED_OUT.finditer(text)}


SETTINGS = [(path, key) for path in FILES for key in commented_out(path.read_text())]


def test_cluster_folder__files__are_exactly_the_tested_ones() -> None:
    assert sorted(FOLDER.glob("*")) == sorted(FILES)


def test_cluster_folder__providers__have_one_file_each() -> None:
    assert sorted(load_cluster(path).provider for path in FILES) == sorted(SECTIONS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_cluster_file__unchanged__is_valid_and_names_its_command(path: Path) -> None:
    spec, text = load_cluster(path), path.read_text()
    assert f"forge cluster up cluster/{path.name}" in text
    assert f"provider: {spec.provider}" in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_cluster_file__all_commented_out_keys_used__is_valid(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    keys = commented_out(text)
    edited = tmp_path / path.name
    edited.write_text(_COMMENTED_OUT.sub(lambda match: match[0].removeprefix("# "), text))
    spec = load_cluster(edited)
    assert keys, "a template shows at least one optional key"
    assert spec.provider == load_cluster(path).provider
    assert set(keys) <= spec.model_fields_set


@pytest.mark.parametrize(("path", "key"), SETTINGS, ids=[f"{path.stem}-{key}" for path, key in SETTINGS])
def test_cluster_file__one_commented_out_key_used__is_valid(path: Path, key: str, tmp_path: Path) -> None:
    text = path.read_text()
    line = commented_out(text)[key]
    edited = tmp_path / path.name
    edited.write_text(text.replace(line, line.removeprefix("# "), 1))
    assert key in load_cluster(edited).model_fields_set
