from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forge.chaos.trace_file import read_trace
from forge.cli.app import app
from forge.errors import ArgumentError


def test_replay_help__names_both_formats_of_a_trace() -> None:
    text = " ".join(CliRunner().invoke(app, ["chaos", "replay", "--help"]).output.split())
    assert "milliseconds,add|remove,node" in text
    assert '[milliseconds, "add"|"remove"|"no-op", {"nodes": ["a", "b"]}]' in text


@pytest.mark.parametrize(
    "text", ["hello,world\n", "0,hello,world\n", "hello\n", "# a comment\n", "", "{}\n", "[]\n"]
)
def test_read_trace__no_trace__raises_with_the_formats(tmp_path: Path, text: str) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(ArgumentError, match=r"milliseconds,add\|remove,node"):
        read_trace(tmp_path / "trace")


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ("", (), "lasts 0 s"),
        (
            "60000,add,b\n",
            ("--min-nodes", "3"),
            "min_nodes of a simulation is 3, but the trace has at most 2",
        ),
        ("60000,add,b\n", ("--fixed-nodes", "3"), "num_nodes of a simulation is 3"),
        ("60000,add,b\n", ("--nodes", "1", "--min-nodes", "2"), "at most 1 machine"),
        ("60000,add,b\n", ("--policy", "elastic", "--fixed-nodes", "1"), "policy rigid only"),
    ],
)
def test_simulate__that_could_never_train__is_refused_with_the_numbers(
    lines: str, options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("0,add,a\n" + lines)
    result = CliRunner().invoke(app, ["chaos", "simulate", str(path), *options])
    assert isinstance(result.exception, ArgumentError)
    assert message in str(result.exception)


def test_simulate__policy_twice__is_simulated_once(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("0,add,a\n60000,add,b\n")
    arguments = ["chaos", "simulate", str(path), "--policy", "rigid", "--policy", "rigid", "-o", "json"]
    assert len(json.loads(CliRunner().invoke(app, arguments).stdout)["runs"]) == 1
