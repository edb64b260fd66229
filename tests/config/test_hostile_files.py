"""For any bytes in a job file, the loader returns a job or raises a JobFileError, within two seconds."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from forge.config import yaml_reader
from forge.config.job import JobSpec
from forge.config.load import LoadedJob, load_job
from forge.errors import JobFileError

PRETRAIN = Path(__file__).parents[2] / "jobs" / "pretrain.yaml"
MAX_S = 2.0
MAX_MESSAGE = 12_000

NASTY = [
    "", " ", "~", "null", "nan", ".nan", "inf", "-.inf", "1e999", "-1e999", "1e-999", "-0", "0", "-1", "1.5",
    "9" * 30, "9" * 5000, "0x10", "0o7", "1_000", "1e3", "true", "no", "2024-01-31", "12:30", "=", "<<", "..",
    "1..", "..1", "99..1", "1..99999999999999999999", "1 %", "101%", "-1%", "0 steps", "-5 steps", "0s",
    "1e300d", "10 parsecs", "[]", "{}", "[[]]", "[1, 2", "{a: 1", "{a: 1, a: 2}", "[*a]", "*a", "&a", "&a 1",
    "&a [*a]", "{<<: {a: 1}}", "{? : }", "!!python/object/apply:os.system [ls]", "!!binary aGk=", "!!int '1'",
    "!x y", "!!set {a}", "!!str", "!", "|", ">", "|\n", "'", '"', '"\\0"', '"\\ud800"', '"\\UFFFFFFFF"',
    '"\\x1b[31m"', "'\u202e'", "\u2028", "\x85", "é😀", "\x07", "\x00", "${env:HOME}",
    "${env:NOT_SET_ANYWHERE}", "${env:", "${x}", "${}", "$", "'${env:${env:A}}'", "%", "@", "`", "- - -",
    "? ?", "---", "...", "%YAML 9.9", "#", "a: b", "a: b: c", "\t", "\tx", "x\ty", "[" * 60, "{a: " * 60,
    "- " * 60, "a" * 5000, "model_config", "__class__", "__proto__", "model_fields", "self",
    "{model_dump: 1, copy: 2, json: 3}",
]  # fmt: skip


def flip_bytes(data: bytes, rng: random.Random) -> bytes:
    body = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return bytes(body)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + _nasty(rng) + data[at:]


def shuffle_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(3):
        case 0:
            del lines[first]
        case 1:
            lines.insert(second, lines[first])
        case _:
            lines[first], lines[second] = lines[second], lines[first]
    return b"\n".join(lines)


def indent(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    by = rng.choice([b"", b" ", b"  ", b"   ", b"\t", b" \t", b" " * 200])
    lines[at] = by + (lines[at].lstrip() if rng.random() < 0.5 else lines[at])
    return b"\n".join(lines)


def replace_value(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.choice([n for n, line in enumerate(lines) if b": " in line])
    key, colon, _ = lines[at].rpartition(b": ") if rng.random() < 0.5 else lines[at].partition(b": ")
    lines[at] = key + colon + _nasty(rng) + rng.choice([b"", b"}"])
    return b"\n".join(lines)


def rename_key(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.choice([n for n, line in enumerate(lines) if b":" in line])
    key, colon, value = lines[at].partition(b":")
    spaces = key[: len(key) - len(key.lstrip())]
    name = bytearray(key.strip() or b"x")
    name[rng.randrange(len(name))] = rng.choice(b"abcdefghij_-")
    lines[at] = spaces + (bytes(name) if rng.random() < 0.7 else _nasty(rng)) + colon + value
    return b"\n".join(lines)


def _nasty(rng: random.Random) -> bytes:
    return rng.choice(NASTY).encode("utf-8", "surrogatepass")


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    flip_bytes,
    truncate,
    insert,
    shuffle_lines,
    indent,
    replace_value,
    rename_key,
]


@pytest.mark.parametrize(
    ("loader", "num_files"), [("CSafeLoader", 400), ("SafeLoader", 60)], ids=["libyaml", "python"]
)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_load_job__damaged_file__gives_a_job_or_one_error(
    mutation: Callable[[bytes, random.Random], bytes],
    loader: str,
    num_files: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not hasattr(yaml, loader):
        pytest.skip("PyYAML without libyaml")
    monkeypatch.setattr(yaml_reader, "_LOADER", getattr(yaml, loader))
    rng = random.Random(f"{mutation.__name__} {loader}")
    original = PRETRAIN.read_bytes()
    path = tmp_path / "job.yaml"
    outcomes: Counter[type] = Counter()
    for _ in range(num_files):
        data = mutation(original, rng)
        while data and rng.random() < 0.3:
            data = rng.choice(MUTATIONS[:3])(data, rng)
        path.write_bytes(data)
        outcomes[type(outcome_of(path, data))] += 1
    assert outcomes[JobFileError] > num_files / 10, "the mutations hardly damage anything"


@pytest.mark.parametrize("value", NASTY)
@pytest.mark.parametrize("key", ["name", "model.hidden_size", "data.files", "training.ema", "resources.workers"])
def test_load_job__hostile_override__gives_a_job_or_one_error(key: str, value: str) -> None:
    try:
        job = load_job(PRETRAIN, overrides=[f"{key}={value}"]).job
    except JobFileError as error:
        check_message(error)
    else:
        assert JobSpec.model_validate_json(job.model_dump_json()) == job


def outcome_of(path: Path, data: bytes) -> Any:
    start_s = time.process_time()
    try:
        outcome: LoadedJob | JobFileError = load_job(path)
    except JobFileError as error:
        outcome = error
        check_message(error)
        assert str(path) in str(error)
    except Exception as error:
        raise AssertionError(f"{error!r} from {data!r}") from error
    assert time.process_time() - start_s < MAX_S, f"slow: {data!r}"
    return outcome


def check_message(error: JobFileError) -> None:
    message = str(error).replace(str(error.path), "job.yaml")
    assert error.problem
    assert 0 < len(message) < MAX_MESSAGE
    assert message.replace("\n", "").isprintable()
    assert not any(jargon in message for jargon in ("Input should", "pydantic", "Spec", "NoneType", "ctx")), message
