"""The files under `cluster/` are ready to be edited: each is a valid cluster, explained line by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.config.load import load_cluster

FOLDER = Path(__file__).parents[2] / "cluster"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_there_is_one_for_every_provider() -> None:
    found = {load_cluster(path).provider for path in FILES}
    assert found >= {"local", "ssh"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_valid_as_it_stands_and_says_how_it_is_used(path: Path) -> None:
    spec, text = load_cluster(path), path.read_text()
    assert f"forge cluster up cluster/{path.name}" in text
    assert f"provider: {spec.provider}" in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_commented_out_is_valid_too(path: Path, tmp_path: Path) -> None:
    lines = []
    for line in path.read_text().splitlines():
        bare = line.removeprefix("# ")
        key, colon, _ = bare.partition(":")
        is_setting = line.startswith("# ") and colon and key.isidentifier() and key.islower()
        lines.append(bare if is_setting else line)
    (tmp_path / path.name).write_text("\n".join(lines))
    assert load_cluster(tmp_path / path.name).provider == load_cluster(path).provider
