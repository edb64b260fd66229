from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from forge.cli.app import app
from forge.events import RunFailed
from tests.support.runs import make_run


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        ("DataError", "once that is fixed, try again: forge train --resume"),
        ("JobFileError", "once that is fixed, try again: forge train --resume"),
        ("UserCodeError", "once that is fixed, try again: forge train --resume"),
        ("ClusterError", "\ntry again: forge train --resume"),
        ("RunError", "\ntry again: forge train --resume"),
    ],
)
def test_end_of_a_run__failure__says_whether_it_can_succeed_unchanged(
    tmp_path: Path, error: str, hint: str
) -> None:
    folder = make_run(tmp_path, endings=[RunFailed(error=error, message="the reason")])
    done = CliRunner().invoke(app, ["runs", "watch", str(folder)])
    assert hint in done.output
