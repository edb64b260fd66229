"""The small real models and data sets of `make fixtures`, for tests that use them where they are."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / ".fixtures"


def require_fixture(name: str) -> Path:
    """Return the folder of a fixture; skip the test if `make fixtures` has not prepared it."""
    folder = FOLDER / name
    if not (folder / "FIXTURE.json").is_file():
        pytest.skip(f"needs the fixture {name}: make fixtures")
    return folder
