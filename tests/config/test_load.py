"""Loading job files: accepted YAML, error messages, environment, secrets and `--set`."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from forge.config import yaml_reader
from forge.config.dump import dump_job
from forge.config.errors import _OTHER_WORDS
from forge.config.fields import known_keys
from forge.config.job import JobSpec
from forge.config.load import load_job
from forge.config.secret import is_secret
from forge.errors import JobFileError
from forge.units import Every, Range

PRETRAIN = Path(__file__).parents[2] / "jobs" / "pretrain.yaml"
SMALL = """\
name: small
model:
  architecture: llama
data:
  source: python-stdlib
  seq_len: 64
training:
  total_steps: 10
"""

LoadError = Callable[..., JobFileError]


@pytest.fixture(params=["libyaml", "python"])
def yaml_parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both parsers of PyYAML, because libyaml is not always available."""
    loader = yaml.CSafeLoader if request.param == "libyaml" else yaml.SafeLoader
    monkeypatch.setattr(yaml_reader, "_LOADER", loader)
    return str(request.param)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def load_error(write: Callable[[str], Path]) -> LoadError:
    """Return the error of loading SMALL with one replacement."""

    def load_error(old: str, new: str, *overrides: str) -> JobFileError:
        assert old in SMALL
        with pytest.raises(JobFileError) as caught:
            load_job(write(SMALL.replace(old, new, 1)), overrides=overrides)
        return caught.value

    return load_error


def message_of(error: JobFileError) -> str:
    """Return the message without the folder."""
    return str(error).replace(str(Path(error.path or "").parent) + os.sep, "")


def test_load_job__example__has_its_values() -> None:
    job = load_job(PRETRAIN).job
    assert job.name == "pretrain-stdlib"
    assert job.model.config_overrides["hidden_size"] == 256
    assert job.data.held_out == 0.01
    assert job.training.optimizer.lr == 3e-3
    assert job.training.evaluate_every == Every(steps=50)
    assert job.training.ema is not None
    assert job.training.ema.decay == 0.99
    assert job.resources.workers == Range(low=1, high=2)


def test_load_job__every_key__has_its_line() -> None:
    source = load_job(PRETRAIN).source
    lines = PRETRAIN.read_text().splitlines()
    for key, location in source.locations.items():
        assert location.line is not None
        name = key.rpartition(".")[2]
        assert name in lines[location.line - 1]
        assert location.text == "{...}" or location.text in lines[location.line - 1]
    assert source.locations["training.optimizer.lr"].text == "3.0e-3"


@pytest.mark.usefixtures("yaml_parser")
@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-3", 1e-3),
        ("3.0e-3", 3e-3),
        (".5", 0.5),
        ("-7", -7),
        ("007", 7),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("y", "y"),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-31", "2024-01-31"),
        ("12:30:45", "12:30:45"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("1..4", "1..4"),
        ("|\n    a\n    b", "a\nb\n"),
        ("[1, a, [true]]", [1, "a", [True]]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        ("é😀", "é😀"),
    ],
)
def test_load_job__scalar__is_read_as_yaml_1_2(write: Callable[[str], Path], written: str, value: object) -> None:
    path = write(SMALL.replace("architecture: llama", f"architecture: llama\n  probe: {written}"))
    assert load_job(path).job.model.config_overrides == {"probe": value}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seq_len: 64", "seqlen: 64", "job.yaml:6: data.seqlen: unknown key; did you mean 'seq_len'?"),
        (
            "total_steps: 10",
            "total_steps: 10\n  seq_len: 64",
            "job.yaml:9: training.seq_len: unknown key here; it belongs to 'data'; did you mean 'data.seq_len'?",
        ),
        (
            "total_steps: 10",
            "total_steps: 10\n  stage: 2",
            "job.yaml:9: training.stage: unknown key here; it belongs to 'training.zero'; "
            "did you mean 'training.zero.stage'?",
        ),
        (
            "total_steps: 10",
            "total_steps: 10\n  learning_rate: 1e-3",
            "job.yaml:9: training.learning_rate: unknown key; forge has another name for it; "
            "did you mean 'training.optimizer.lr'?",
        ),
        ("name: small", "nam: small", "job.yaml:1: nam: unknown key; did you mean 'name'?"),
        ("name: small\n", "", "job.yaml:1: name: is missing and has no default"),
        (
            "seq_len: 64",
            "seq_len: 64\n  tokenizer: {zzz: 1}",
            "job.yaml:7: data.tokenizer.zzz: unknown key; the keys of 'data.tokenizer' are "
            "train, vocab_size, special_tokens, from_pretrained, add_tokens",
        ),
        (
            "source: python-stdlib",
            "source: python-stdlb",
            "job.yaml:5: data.source: must be 'python-stdlib' (got python-stdlb); did you mean 'python-stdlib'?",
        ),
        (
            "total_steps: 10",
            "total_steps: 10\n  micro_batch_size: atuo",
            "job.yaml:9: training.micro_batch_size: must be 'auto' or a whole number (got atuo)",
        ),
        (
            "total_steps: 10",
            "total_steps: 10\n  micro_batch_size: 33",
            "job.yaml:9: training.micro_batch_size: must be in 1..32, the global batch size (got 33)",
        ),
        (
            "total_steps: 10",
            "total_steps: 10\n  zero: {stage: '2'}",
            "job.yaml:9: training.zero.stage: must be 0, 1, 2 or 3 (got '2')",
        ),
        (
            "total_steps: 10",
            "total_steps: 10\n  zero: {stage: 0, offload: cpu}",
            "job.yaml:9: training.zero.offload: needs stage 1, 2 or 3: stage 0 shards nothing (got cpu)",
        ),
        (
            "total_steps: 10",
            "total_steps: 10\n  activation_offload: true",
            "job.yaml:9: training.activation_offload: needs activation_checkpointing: true or selective, whose "
            "kept inputs it moves (got true)",
        ),
        (
            "total_steps: 10",
            "total_steps: 10\n  optimizer: {lr: fast}",
            "job.yaml:9: training.optimizer.lr: must be a number (got fast)",
        ),
        (
            "total_steps: 10",
            "total_steps: 10\n  optimizer: {lr: -1}",
            "job.yaml:9: training.optimizer.lr: must be greater than 0 (got -1)",
        ),
        (
            "total_steps: 10",
            "total_steps: 10\n  optimizer: {lr: .nan}",
            "job.yaml:9: training.optimizer.lr: must be a finite number (got .nan)",
        ),
        (
            "total_steps: 10",
            "total_steps: 10\n  schedule: {warmup: 11}",
            "job.yaml:9: training.schedule.warmup: is longer than the training: 11 warm-up steps, "
            "but total_steps is 10 (got 11)",
        ),
        (
            "total_steps: 10",
            "total_steps: 10\n  schedule: {warmup: 3 days}",
            "job.yaml:9: training.schedule.warmup: is not a length; write it like 20 steps, 3% or 2M tokens "
            "(got 3 days)",
        ),
        (
            "total_steps: 10",
            "total_steps: 10\n  schedule: {kind: cosine, decay: 10%}",
            "job.yaml:9: training.schedule.decay: is only for kind: wsd (got 10%)",
        ),
        (
            "total_steps: 10",
            "total_steps: 10\n  activation_checkpointing: no",
            "job.yaml:9: training.activation_checkpointing: must be true, false or selective (got no)",
        ),
        (
            "total_steps: 10",
            "total_steps: 10\n  evaluate_every: 50",
            "job.yaml:9: training.evaluate_every: is not an interval; write it like '50 steps' or '10m' (got 50)",
        ),
        (
            "total_steps: 10",
            "seed: 2",
            "job.yaml:7: training: give exactly one of 'total_steps', 'total_tokens' and 'epochs'",
        ),
        ("seq_len: 64", "seq_len: 1", "job.yaml:6: data.seq_len: must be at least 2 (got 1)"),
        ("seq_len: 64", "seq_len:", "job.yaml:6: data.seq_len: has no value"),
        (
            "seq_len: 64",
            "tokenizer: {from_pretrained: x, vocab_size: 300}",
            "job.yaml:6: data.tokenizer.vocab_size: is only for trained tokenizers; "
            "a loaded one has its own (got 300)",
        ),
        (
            "source: python-stdlib",
            "files: [a, 3]",
            "job.yaml:5: data.files[1]: must be text; put it in quotes (got 3)",
        ),
        ("source: python-stdlib", "files: []", "job.yaml:5: data.files: must name at least one file or glob"),
        ("name: small", "name: 12", "job.yaml:1: name: must be text; put it in quotes (got 12)"),
        (
            "name: small",
            "name: My Job",
            "job.yaml:1: name: must be lower-case letters, digits and dashes, such as 'pretrain-stdlib' "
            "(got My Job)",
        ),
        (
            "name: small",
            "name: small\nresources:",
            "job.yaml:2: resources: is empty; give it keys such as 'workers:', or leave it out",
        ),
        (
            "name: small",
            "name: small\nresources: 4",
            "job.yaml:2: resources: must be a section with keys such as 'workers:' (got 4)",
        ),
        (
            "architecture: llama",
            "model_type: llama",
            "job.yaml:3: model.model_type: forge has another name for this key (got llama); "
            "did you mean 'architecture'?",
        ),
        (
            "seq_len: 64",
            "seq_len: 64\n  seq_len: 65",
            "job.yaml:7: data.seq_len: duplicate key; first on line 6",
        ),
        (
            "seq_len: 64",
            "seq_len: 99999999999999999999",
            "job.yaml:6: data.seq_len: is too large a number (got 99999999999999999999)",
        ),
    ],
)
def test_load_job__mistake__gives_one_line(load_error: LoadError, old: str, new: str, message: str) -> None:
    assert message_of(load_error(old, new)) == message


@pytest.mark.usefixtures("yaml_parser")
@pytest.mark.parametrize(
    ("new", "line", "problem"),
    [
        ("x: !!python/object/apply:os.system [ls]\nmodel:", 2, "tags are not supported"),
        ("x: !thing {architecture: llama}\nmodel:", 2, "tags are not supported"),
        ("1: x\nmodel:", 2, "a key must be text; write 1 in quotes"),
        ("true: x\nmodel:", 2, "a key must be text; write true in quotes"),
        ("[a]: x\nmodel:", 2, "a key must be text"),
        ("? {a: b}\n: x\nmodel:", 2, "a key must be text"),
        ("'': x\nmodel:", 2, "must not be empty"),
        ("name2: {<<: {a: b}}\nmodel:", 2, "write the keys out"),
        ("model: *nowhere\nm:", 2, "has no anchor"),
        ("model: &m {architecture: llama, again: *m}\nm:", 2, "has no anchor"),
        ('name2: "\\0"\nmodel:', 2, "control character"),
        ("model: " + "[" * 30 + "]" * 30 + "\nm:", 2, "nested more than"),
        ("model: " + "{a: " * 30 + "}" * 30 + "\nm:", 2, "nested more than"),
        ("---\nmodel:", 2, "second document"),
        ("tracking: {wandb: {mode: '${env:FORGE_NOT_SET}'}}\nmodel:", 2, "FORGE_NOT_SET is not set"),
        ("tracking: {wandb: {mode: '${home}'}}\nmodel:", 2, "only ${env:NAME}"),
        ("tracking: {wandb: {mode: '${env:X'}}\nmodel:", 2, "only ${env:NAME}"),
        ("tracking: {wandb: {mode: 1e999}}\nmodel:", 2, "too large a number"),
        ("x: {a: ${env:HOME}}\nmodel:", 2, "must be in quotes"),
        ("x: [1\nmodel:", None, ""),
        ("x: 'y\nmodel:", None, ""),
        ("\tx: y\nmodel:", None, ""),
        ("x: y: z\nmodel:", 2, "':' is not allowed here"),
        ('x: "\\UFFFFFFFF"\nmodel:', None, ""),
        ("%YAML 1.2\nmodel:", None, ""),
    ],
)
def test_load_job__unsupported_yaml__is_rejected(
    load_error: LoadError, new: str, line: int | None, problem: str
) -> None:
    error = load_error("model:", new)
    assert problem in str(error)
    assert line is None or error.line == line


@pytest.mark.usefixtures("yaml_parser")
def test_load_job__alias_bomb__is_rejected(load_error: LoadError) -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20))
    assert "more than 10000 values" in str(load_error("model:", bomb + "model:"))


def test_load_job__deep_chain_of_aliases__is_rejected(load_error: LoadError) -> None:
    chain = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 2000))
    assert "nested more than 24 levels" in str(load_error("model:", chain + "model:"))


def test_load_job__alias__has_the_value_of_its_anchor(write: Callable[[str], Path]) -> None:
    loaded = load_job(write(SMALL.replace("seq_len: 64", "seq_len: &n 64\n  seed: *n")))
    assert loaded.job.data.seed == 64
    assert loaded.source.locations["data.seed"].line == 7


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"---\n", "is empty"),
        (b"[1, 2]", "must contain keys"),
        (b"just text", "must contain keys"),
        (b"name: \xff", "not UTF-8"),
        ("name: x".encode("utf-16"), "not UTF-8"),
        (b"name: \0", "U+0000"),
        (b"name: a\n\x1b[31m", "U+001B"),
        (b"#" * (2**20 + 1), "larger than 1 MiB"),
        (b"[" * 100_000, "nested more than"),
        (b"a" * 1_000_000, "must contain keys"),
        (b"a: b\n" * 100_000, "more than 10000 values"),
        (b"- " * 100_000, "nested more than"),
    ],
)
def test_load_job__not_a_job_file__is_rejected(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(JobFileError) as caught:
        load_job(path)
    assert problem in str(caught.value)
    assert str(path) in str(caught.value)


def test_load_job__byte_order_mark_and_crlf__are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert load_job(path).source.locations["data.seq_len"].line == 6


def test_load_job__missing_folder_unreadable__have_different_messages(tmp_path: Path) -> None:
    locked = tmp_path / "locked.yaml"
    locked.write_text(SMALL)
    locked.chmod(0)
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    cases = {tmp_path / "none.yaml": "no such file", tmp_path: "is a folder", loop: "cannot be read"}
    if os.geteuid() != 0:  # root reads everything
        cases[locked] = "Permission denied"
    for path, problem in cases.items():
        with pytest.raises(JobFileError, match=problem):
            load_job(path)
    with pytest.raises(JobFileError, match="cannot be read"):
        load_job("a\0b")


def test_load_job__several_mistakes__are_listed_in_file_order(load_error: LoadError) -> None:
    error = load_error("seq_len: 64\n", "seqlen: 64\nresources: {workers: 0, gpus: x}\n", "training.epochs=-1")
    assert [(other.line, other.key) for other in (error, *error.others)] == [
        (6, "data.seqlen"),
        (7, "resources.workers"),
        (7, "resources.gpus"),
        (None, "training.epochs"),
    ]
    assert message_of(error).splitlines()[-1] == "  --set training.epochs=-1: must be greater than 0"


def test_load_job__one_mistake__is_reported_once(load_error: LoadError) -> None:
    assert load_error("name: small", "name: ${env:FORGE_NOT_SET}").others == ()
    assert load_error("data:", "dat:").others == ()
    assert load_error("total_steps: 10", "total_step: 10").others == ()


def test_job_file_error__pickled__is_unchanged(load_error: LoadError) -> None:
    error = load_error("seq_len: 64", "seqlen: 64\n  sed: 1")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# The environment


def test_environment__named_variable__is_replaced(
    write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORPUS", "/data/books")
    monkeypatch.setenv("STEPS", "12")
    text = SMALL.replace("source: python-stdlib", 'files: "${env:CORPUS}/*.txt"')
    loaded = load_job(write(text.replace("total_steps: 10", "total_steps: ${env:STEPS}")))
    assert loaded.job.data.files == ("/data/books/*.txt",)
    assert loaded.job.training.total_steps == 12
    assert loaded.source.locations["training.total_steps"].text == "${env:STEPS}"


def test_environment__quoted__is_text(write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBE", "12")
    path = write(
        SMALL.replace("architecture: llama", "architecture: llama\n  a: ${env:PROBE}\n  b: '${env:PROBE}'")
    )
    assert load_job(path).job.model.config_overrides == {"a": 12, "b": "12"}


def test_environment__structure_or_control_characters__are_rejected(
    load_error: LoadError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROBE", "{stage: 3}")
    assert "must be a section" in str(load_error("total_steps: 10", "total_steps: 10\n  zero: ${env:PROBE}"))
    monkeypatch.setenv("PROBE", "a\x1b[31m")
    assert "control character" in str(load_error("source: python-stdlib", "files: ${env:PROBE}"))


def test_environment__error_message__shows_the_name_not_the_value(
    load_error: LoadError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROBE", "hunter2")
    error = load_error("seq_len: 64", "seq_len: ${env:PROBE}")
    assert "hunter2" not in repr(error.__dict__) + str(error)
    assert error.value == "${env:PROBE}"


# Secrets


@pytest.mark.parametrize("key", ["api_key", "token", "password", "secret", "WANDB_API_KEY", "access-token", "key"])
@pytest.mark.parametrize("value", ["hunter2", "'hunter2'", "[hunter2]", "{a: hunter2}", "'${hunter2}'", "*hunter2"])
def test_secret__in_the_file__is_rejected_and_never_shown(load_error: LoadError, key: str, value: str) -> None:
    for location in (f"tracking: {{wandb: {{{key}: {value}}}}}\nmodel:", f"{key}: {value}\nmodel:"):
        error = load_error("model:", location)
        assert "hunter2" not in repr([vars(one) for one in (error, *error.others)]) + str(error)
        assert "environment" in str(error) or value.startswith("*")
        assert error.line == 2


@pytest.mark.parametrize(
    "override",
    ["tracking.wandb.api_key=hunter2", "tracking.wandb={api_key: hunter2}", "tracking={wandb: {token: hunter2"],
)
def test_secret__in_an_override__is_rejected_and_never_shown(load_error: LoadError, override: str) -> None:
    error = load_error("name: small", "name: small", override)
    assert "hunter2" not in repr(vars(error)) + str(error)


def test_secret__no_key_of_a_job__looks_like_one() -> None:
    assert not [key for key in known_keys(JobSpec) if is_secret(key.rpartition(".")[2])]


# --set


def loaded_with(path: Path, *overrides: str) -> JobSpec:
    return load_job(path, overrides=overrides).job


@pytest.mark.parametrize(
    ("override", "value_of", "value"),
    [
        ("training.optimizer.lr=1e-3", lambda job: job.training.optimizer.lr, 1e-3),
        ("resources.workers=1..4", lambda job: job.resources.workers, Range(low=1, high=4)),
        ("training.ema.decay=0.9", lambda job: job.training.ema.decay, 0.9),
        ("training.zero={stage: 3}", lambda job: job.training.zero.stage, 3),
        ("model.rope_scaling.factor=2", lambda job: job.model.config_overrides, {"rope_scaling": {"factor": 2}}),
        ("tracking.wandb.entity=", lambda job: job.tracking.wandb.entity, None),
        ("tracking.wandb.project=a=b", lambda job: job.tracking.wandb.project, "a=b"),
    ],
)
def test_override__sets_one_key(
    write: Callable[[str], Path], override: str, value_of: Callable[[JobSpec], Any], value: object
) -> None:
    assert value_of(loaded_with(write(SMALL), override)) == value


def test_override__repeated__last_one_wins_and_null_unsets(write: Callable[[str], Path]) -> None:
    job = loaded_with(write(SMALL), "training.total_steps=null", "training.epochs=1", "training.epochs=2")
    assert (job.training.total_steps, job.training.epochs) == (None, 2.0)


def test_override__below_an_alias__leaves_other_aliases_unchanged(write: Callable[[str], Path]) -> None:
    text = SMALL.replace("architecture: llama", "architecture: llama\n  a: &x {n: 1}\n  b: *x")
    assert loaded_with(write(text), "model.b.n=2").model.config_overrides == {"a": {"n": 1}, "b": {"n": 2}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.zero.stage=9", "--set training.zero.stage=9: must be 0, 1, 2 or 3"),
        ("training.zro.stage=1", "--set training.zro: unknown key; did you mean 'zero'?"),
        ("training.zero={stage: 9}", "--set training.zero.stage=9: must be 0, 1, 2 or 3"),
        ("name.x=1", "--set name.x: 'name' is a value and has no keys below it"),
        ("name", "--set name: write a dotted key and a value, such as training.optimizer.lr=1e-3"),
        ("=1", "--set =1: write a dotted key and a value, such as training.optimizer.lr=1e-3"),
        ("a..b=1", "--set a..b=1: write a dotted key and a value, such as training.optimizer.lr=1e-3"),
        ("data.seed=[1", "--set data.seed: "),
        ("data.seed=\ud800", "--set data.seed: contains the character U+D800, which YAML does not allow"),
    ],
)
def test_override__mistake__names_the_override(load_error: LoadError, override: str, message: str) -> None:
    error = load_error("name: small", "name: small", override)
    assert str(error).startswith(message)
    assert (error.path, error.line) == ("--set", None)


@pytest.mark.parametrize(
    "override", ["model" + ".a" * 5000 + "=1", "model.a=" + "[" * 5000, "data.seed=" + "9" * 5000]
)
def test_override__enormous__gives_a_short_error(load_error: LoadError, override: str) -> None:
    assert len(str(load_error("name: small", "name: small", override))) < 1000


# For later stages


def test_source_map__error_of_a_later_check__has_the_line(write: Callable[[str], Path]) -> None:
    path = write(SMALL.replace("architecture: llama", "architecture: llama\n  hidden_sise: 3\n  token_map: {a: 1}"))
    source = load_job(path, overrides=["model.depth=4"]).source
    error = source.error("model.hidden_sise", "unknown key of llama", nearest="hidden_size")
    assert (
        message_of(error)
        == "job.yaml:4: model.hidden_sise: unknown key of llama (got 3); did you mean 'hidden_size'?"
    )
    assert message_of(source.error("model.token_map", "is wrong")) == "job.yaml:5: model.token_map: is wrong"
    assert message_of(source.error("model.depth", "is wrong")) == "--set model.depth=4: is wrong"


def test_source_map__key_not_in_the_file__names_its_section(write: Callable[[str], Path]) -> None:
    source = load_job(write(SMALL)).source
    assert (
        message_of(source.error("training.zero.stage", "is wrong")) == "job.yaml:7: training.zero.stage: is wrong"
    )
    assert message_of(source.error("tracking", "is wrong")) == "job.yaml:1: tracking: is wrong"


def test_other_words__suggested_keys__exist() -> None:
    assert set(_OTHER_WORDS.values()) <= set(known_keys(JobSpec))
    assert not {key.rpartition(".")[2] for key in known_keys(JobSpec)} & set(_OTHER_WORDS)


@pytest.mark.parametrize(
    "text",
    [
        SMALL,
        PRETRAIN.read_text(),
        SMALL.replace("seq_len: 64", "tokenizer: {from_pretrained: x}"),
        SMALL.replace("source: python-stdlib", "files: [a, b]"),
        SMALL.replace("name: small", "name: '1e3'\ntracking: {wandb: {project: 'no', entity: '12'}}"),
        SMALL.replace("total_steps: 10", "epochs: 1e-8\n  evaluate_every: 0.1s"),
    ],
)
def test_dump_job__loaded_again__is_equal(write: Callable[[str], Path], text: str) -> None:
    job = load_job(write(text)).job
    from_plan = JobSpec.model_validate_json(job.model_dump_json())
    assert from_plan == job
    assert load_job(write(dump_job(job))).job == load_job(write(dump_job(from_plan))).job == job


def test_load_module__imported__does_not_import_torch_or_ray() -> None:
    heavy = "{'torch', 'transformers', 'ray', 'numpy'}"
    script = f"import sys, forge.config.load; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_load_job__problems_of_keys_sections_and_between_sections__are_all_reported(
    write: Callable[[str], Path],
) -> None:
    text = SMALL.replace("seq_len: 64", "seq_len: 1\n  text_kei: body\n  files: []").replace(
        "total_steps: 10",
        "total_steps: 10\n  objective: my_losses:Ranking\n  micro_batch_size: 64\n"
        "  schedule: {kind: steps, warmup: 12}\n  early_stopping: {metric: eval/loss}",
    )
    with pytest.raises(JobFileError) as caught:
        load_job(write(text), overrides=["data.held_out=0", "model.trust_remote_code=true", "model.revision=x"])
    found = {error.key for error in (caught.value, *caught.value.others)}
    assert found == {
        "data.seq_len", "data.text_kei", "data.files", "training.schedule.kind", "training.micro_batch_size",
        "training.schedule.warmup", "training.objective", "training.early_stopping",
        "model.trust_remote_code", "model.revision",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("total_steps: 10", "total_steps: ten", "training.total_steps"),
        ("total_steps: 10", "total_step: 10", "training.total_step"),
        ("total_steps: 10", "total_steps: 10\n  global_batch_size: x\n  micro_batch_size: 64",
         "training.global_batch_size"),
        ("total_steps: 10", "total_steps: 10\n  global_batchsize: 64\n  micro_batch_size: 64",
         "training.global_batchsize"),
        ("architecture: llama", "architecture: 5", "model.architecture"),
        ("source: python-stdlib", "source: python-stlib", "data.source"),
        ("total_steps: 10", "total_steps: 10\n  objective: nonsense\nsearch: {metric: eval/mine, "
         "space: {training.optimizer.lr: {choice: [1]}}}", "training.objective"),
    ],
)  # fmt: skip
def test_load_job__one_mistake__is_one_problem(load_error: LoadError, old: str, new: str, key: str) -> None:
    error = load_error(old, new)
    assert (error.key, error.others) == (key, ())


@pytest.mark.parametrize(
    "override",
    [
        "resources.workers=1..99999999999", "training.global_batch_size=1e15", "training.total_steps=1e18",
        "training.epochs=1e300", "data.seq_len=1e17", "data.tokenizer.vocab_size=1e15",
        "model.num_hidden_layers=1000000000", "model.vocab_size=10000000000000",
    ],
)  # fmt: skip
def test_load_job__number_that_no_plan_can_carry_out__is_refused(load_error: LoadError, override: str) -> None:
    error = load_error("name: small", "name: small", override)
    assert error.key == override.partition("=")[0]
    assert re.search(r"must be at most|must end at|must not be larger", error.problem)


@pytest.mark.timeout(20)
def test_load_job__thousands_of_problems__are_reported_at_once(write: Callable[[str], Path]) -> None:
    keys = "".join(f"  unknown_{number}: {number}\n" for number in range(3000))
    with pytest.raises(JobFileError) as caught:
        load_job(write(SMALL + keys))
    assert len(caught.value.others) == 2999
