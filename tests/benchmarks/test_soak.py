"""benchmarks.soak: every slow test belongs to a group, and a group's outcome reaches the table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import GROUPS, Group, append_table, read_report, run_group, table, table_row
from tests.support.cases import CASES

ROOT = Path(__file__).parents[2]


def test_groups__all_slow_tests__are_covered_once() -> None:
    named = [argument for group in GROUPS for argument in group.tests]
    files = [path for name in named if not name.startswith("-") for path in expand(ROOT / name)]
    left_out = [ROOT / name.partition("=")[2] for name in named if name.startswith("--ignore=")]
    ignored = [path for name in left_out for path in expand(name)]
    slow = {path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.slow" in path.read_text()}
    slow |= {ROOT / module for module in CASES}
    assert slow - {Path(__file__)} <= set(files), slow - set(files)
    assert all(files.count(path) - ignored.count(path) == 1 for path in slow if path in files)


@pytest.mark.parametrize("module", CASES)
def test_cases__their_tests__exist(module: str) -> None:
    text = (ROOT / module).read_text()
    assert [name for name in CASES[module] if f"def {name}(" not in text] == []


def expand(path: Path) -> list[Path]:
    return sorted(path.rglob("test_*.py")) if path.is_dir() else [path]


@pytest.fixture
def group(tmp_path: Path) -> Group:
    test = tmp_path / "test_sample.py"
    test.write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.slow\n"
        "def test_good(): assert True\n"
        "def test_bad(): assert False\n"
        "def test_skip(): pytest.skip('no GPU')\n"
    )
    return Group(name="sample", tests=(str(test), "-c", str(ROOT / "pyproject.toml"), "-q"))


def test_run_group__mixed_outcomes__are_counted_and_failures_named(group: Group) -> None:
    result = run_group(group, limit_s=60)
    assert (result.passed, result.skipped) == (1, 1)
    assert result.failed == ("test_bad",)
    assert not result.is_clean
    assert table_row(result).startswith("| sample | 1 | `test_bad` | 1 |")


def test_run_group__hanging_test__fails_at_the_limit(tmp_path: Path) -> None:
    test = tmp_path / "test_hang.py"
    test.write_text("import pytest, time\n@pytest.mark.slow\ndef test_hang(): time.sleep(600)\n")
    result = run_group(Group(name="hang", tests=(str(test), "-c", str(ROOT / "pyproject.toml"))), limit_s=5)
    assert result.failed == ("stopped after 5 s",)


def test_read_report__no_test_ran__is_not_clean(tmp_path: Path) -> None:
    empty = Group(name="empty", tests=())
    result = read_report(tmp_path / "missing.xml", group=empty, problem=None, seconds=1.0)
    assert not result.is_clean
    assert "no slow test ran" in table_row(result)


def test_append_table__second_run__stands_first_below_the_heading(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n\nolder text\n")
    append_table(page, "first\n")
    append_table(page, "second\n")
    assert page.read_text() == "# Results\n\nolder text\n\n## Soak runs\n\nsecond\n\n\nfirst\n\n"
    assert "| group |" in table([])


def test_soak__unknown_group__exits_with_2() -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "--only", "nothing"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 2
