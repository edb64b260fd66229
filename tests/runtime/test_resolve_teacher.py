"""`training.distillation.teacher`: what it stands for, and what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from forge.config.load import LoadedJob, load_job
from forge.errors import JobFileError
from forge.plan.curve import curve_differences
from forge.plan.plan import Plan, make_plan
from forge.report.text import plan_facts
from forge.runtime.resolve import resolve, resolve_draft
from forge.runtime.resolve_init import with_init
from forge.runtime.resolve_outputs import outputs_key
from forge.runtime.resolve_teacher import check_teacher_tokenizer
from tests.runtime.test_resolve_init import RUN, add_checkpoint
from tests.support.objectives import write_tokenizer
from tests.support.runs import make_run

JOB = """
name: student
model: {{architecture: llama}}
data: {{source: python-stdlib, seq_len: 16}}
training: {{objective: distillation, total_steps: 3, global_batch_size: 12, distillation: {{teacher: {teacher}}}}}
"""


def job_of(folder: Path, teacher: object, *overrides: str) -> LoadedJob:
    path = folder / "job.yaml"
    path.write_text(JOB.format(teacher=teacher))
    return load_job(path, overrides=[f"checkpoint.to={folder}", *overrides])


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    folder = tmp_path / "teacher"
    write_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    save_file({"weight": np.ones(3, dtype=np.float32)}, str(folder / "model.safetensors"))
    return folder


def test_with_init__teacher_folder__has_a_digest_and_gives_its_tokenizer(tmp_path: Path, teacher: Path) -> None:
    first = with_init(job_of(tmp_path, teacher)).job
    found = first.training.distillation
    assert (found.teacher, len(found.digest or "")) == (str(teacher), 32)
    assert first.data.tokenizer.from_pretrained == str(teacher)
    (teacher / "config.json").write_text('{"a": 1}')
    second = with_init(job_of(tmp_path, teacher)).job
    assert [change.key for change in curve_differences(first, second)] == ["training.distillation.digest"]
    with pytest.raises(JobFileError, match="have the digest"):
        with_init(job_of(tmp_path, teacher, f"training.distillation.digest={found.digest}"))


def test_with_init__teacher_run__is_its_best_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path, RUN)
    paths = [add_checkpoint(run, step, value) for step, value in ((1, 1.0), (2, 2.0))]
    loaded = with_init(job_of(tmp_path, RUN))
    assert loaded.job.training.distillation.teacher == paths[0]
    assert loaded.job.data.tokenizer.from_pretrained == str(run / "tokenizer")


@pytest.mark.parametrize(
    ("teacher", "problem"),
    [("nowhere", "nowhere"), ("~", "distillation.teacher: is missing"), ("empty", "has no safetensors files")],
)
def test_with_init__no_teacher__is_named_with_its_line(tmp_path: Path, teacher: str, problem: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    name = tmp_path / "empty" if teacher == "empty" else teacher
    with pytest.raises(JobFileError, match=rf"(?s)job\.yaml:5.*{problem}"):
        with_init(job_of(tmp_path, name))


def test_load_job__stored_outputs_without_their_number__are_refused(tmp_path: Path, teacher: Path) -> None:
    stored = "training.distillation.teacher_logits=stored"
    with pytest.raises(JobFileError, match=r"distillation\.top_k.*is missing: teacher_logits: stored takes 8 b"):
        job_of(tmp_path, teacher, stored)
    some = "training.distillation.top_k=4"
    job = job_of(tmp_path, teacher, stored, some).job
    assert not job.holds_teacher and job_of(tmp_path, teacher).job.holds_teacher
    warmer = job_of(
        tmp_path, teacher, stored, "training.distillation.top_k=4", "training.distillation.temperature=2"
    )
    assert outputs_key(job) == outputs_key(job.model_copy()) != outputs_key(warmer.job)
    assert outputs_key(job_of(tmp_path, teacher).job) is None


def test_check_teacher_tokenizer__other_vocabulary__is_refused_with_the_number_of_tokens(
    tmp_path: Path, teacher: Path
) -> None:
    check_teacher_tokenizer(with_init(job_of(tmp_path, teacher)))
    other = tmp_path / "other"
    write_tokenizer(other)
    body = json.loads((other / "tokenizer.json").read_text())
    vocab = body["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(body))
    count = len(Tokenizer.from_file(str(other / "tokenizer.json")).get_vocab())
    with pytest.raises(JobFileError, match=rf"2 of the {count} tokens.*must have the same vocabulary"):
        check_teacher_tokenizer(with_init(job_of(tmp_path, teacher, f"data.tokenizer.from_pretrained={other}")))
    with pytest.raises(JobFileError, match="must be that of the teacher"):
        check_teacher_tokenizer(with_init(job_of(tmp_path, teacher, "data.tokenizer.vocab_size=400")))


@pytest.mark.slow
def test_resolve__stored_outputs__are_computed_before_a_run_and_shown_in_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "teacher"
    write_tokenizer(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=300, num_key_value_heads=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"line {i} of a text"}) + "\n" for i in range(400))
    )
    keys = [f"model.{name}={value}" for name, value in sizes.items()]
    section = "training.distillation"
    loaded = job_of(
        tmp_path, folder, *keys, f"data={{files: {tmp_path}/text.jsonl, seq_len: 16}}", "resources.workers=1",
        f"{section}.teacher_logits=stored", f"{section}.top_k=4",
    )  # fmt: skip
    draft = resolve_draft(loaded)
    assert draft.teacher is not None and isinstance(draft, Plan)
    count = (draft.corpus.num_train_sequences + draft.corpus.num_held_out_sequences) * 16
    assert draft.teacher.stored_bytes == count * 4 * 8
    assert not list(Path(draft.corpus.folder).glob("columns/*"))
    told = dict(plan_facts(draft))["teacher"]
    assert "asked once, its outputs stored with the data" in told and "on the disk" in told
    shown: list[tuple[str, int]] = []
    plan = resolve(loaded, on_progress=lambda progress: shown.append((progress.phase, progress.num_documents)))
    assert sum(path.stat().st_size for path in Path(plan.corpus.folder).glob("columns/*")) == count * 4 * 8
    assert ("outputs", count // 16) in shown and plan.corpus.digest != draft.corpus.digest
    assert resolve(loaded).corpus == plan.corpus
    distillation = plan.job.training.distillation.model_copy(update={"teacher_logits": "live"})
    training = plan.job.training.model_copy(update={"distillation": distillation})
    job = plan.job.model_copy(update={"training": training})
    live = make_plan(job, model=plan.model, corpus=draft.corpus, hardware=plan.hardware, teacher=plan.teacher)
    assert live.flops_per_token > plan.flops_per_token
    assert live.worlds[0].memory.weights_bytes > plan.worlds[0].memory.weights_bytes
