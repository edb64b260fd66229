from __future__ import annotations

from pathlib import Path

import pytest

from forge.plan.inputs import CorpusInfo
from tests.support.jobs import synthetic_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusInfo:
    folder: Path = tmp_path_factory.mktemp("corpus")
    return synthetic_corpus(folder)
