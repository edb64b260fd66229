"""docs/job-file.md matches the types."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from forge.config.fields import known_keys, known_sections
from forge.config.job import JobSpec
from forge.config.load import load_job
from forge.config.reference import job_reference

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "job-file.md"


def test_job_reference__page_in_docs__is_up_to_date() -> None:
    command = "python -m forge.config.reference > docs/job-file.md"
    assert PAGE.read_text(encoding="utf-8") == job_reference(), f"run: {command}"


def test_job_reference__module_run__prints_the_page() -> None:
    command = [sys.executable, "-m", "forge.config.reference"]
    assert subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode() == job_reference()


def test_job_reference__every_key__has_a_row() -> None:
    rows = re.findall(r"^\| `([a-z_0-9]+)` \| .+ \| .+ \| .+ \|$", job_reference(), flags=re.MULTILINE)
    assert len(rows) == len(list(known_keys(JobSpec)))
    assert set(rows) == {key.rpartition(".")[2] for key in known_keys(JobSpec)}


def test_job_reference__every_link__has_a_heading() -> None:
    links = set(re.findall(r"\]\(#([a-z_]+)\)", job_reference()))
    assert links == {key.replace(".", "").lower() for key, _ in known_sections(JobSpec) if key}


def test_job_reference__example__is_a_valid_job(tmp_path: Path) -> None:
    example = re.search(r"```yaml\n(.*?)```", job_reference(), flags=re.DOTALL)
    assert example
    path = tmp_path / "job.yaml"
    path.write_text(example[1], encoding="utf-8")
    assert load_job(path).job == load_job(ROOT / "jobs" / "pretrain.yaml").job
