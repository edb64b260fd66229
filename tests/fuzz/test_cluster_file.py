"""Mutated cluster files: each is refused with its key, or gives what `up --dry-run` shows, in lines of its own."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from forge.cluster.registry import cluster_of
from forge.config.load import load_cluster
from tests.support.fuzz import mutate_bytes, mutate_json, run_cases

FOLDER = Path(__file__).parents[2] / "cluster"
_COMMENTED_OUT = re.compile(r"^# (?=[a-z][a-z_]*: )", re.MULTILINE)
_ODD = [
    "a\nb", "x$(touch /tmp/pwned)", "`id`", "a;b", "a b", "-oProxyCommand=x", "--project=x", "../../x", "*", "a?",
    "~root/x", "ubuntu:ssh-rsa AAAA\nroot", "{{ 1 }}", "${HOME}", "$(id)", "a'b", 'a"b', "\u2028", "0.0.0.0/1",
    "1e308", "0..1000000000000000000", "5e-324", 5e-324, 1e-300, 10**18, "9000000TB", "9000000000d", "auto",
    ["auto", "x"], {"g5.xlarge": 5e-324}, {"a\nb": 1}, ["us-east-1"] * 3, ["m5.large", "m5-large"], "A" * 5000,
]  # fmt: skip


@cache
def _templates() -> tuple[str, ...]:
    """The shipped files, with all of their keys."""
    return tuple(_COMMENTED_OUT.sub("", path.read_text()) for path in sorted(FOLDER.glob("*.yaml")))


def _make(folder: Path, rng: random.Random) -> None:
    text = rng.choice(_templates())
    if rng.random() < 0.3:
        (folder / "cluster.yaml").write_bytes(mutate_bytes(text.encode(), rng))
        return
    values: dict[str, Any] = yaml.safe_load(text)
    if rng.random() < 0.6:
        changed = mutate_json(values, rng)
        values = changed if isinstance(changed, dict) and changed else values
    if rng.random() < 0.6:
        values[rng.choice(list(values))] = rng.choice(_ODD)
    written = json.dumps(values, ensure_ascii=rng.random() < 0.5)
    (folder / "cluster.yaml").write_text(written, encoding="utf-8", errors="surrogatepass")


def _check(folder: Path) -> None:
    os.environ["FORGE_STATE"] = str(folder / "state")
    cluster = cluster_of(load_cluster(folder / "cluster.yaml"))
    cluster.price()
    shown = cluster.to_yaml()
    assert len(shown) < 2_000_000
    for text in _strings(yaml.safe_load(shown)):
        assert all(character.isprintable() or character in " \n" for character in text), text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def test_cluster_file__mutated__is_refused_or_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path))
    for text in _templates():  # imports happen here, not in a case
        (tmp_path / "warm.yaml").write_text(text)
        cluster_of(load_cluster(tmp_path / "warm.yaml")).to_yaml()
    (tmp_path / "cases").mkdir()
    result = run_cases("cluster file", make=_make, check=_check, root=tmp_path / "cases")
    assert 0 < result.num_refused < result.num_cases
