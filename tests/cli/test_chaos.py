from __future__ import annotations

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
