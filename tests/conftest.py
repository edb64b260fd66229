"""What holds for every test."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator

import pytest

# CI, nohup and `&` start their children with Ctrl-C ignored, and the ignorance is inherited; the tests that
# press it need processes that listen. A handler, unlike ignorance, is not passed on: they get the default.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=60, help="how many writers of checkpoints test_kills kills")
    parser.addoption("--faults", type=int, default=50, help="how many faults tests/elastic/test_soak.py deals out")


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine that answers nobody while the test runs."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])
