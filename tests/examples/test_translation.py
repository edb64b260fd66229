"""jobs/translation: job files, task and data fit together."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from forge.config.load import load_job, load_task
from forge.evaluate.task import build_task

FOLDER = Path(__file__).parents[2] / "jobs" / "translation"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("translation_run", FOLDER / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_jobs__every_model__learns_from_the_same_data_in_the_same_steps(script: ModuleType) -> None:
    jobs = [load_job(FOLDER / f"{name}.yaml").job for name in script.MODELS]
    assert len({job.data.model_dump_json() for job in jobs}) == 1
    assert jobs[0].data.files == (str(script.SYNOPSES),)
    assert len({(job.training.total_steps, job.training.global_batch_size) for job in jobs}) == 1
    task = build_task(load_task(FOLDER / "task.yaml"))
    assert list(task.spec.metrics.chosen) == ["bleu", "rouge"] and task.spec.data.held_out


def test_write_synopses__descriptions__are_their_first_lines_once(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script.PAIRS.parent.mkdir(parents=True)
    pairs = [
        ("a game\n\nlong", "ein Spiel\n\nlang"),
        ("a game\n\nother", "ein Spiel"),
        ("foo", "foo"),
        ("x\ny", "\nz"),
    ]
    lines = [json.dumps({"source": source, "target": target}) for source, target in pairs]
    script.PAIRS.write_text("\n".join(lines) + "\n")
    script.write_synopses()
    assert script.SYNOPSES.read_text() == '{"source": "a game", "target": "ein Spiel"}\n'
