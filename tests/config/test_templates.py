"""`${env:NAME}` refuses credentials, and files keep it instead of the value; URLs must not contain credentials."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from forge.config.dump import dump_job
from forge.config.load import load_cluster, load_job
from forge.config.templates import templates_of, with_templates, without_templates
from forge.config.yaml_reader import compose
from forge.errors import JobFileError, PlanError
from forge.plan.plan import Plan, plan_from_json, plan_to_json, written_job
from forge.runs.create import fill_run_folder
from forge.runs.secrets import environment_of
from tests.support.jobs import synthetic_corpus, tiny_plan

JOB = """\
name: tiny
model: {{architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}}
data: {{files: {files}, seq_len: 32, tokenizer: {{vocab_size: 300}}}}
training: {{total_steps: {steps}, global_batch_size: 8, optimizer: {{lr: 1.0e-2}}}}
checkpoint: {{to: {to}}}
tracking: {{wandb: {{project: {project}}}}}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_job(*, files: str = "c.txt", to: str = "runs", project: str = "p", steps: str = "4") -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(JOB.format(files=files, to=to, project=project, steps=steps))
        return path

    return write_job


class TestCredentials:
    @pytest.mark.parametrize(
        "name",
        ["WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "AZURE_STORAGE_ACCOUNT",
         "GOOGLE_APPLICATION_CREDENTIALS", "MINIO_SECRET_KEY", "FSSPEC_S3_SECRET", "my_password", "PGPASSWORD",
         "GITHUB_PAT", "SLACK_TOKEN", "DB_CREDENTIALS"],
    )  # fmt: skip
    @pytest.mark.parametrize("is_set", [True, False])
    def test_load_job__variable_of_a_credential__is_refused_without_its_value(
        self, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str, is_set: bool
    ) -> None:
        if is_set:
            monkeypatch.setenv(name, "hunter2-hunter2")
        path = write(files=f'"http://127.0.0.1/corpus/${{env:{name}}}.txt"')
        with pytest.raises(JobFileError) as caught:
            load_job(path)
        assert f"${{env:{name}}} may be a credential" in str(caught.value)
        assert caught.value.line == 3
        assert "hunter2" not in str(caught.value)

    def test_load_job__credential_by_set__is_refused(self, write: Callable[..., Path]) -> None:
        with pytest.raises(JobFileError, match="may be a credential"):
            load_job(write(), overrides=["tracking.wandb.project=p-${env:WANDB_API_KEY}"])


class TestUrls:
    @pytest.mark.parametrize(
        "url",
        ["sftp://alice:hunter2pass@host/runs", "sftp://hunter2pass@host/runs", "s3://hunter2key:hunter2@minio/b",
         "https://host/corpus.txt?token=hunter2", "https://a.blob.core.windows.net/c?sv=1&sig=hunter2",
         "https://b.s3.amazonaws.com/k?X-Amz-Signature=hunter2", "abfs://hunter2:x@account.dfs.core.windows.net/c",
         "https://:hunter2@host/x", "http://hunter2%40x@host/", "hf://hunter2@datasets/x", "x::ftp://u:hunter2@h/"],
    )  # fmt: skip
    @pytest.mark.parametrize("key", ["files", "to"])
    def test_load_job__credentials_in_a_url__are_refused_and_not_shown(
        self, write: Callable[..., Path], url: str, key: str
    ) -> None:
        with pytest.raises(JobFileError) as caught:
            load_job(write(**{key: f'"{url}"'}))
        assert "of a URL" in str(caught.value)
        assert "hunter2" not in str(caught.value)
        with pytest.raises(JobFileError) as caught:
            load_job(write(), overrides=[f"checkpoint.to={url}"])
        assert "hunter2" not in str(caught.value)

    def test_load_job__url_from_a_variable__is_refused_too(
        self, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MIRROR", "https://alice:hunter2@host")
        with pytest.raises(JobFileError, match="user name or password") as caught:
            load_job(write(files='"${env:MIRROR}/x.txt"'))
        assert "hunter2" not in str(caught.value)

    @pytest.mark.parametrize(
        "url",
        ["abfs://container@account.dfs.core.windows.net/runs", "s3://bucket/runs", "https://host/x@y?page=2",
         "hf://datasets/org/name@main/x.jsonl"],
    )  # fmt: skip
    def test_load_job__other_urls__are_taken(self, write: Callable[..., Path], url: str) -> None:
        assert load_job(write(files=f'"{url}"')).job.data.files == (url,)

    def test_load_cluster__credentials_in_a_url__are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "c.yaml"
        path.write_text("name: lab\nprovider: ssh\nmachines: [a]\nstorage: sftp://alice:hunter2@host/runs\n")
        with pytest.raises(JobFileError, match="of a URL") as caught:
            load_cluster(path)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("project", ["team/forge", "a#b", "a?b", "50%", "a:b", "x" * 129])
def test_load_job__no_project_of_wandb__is_refused_before_the_run(write: Callable[..., Path], project: str) -> None:
    with pytest.raises(JobFileError, match="must be a W&B project") as caught:
        load_job(write(project=f'"{project}"'))
    assert ("tracking.wandb.entity" in str(caught.value)) == ("/" in project)


VALUE = "/mnt/team-red-4711"


@pytest.fixture
def plan(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Plan:
    """The plan of a job with three variables."""
    monkeypatch.setenv("CORPUS", VALUE)
    monkeypatch.setenv("TEAM", "red-4711")
    monkeypatch.setenv("STEPS", "7")
    path = write(files='["${env:CORPUS}/a.txt", b.txt]', project='"p-${env:TEAM}"')
    loaded = load_job(path, overrides=["checkpoint.to=${env:CORPUS}/runs", "training.total_steps=${env:STEPS}"])
    assert loaded.job.data.files == (f"{VALUE}/a.txt", "b.txt")
    assert loaded.job.training.total_steps == 7
    return replace(tiny_plan(synthetic_corpus(tmp_path / "corpus")), job=loaded.job, templates=loaded.templates)


class TestTemplates:
    def test_fill_run_folder__variables__files_keep_their_names(self, plan: Plan, tmp_path: Path) -> None:
        (Path(plan.corpus.folder) / "tokenizer").mkdir(parents=True, exist_ok=True)
        fill_run_folder(tmp_path / "run", plan)
        for name in ("job.yaml", "plan.json"):
            text = (tmp_path / "run" / name).read_text()
            assert "4711" not in text, name
            assert "${env:CORPUS}/a.txt" in text and "p-${env:TEAM}" in text and "${env:CORPUS}/runs" in text
        assert plan_from_json((tmp_path / "run" / "plan.json").read_text()) == plan
        assert load_job(tmp_path / "run" / "job.yaml").job == plan.job

    def test_written_job__for_a_tracker__keeps_the_names(self, plan: Plan) -> None:
        assert "4711" not in json.dumps(written_job(plan))
        assert written_job(plan)["tracking"]["wandb"]["project"] == "p-${env:TEAM}"

    def test_plan_from_json__variable_not_set__text_stays_and_can_be_shown(
        self, plan: Plan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = plan_to_json(plan, is_file=True)
        monkeypatch.delenv("CORPUS")
        monkeypatch.setenv("TEAM", "blue")
        again = plan_from_json(text)
        assert again.job.data.files == ("${env:CORPUS}/a.txt", "b.txt")
        assert again.job.tracking.wandb.project == "p-blue"
        assert plan_to_json(again, is_file=True) == text

    def test_plan_from_json__between_processes__needs_no_variables(
        self, plan: Plan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = plan_to_json(plan)
        monkeypatch.delenv("CORPUS")
        assert plan_from_json(text) == plan
        assert "4711" not in plan_to_json(plan_from_json(text), is_file=True)

    def test_plan_from_json__template_of_a_credential__is_refused(
        self, plan: Plan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-hunter2")
        body = json.loads(plan_to_json(plan, is_file=True))
        body["job"]["name"] = body["templates"]["/name"] = "${env:AWS_SECRET_ACCESS_KEY}"
        with pytest.raises(PlanError) as caught:
            plan_from_json(json.dumps(body))
        assert "hunter2" not in str(caught.value)

    def test_environment_of__plan__has_the_variables_that_it_names(self, plan: Plan) -> None:
        assert environment_of(plan).items() >= {"CORPUS": VALUE, "TEAM": "red-4711"}.items()

    def test_dump_job__key_with_another_value__writes_that_value(self, plan: Plan) -> None:
        changed = plan.job.model_copy(update={"name": "other"})
        assert "name: other" in dump_job(changed, templates=plan.templates | {"/name": "${env:TEAM}"})

    def test_templates__odd_names__pointers_are_escaped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TEAM", "red")
        text = "a/b~c: ['${env:TEAM}', {d: 'x-${env:TEAM}'}]\nsingle: '${env:TEAM}'\nnumber: 3\n"
        root = compose(text, path="x", errors=[])
        templates = templates_of(root)
        body = root.plain()
        kept = with_templates({**body, "single": ["red"]}, templates)
        assert kept["a/b~c"][0] == "${env:TEAM}" and kept["single"] == ["${env:TEAM}"] and kept["number"] == 3
        assert without_templates(kept, templates) == {**body, "single": ["red"]}
