"""Skipped tests must be listed: `make test` fails otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.skips import EXPECTED, unexpected_skips

ROOT = Path(__file__).parent.parent


def test_unexpected_skips__listed_with_another_reason__is_returned() -> None:
    listed = ("tests/chaos/test_trace.py::test_recorded[x]", "Skipped: no x.txt beside this checkout")
    other = (listed[0], "Skipped: no network")
    unknown = ("tests/data/test_new.py::test_x", "Skipped: no x.txt beside this checkout")
    assert unexpected_skips([listed, other, unknown]) == [": ".join(other), ": ".join(unknown)]


@pytest.mark.parametrize(("is_checked", "code"), [("1", 1), ("", 0)])
def test_session__unlisted_skip__fails_if_skips_are_checked(tmp_path: Path, is_checked: str, code: int) -> None:
    (tmp_path / "test_new.py").write_text(
        "import pytest\n\ndef test_a(): pass\n\ndef test_b(): pytest.skip('no machine')\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
    ]
    env = os.environ | {"FORGE_CHECK_SKIPS": is_checked}
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("test_new.py::test_b: Skipped: no machine" in done.stdout) == bool(is_checked)


def test_expected_skips__every_rule__names_an_existing_file_and_says_why() -> None:
    for rule in tomllib.loads(EXPECTED.read_text(encoding="utf-8"))["skip"]:
        assert (ROOT / rule["test"].partition("::")[0]).is_file(), rule
        assert rule["because"]
