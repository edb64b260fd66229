"""Keep the measured peak of this machine's CPU once for all state folders of a test session."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_VARIABLE = "TEST_PEAKS"


def set_shared_peaks(folder: Path) -> None:
    """Name the folder of the session, for the processes of pytest-xdist too."""
    os.environ.setdefault(_VARIABLE, str(folder))
    Path(os.environ[_VARIABLE]).mkdir(exist_ok=True)


def share_peaks(state: Path) -> None:
    """Let a state folder have the peaks of the session: to measure one takes seconds."""
    with contextlib.suppress(OSError):
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        (state / "peaks").symlink_to(os.environ[_VARIABLE])
