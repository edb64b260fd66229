"""forge.runtime.corpus_server: a node without the code of a run gets it from the head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from forge.code_archive import ARCHIVE, PackedCode, code_folder, has_code, pack_code
from forge.errors import UserCodeError
from forge.plan.inputs import CodeInfo
from forge.plan.plan import plan_to_json
from forge.runs.task_examples import TASK_EXAMPLES, digest_of, examples_content
from forge.runtime.actor_names import NAMESPACE
from forge.runtime.corpus_server import ensure_inputs
from tests.support.jobs import synthetic_corpus, tiny_plan

CODE = PackedCode(files={"my_losses.py": b"class Ranking: ...\n"})
INFO = CodeInfo(digest=CODE.digest, num_files=1, size_bytes=CODE.size_bytes)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=1, include_dashboard=False, namespace=NAMESPACE, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a node that shares nothing with the head but the network."""
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "node"))
    return tmp_path / "node"


def run_folder(tmp_path: Path, name: str, archive: bytes) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    (folder / ARCHIVE).write_bytes(archive)
    return folder


def test_ensure_inputs__node_lacks_the_code__fetches_it_once(tmp_path: Path, node: Path) -> None:
    plan_json = plan_to_json(replace(tiny_plan(synthetic_corpus(tmp_path / "corpus")), code=INFO))
    folder = run_folder(tmp_path, "tiny-1", CODE.to_tar())
    assert ensure_inputs(plan_json, run_folder=folder) == plan_json
    assert pack_code(code_folder(CODE.digest)) == CODE
    (folder / ARCHIVE).unlink()
    assert ensure_inputs(plan_json, run_folder=folder) == plan_json


def test_ensure_inputs__archive_was_replaced__nothing_is_unpacked(tmp_path: Path, node: Path) -> None:
    plan_json = plan_to_json(replace(tiny_plan(synthetic_corpus(tmp_path / "corpus")), code=INFO))
    other = PackedCode(files={"my_losses.py": b"import os\n"}).to_tar()
    with pytest.raises((ray.exceptions.RayTaskError, UserCodeError), match="the plan says"):
        ensure_inputs(plan_json, run_folder=run_folder(tmp_path, "tiny-2", other))
    assert not has_code(CODE.digest)
    assert not (node / "code").exists()


def test_ensure_inputs__node_lacks_the_examples_of_tasks__fetches_them(tmp_path: Path, node: Path) -> None:
    content = b'{"examples": []}\n'
    folder = tmp_path / "tiny-3"
    folder.mkdir()
    (folder / TASK_EXAMPLES).write_bytes(content)
    plan = replace(tiny_plan(synthetic_corpus(tmp_path / "corpus")), task_examples=digest_of(content))
    ensure_inputs(plan_to_json(plan), run_folder=folder)
    assert examples_content(digest_of(content)) == content
    assert [file.stat().st_mode & 0o077 for file in (node / "tasks").iterdir()] == [0]
