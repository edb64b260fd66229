from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.support.remote_client import Elsewhere, elsewhere

_FINDERS = ("evaluate.answer_map.find_cluster", "evaluate.run.find_cluster")
_FINDERS += ("remote.servers.find_cluster", "remote.servers.find_known")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home folder on the cluster."""
    return tmp_path_factory.mktemp("there")


@pytest.fixture(scope="module")
def _cluster(there: Path) -> Iterator[Elsewhere]:
    with elsewhere(there, num_nodes=1) as cluster:
        yield cluster


@pytest.fixture
def cluster(_cluster: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    """A cluster that shares no files with this machine, found by its name."""
    for finder in _FINDERS:
        monkeypatch.setattr(f"forge.{finder}", mock.Mock(return_value=_cluster))
    return _cluster
