"""forge.elastic.workers: user code in fork servers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from forge.code_archive import PackedCode, code_folder, unpack_code
from forge.config.job import JobSpec
from forge.elastic.workers.worker_process import import_for
from forge.errors import UserCodeError
from forge.plan.inputs import CodeInfo
from forge.plan.plan import Plan, plan_to_json
from forge.user_code import load_class, use_code
from tests.support.jobs import tiny_job, tiny_plan

MODEL = "from torch import nn\n\nclass Mixer(nn.Module): ...\n"


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    yield
    use_code(None)


def plan_with(code: PackedCode) -> Plan:
    body = tiny_job().model_dump(mode="json") | {"code": "./src", "model": {"class": "my_mixer:Mixer"}}
    info = CodeInfo(digest=code.digest, num_files=len(code.files), size_bytes=code.size_bytes)
    return replace(tiny_plan(), job=JobSpec.model_validate_json(json.dumps(body)), code=info)


def test_import_for__class_of_the_users__is_imported_before_workers_are_forked() -> None:
    code = PackedCode(files={"my_mixer.py": MODEL.encode()})
    unpack_code(code)
    import_for(plan_to_json(plan_with(code)))
    assert sys.modules["my_mixer"].__file__ == str(code_folder(code.digest) / "my_mixer.py")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("import no_such_package\n", "my_mixer.py:1: ModuleNotFoundError"),
        ("x = (\n", "my_mixer.py:1: SyntaxError"),
        ("class Other: ...\n", "has no class Mixer"),
    ],
)
def test_import_for__module_that_cannot_be_imported__is_left_to_the_workers(text: str, problem: str) -> None:
    code = PackedCode(files={"my_mixer.py": text.encode()})
    unpack_code(code)
    import_for(plan_to_json(plan_with(code)))
    with pytest.raises(UserCodeError, match=problem):
        load_class("my_mixer:Mixer")


def test_import_for__code_is_missing__is_left_to_the_workers() -> None:
    code = PackedCode(files={"my_mixer.py": MODEL.encode()})
    import_for(plan_to_json(plan_with(code)))
    assert "my_mixer" not in sys.modules
    with pytest.raises(UserCodeError):
        use_code(code.digest)
