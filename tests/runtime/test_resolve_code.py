"""forge.runtime.resolve_code: code is packed and classes are checked before anything is started."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from forge.code_archive import ARCHIVE, code_folder, has_code, pack_code
from forge.config.load import LoadedJob, load_job
from forge.config.locations import SourceMap
from forge.config.search import SearchSpec
from forge.errors import ArgumentError, JobFileError
from forge.plan.curve import config_digest
from forge.plan.inputs import CodeInfo
from forge.plan.plan import Plan, plan_from_json, plan_to_json
from forge.runs.create import fill_run_folder, reopen_run
from forge.runtime.resolve import with_directions
from forge.runtime.resolve_code import resolve_code, with_run_code
from tests.support.jobs import UNPREPARED, tiny_job, tiny_plan

RANKING = """\
class Ranking:
    metric_directions = {"hits": "max"}
    def batch(self): ...
    def loss(self): ...
    def metrics(self): ...
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def plan(home: Path) -> Plan:
    """A plan whose corpus has a tokenizer folder, so that a run folder can be made."""
    (home / "corpus" / "tokenizer").mkdir(parents=True)
    return tiny_plan(replace(UNPREPARED, folder=str(home / "corpus")))


def job_with_code(home: Path, files: Mapping[str, str], *, objective: str = "causal-lm") -> LoadedJob:
    """A job file with `code: ./src`, and that folder."""
    for name, text in files.items():
        path = home / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    body = tiny_job().model_dump(mode="json", exclude_unset=True) | {"code": "./src"}
    (home / "job.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    loaded = load_job(home / "job.yaml")
    training = loaded.job.training.model_copy(update={"objective": objective})
    return replace(loaded, job=loaded.job.model_copy(update={"training": training}))


def test_resolve_code__job_without_code__is_none() -> None:
    assert resolve_code(LoadedJob(job=tiny_job(), source=SourceMap(path="job.yaml", locations={}))) is None


def test_resolve_code__class_that_imports_torch__is_packed_and_not_imported_here(home: Path) -> None:
    loaded = job_with_code(home, {"my_losses.py": "import torch\n" + RANKING}, objective="my_losses:Ranking")
    code = resolve_code(loaded)
    assert code == CodeInfo(
        digest=pack_code(home / "src").digest,
        num_files=1,
        size_bytes=104 + 40,
        metric_directions={"my_losses:Ranking": {"hits": "max"}},
    )
    assert has_code(code.digest)
    assert "my_losses" not in sys.modules


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("def f(:\n", r"my_losses\.py:1: SyntaxError"),
        ("x = 1\nx.y\n", r"my_losses\.py:2: AttributeError: 'int' object has no attribute 'y'"),
        ("print('noise')\nclass Rank: ...\n", r"my_losses\.py has no class Ranking; did you mean Rank\?"),
        ("import os\nos._exit(7)\n", "its import ended the process: exit status 7"),
        (
            RANKING + "    def __init__(self, size): ...\n",
            "TypeError: .*missing 1 required positional argument: 'size'",
        ),
        (
            RANKING + "    def __init__(self):\n        raise OSError('no data')\n",
            r"my_losses\.py:7: OSError: no data",
        ),
        (RANKING.replace("metric_directions", "directions"), "metric_directions must map"),
        ("def __getattr__(name):\n    raise OSError('lost')\n", r"my_losses\.py:2: OSError: lost"),
        ("import sys\nprint('to stdout'); sys.exit()\n", r"my_losses\.py:2: SystemExit"),
    ],
)
def test_resolve_code__unusable_class__names_both_lines(home: Path, text: str, problem: str) -> None:
    loaded = job_with_code(home, {"my_losses.py": text}, objective="my_losses:Ranking")
    with pytest.raises(JobFileError, match=problem) as caught:
        resolve_code(loaded)
    line = loaded.source.error("training.objective", "").line
    assert (caught.value.key, caught.value.line) == ("training.objective", line)


def test_resolve_code__class_that_prints_also_at_exit__is_answered(home: Path) -> None:
    noise = "import atexit, os\nprint('{}')\natexit.register(print, '[1]')\nos.write(1, b'noise')\n"
    loaded = job_with_code(home, {"my_losses.py": noise + RANKING}, objective="my_losses:Ranking")
    code = resolve_code(loaded)
    assert code is not None
    assert code.metric_directions == {"my_losses:Ranking": {"hits": "max"}}


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"json.py": ""}, "has the name of Python's own module json; rename it"),
        ({"readme.txt": ""}, "has no Python file"),
        ({"a.py": "", "data.bin": "x" * (17 * 2**20)}, r"largest: data\.bin \(17"),
    ],
)
def test_resolve_code__folder_that_cannot_be_packed__names_the_line_of_code(
    home: Path, files: dict[str, str], problem: str
) -> None:
    with pytest.raises(JobFileError, match=problem) as caught:
        resolve_code(job_with_code(home, files))
    assert caught.value.key == "code"
    assert (home / "job.yaml").read_text().splitlines()[(caught.value.line or 0) - 1] == "code: ./src"


def test_resolve_code__folder_with_the_run_folders__is_refused(home: Path) -> None:
    loaded = job_with_code(home, {"a.py": ""})
    with pytest.raises(JobFileError, match="contains the run folders"):
        resolve_code(replace(loaded, job=loaded.job.model_copy(update={"code": "."})))


def test_load_job__class_without_code__names_the_line_and_the_cure(home: Path) -> None:
    body = tiny_job().model_dump(mode="json", exclude_unset=True)
    body["data"] |= {"format": "my_data:Reviews", "packing": "examples"}
    (home / "job.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    with pytest.raises(JobFileError, match=r"add the folder it is in, such as 'code: \./src'") as caught:
        load_job(home / "job.yaml")
    assert (caught.value.key, caught.value.line is not None) == ("data.format", True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("class Reviews: ...\n", r"my_data\.py:1: Reviews lacks examples and counts; see ExampleFormat in forge"),
        ("class Reviewz: ...\n", r"did you mean Reviewz\?"),
    ],
)
def test_resolve_code__format_that_lacks_methods__names_both_lines(home: Path, text: str, problem: str) -> None:
    (home / "src").mkdir()
    (home / "src" / "my_data.py").write_text(text)
    body = tiny_job().model_dump(mode="json", exclude_unset=True) | {"code": "./src"}
    body["data"] |= {"format": "my_data:Reviews", "packing": "examples"}
    (home / "job.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    with pytest.raises(JobFileError, match=problem) as caught:
        resolve_code(load_job(home / "job.yaml"))
    assert caught.value.key == "data.format"


def test_plan__with_code__survives_json_and_changes_the_digest_only_if_a_class_is_named(home: Path) -> None:
    loaded = job_with_code(home, {"my_losses.py": RANKING}, objective="my_losses:Ranking")
    code = resolve_code(loaded)
    plan = replace(tiny_plan(), code=code)
    assert plan_from_json(plan_to_json(plan)) == plan
    assert plan_from_json(plan_to_json(tiny_plan())).code is None
    assert config_digest(loaded.job, code=code) != config_digest(loaded.job, code=None)
    assert config_digest(tiny_job(), code=code) == config_digest(tiny_job(), code=None)


def test_reopen_run__code_changed__names_the_files_and_keeps_the_plan(home: Path, plan: Plan) -> None:
    loaded = job_with_code(home, {"my_losses.py": RANKING, "same.py": ""})
    plan = replace(plan, code=resolve_code(loaded))
    folder = home / "runs" / "tiny"
    fill_run_folder(folder, plan)
    assert (folder / ARCHIVE).read_bytes() == pack_code(home / "src").to_tar()
    before = (folder / "plan.json").read_text()
    changed = job_with_code(home, {"my_losses.py": RANKING + "x = 1\n", "new.py": ""})
    with pytest.raises(ArgumentError, match=r"its code changed \(my_losses\.py, new\.py\)"):
        reopen_run(folder, replace(plan, code=resolve_code(changed)))
    assert (folder / "plan.json").read_text() == before


def test_with_run_code__source_folder_changed_or_gone__uses_the_packed_code(home: Path, plan: Plan) -> None:
    loaded = job_with_code(home, {"my_losses.py": RANKING})
    plan = replace(plan, job=loaded.job, code=resolve_code(loaded))
    folder = home / "runs" / "tiny"
    fill_run_folder(folder, plan)
    (home / "src" / "my_losses.py").unlink()
    assert with_run_code(loaded, run_folder=folder) == loaded  # another job file than the run's own
    again = with_run_code(load_job(folder / "job.yaml"), run_folder=folder)
    elsewhere = load_job(folder / "job.yaml", overrides=["code=./other"])
    assert with_run_code(elsewhere, run_folder=folder) == elsewhere
    assert resolve_code(again) == plan.code
    assert plan.code is not None
    reopen_run(folder, replace(plan, code=resolve_code(again)))
    assert pack_code(code_folder(plan.code.digest)).files["my_losses.py"] == RANKING.encode()


def test_resolve_code__class_in_a_search_space__blames_its_line(home: Path) -> None:
    loaded = job_with_code(
        home, {"my_models.py": "from torch import nn\n\nclass Small(nn.Module): ...\n\nLarge = 1\n"}
    )
    body = loaded.job.model_dump(mode="json", exclude_unset=True)
    body["model"] = {"class": "my_models:Small"}
    body["search"] = {"space": {"model.class": {"choice": ["my_models:Small", "my_models:Large"]}}, "max_trials": 2}
    (home / "job.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    with pytest.raises(JobFileError, match="my_models:Large is int 1, not a class") as caught:
        resolve_code(load_job(home / "job.yaml"))
    assert caught.value.key == "search.space.model.class.choice[1]"
    assert "my_models:Large" in (home / "job.yaml").read_text().splitlines()[(caught.value.line or 0) - 1]


@pytest.mark.slow
def test_resolve_code__class_in_the_proxy_of_a_search__is_imported_for_its_metrics(home: Path) -> None:
    loaded = job_with_code(home, {"my_losses.py": RANKING})
    body = loaded.job.model_dump(mode="json", exclude_unset=True)
    body["search"] = {
        "space": {"training.optimizer.lr": {"choice": [1e-3, 1e-2]}},
        "proxy": {"training.objective": "my_losses:Ranking"},
        "metric": "train/hits",
        "max_trials": 2,
    }
    (home / "job.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    loaded = load_job(home / "job.yaml")
    search = with_directions(loaded, resolve_code(loaded)).job.search
    assert search is not None
    assert search.mode == "max"
    (home / "src" / "my_losses.py").write_text("class Rank: ...\n")
    with pytest.raises(JobFileError, match=r"did you mean Rank\?") as caught:
        resolve_code(loaded)
    assert caught.value.key == "search.proxy.training.objective"


def searched(loaded: LoadedJob, search: Mapping[str, object]) -> LoadedJob:
    space = {"space": {"training.optimizer.lr": {"choice": [1e-3, 1e-2]}}}
    job = loaded.job.model_copy(update={"search": SearchSpec.model_validate(space | dict(search))})
    return replace(loaded, job=job)


@pytest.mark.parametrize(("mode", "expected"), [({}, "max"), ({"mode": "min"}, "min")])
def test_with_directions__metric_of_a_user_objective__has_its_direction(
    home: Path, mode: Mapping[str, str], expected: str
) -> None:
    loaded = job_with_code(home, {"my_losses.py": RANKING}, objective="my_losses:Ranking")
    loaded = searched(loaded, {"metric": "eval/hits", **mode})
    job = with_directions(loaded, resolve_code(loaded)).job
    assert job.search is not None
    assert job.search.mode == expected


def test_with_directions__metric_that_the_user_objective_lacks__names_the_nearest(home: Path) -> None:
    loaded = job_with_code(home, {"my_losses.py": RANKING}, objective="my_losses:Ranking")
    loaded = searched(loaded, {"metric": "eval/hitz"})
    with pytest.raises(
        JobFileError, match=r"trials report eval/loss, .*train/hits.*did you mean 'eval/hits'"
    ) as caught:
        with_directions(loaded, resolve_code(loaded))
    assert caught.value.key == "search.metric"


@pytest.mark.parametrize(
    ("directions", "problem"),
    [
        ("{'hits': ['max']}", "metric_directions must map the name of each metric to 'min' or 'max'"),
        ("{'Hits/x': 'max'}", "a name must have only a-z"),
        ("{'hits': 'up'}", "metric_directions must map the name of each metric to 'min' or 'max'"),
        ("{'tokens': 'max'}", "metric_directions must not name 'tokens', which every run reports"),
    ],
)
def test_resolve_code__unusable_metric_directions__are_refused(home: Path, directions: str, problem: str) -> None:
    text = RANKING.replace('{"hits": "max"}', directions)
    loaded = job_with_code(home, {"my_losses.py": text}, objective="my_losses:Ranking")
    with pytest.raises(JobFileError, match=problem):
        resolve_code(loaded)
