"""Options, the session's random seed and fixtures for all tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.cases import mark_further_cases
from tests.support.peaks import set_shared_peaks
from tests.support.seeds import FUZZ_SEED, SEED
from tests.support.skips import unexpected_skips

# CI, nohup and `&` start their children with SIGINT ignored, which is inherited. The tests that send SIGINT need
# child processes with the default action; a handler, unlike SIG_IGN, is reset to the default by exec.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test is timed: an example may take long on a busy machine.
settings.register_profile("forge", deadline=None)
settings.load_profile("forge")

TESTS = Path(__file__).parent
ALONE = (
    *("hosts", "remote", "search/test_tune_end_to_end.py"),
    *("benchmarks/test_benchmarks_run.py", "benchmarks/test_gpu_check.py", "benchmarks/test_program.py"),
    "benchmarks/test_torchrun.py",
    *(
        "elastic/test_deadline_machines.py",
        "elastic/test_faults.py",
        "elastic/test_fork_server.py",
        "elastic/test_lora.py",
        "elastic/test_sharing.py",
        "elastic/test_task_scores.py",
        "elastic/test_tune.py",
    ),
    *("cluster/test_local.py", "cluster/test_training_on_pods.py", "examples/test_custom_code.py"),
    *(
        "runtime/test_alerts_run.py",
        "runtime/test_budget_run.py",
        "runtime/test_corpus_server.py",
        "runtime/test_deadline_run.py",
    ),
    "runtime/test_driver_watch.py",
    *("runtime/test_object_store_run.py", "runtime/test_odd_environment.py", "runtime/test_start_agent.py"),
    *("runtime/test_regimes_end_to_end.py", "runtime/test_shard_map.py", "evaluate/test_run.py"),
    *("ui/test_pages_in_browser.py", "ui/test_real_run.py"),
    *("runtime/test_train_end_to_end.py", "runtime/test_user_code_end_to_end.py"),
)
"""Folders and modules under tests/ that start Ray or hosts, or measure; `make test` runs them one at a time, and
the others three at a time."""


def pytest_configure(config: pytest.Config) -> None:
    if "FORGE_STATE" not in os.environ:  # tests must not add their runs to the index of this machine's user
        folder = tempfile.mkdtemp(prefix="forge-state-")
        os.environ["FORGE_STATE"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    set_shared_peaks(Path(os.environ["FORGE_STATE"]) / "peaks")
    # Ray starts workers with niceness 15: beside other work on the same cores ranks get a few percent of the CPU.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray reads this once, when it is first imported: every process of the tests has the same mode as forge.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ["FORGE_TEST_SEED"] = str(SEED)  # the same in the processes of pytest-xdist


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import only the modules of the chosen half, if `-m` chooses one: importing all takes half a minute."""
    chosen = config.option.markexpr.split(" and ")
    if collection_path.suffix != ".py" or not {"alone", "not alone"} & set(chosen):
        return None
    return _runs_alone(collection_path) is not ("alone" in chosen) or None


def _runs_alone(path: Path) -> bool:
    return path.is_relative_to(TESTS) and path.relative_to(TESTS).as_posix().startswith(ALONE)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_further_cases(items)
    for item in items:
        if _runs_alone(item.path):
            item.add_marker(pytest.mark.alone)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Keep bytes out of node ids: compressed ones contain the time, and pytest-xdist compares the ids."""
    return argname if isinstance(val, bytes) and len(val) > 16 else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=60, help="number of kills in tests/train/test_kills.py")
    parser.addoption("--faults", type=int, default=50, help="number of faults in tests/elastic/test_soak.py")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With FORGE_CHECK_SKIPS set, fail a session that skipped a test which is not in the list."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("FORGE_CHECK_SKIPS") or reporter is None or hasattr(session.config, "workerinput"):
        return
    skipped = [
        (report.nodeid, report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr))
        for report in reporter.stats.get("skipped", [])
    ]
    if lines := unexpected_skips(skipped):
        reporter.write_line("\nskipped, and not in tests/expected_skips.toml:", red=True)
        for line in lines:
            reporter.write_line(f"  {line}", red=True)
        session.exitstatus = exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(
        f"random seed {SEED}; repeat with FORGE_TEST_SEED={SEED}, fuzz tests with FORGE_FUZZ_SEED={FUZZ_SEED}"
    )


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine that refuses connections while the test runs."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


@pytest.fixture(scope="module", autouse=True)
def _module_environment() -> Iterator[None]:
    """Undo what the tests of a module, its fixtures and the tested code changed in `os.environ`.

    forge sets variables of Ray where it talks to a cluster; a later module's `ray.init` must not see them.
    Within a module the changes stay: its fixtures may have made them.
    """
    before = dict(os.environ)
    yield
    _restore_environment(before)


def _restore_environment(before: Mapping[str, str]) -> None:
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if name != "PYTEST_CURRENT_TEST"})
