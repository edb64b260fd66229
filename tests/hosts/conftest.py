from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.hosts import Hosts, can_make_hosts


@pytest.fixture(scope="session")
def _hosts_allowed() -> None:
    if not can_make_hosts():
        pytest.skip("this needs the right to make network namespaces, and iproute2")


@pytest.fixture
def hosts(_hosts_allowed: None) -> Iterator[Hosts]:
    """Three machines; nothing runs on them yet."""
    with Hosts(3) as hosts:
        yield hosts
