"""Files of answers in a folder that was copied from elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from forge.errors import RunError
from forge.evaluate.results import read_outputs


@pytest.mark.parametrize("kind", ["pipe", "link", "no object", "unknown field"])
def test_answers__not_a_file_of_outputs__are_an_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "answers.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    else:
        path.write_text(
            '{"id": "a", "prompt": "b", "output": %s}\n' % ("[1]" if kind == "no object" else '{"x": 1}')
        )
    with pytest.raises(RunError, match="cannot read the answers"):
        read_outputs(path)
