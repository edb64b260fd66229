"""A second reader of the checkpoint format, which shares no code with forge, must agree with forge's own."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from forge.checkpoint.intervals import Interval, pack
from forge.checkpoint.manifest import (
    MANIFEST,
    ModelShape,
    Parameter,
    Part,
    Progress,
    manifest_bytes,
    part_header,
    state_bytes,
    state_name,
)
from forge.checkpoint.reader import Checkpoint, open_checkpoint
from forge.checkpoint.storage import open_storage
from forge.inference.weights import CheckpointWeights
from forge.plan.inputs import CorpusInfo
from forge.train.model_shape import DTYPE_NAMES
from forge.train.state import bytes_of
from tests.support.jobs import tiny_plan
from tests.support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "read-checkpoint" / "read_checkpoint.py"
FORMAT = ROOT / "docs" / "checkpoint-format.md"

# Runs the example where importing anything but these fails, and tells what was imported.
ALONE = """
import runpy, sys
allowed = {*sys.stdlib_module_names, "numpy", "safetensors"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ImportError(f"{name} is not there")

before = set(sys.modules)
sys.meta_path.insert(0, Refuse())
try:
    import forge
except ImportError as error:
    assert str(error) == "forge is not there"
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    foreign = {name.partition(".")[0] for name in set(sys.modules) - before} - allowed
    sys.stderr.write(f"foreign: {sorted(foreign)}\\n")
"""


@pytest.fixture(scope="module")
def trained(corpus: CorpusInfo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At least two checkpoints of two ranks."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoints"
    plan = tiny_plan(corpus, training__ema={"decay": 0.9}, checkpoint__every="2 steps")
    run_ranks(plan, folder, world_size=2)
    return folder


@pytest.fixture
def checkpoints(trained: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "checkpoints"))


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("read_checkpoint", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_its_values_are_those_of_forges_own_reader_bit_for_bit(trained: Path, example: ModuleType) -> None:
    folder = steps(trained)[0]
    held = open_checkpoint(open_storage(str(trained)), folder.name)
    assert len(held.manifest.parts) == 2
    assert held.kinds == {"master", "ema", "exp_avg", "exp_avg_sq"}
    values = dict(CheckpointWeights(held).tensors())
    for name, parameter in held.shape.parameters.items():
        for kind in held.kinds:
            found = example.read(folder, name, kind)
            assert found.dtype == np.float32
            assert found.shape == parameter.shape
            assert found.tobytes() == elements(held, name, kind), f"{kind} of {name}"
        assert example.read(str(folder), name).tobytes() == values[name].numpy().tobytes()


def test_the_library_of_safetensors_finds_the_same_under_the_keys(trained: Path) -> None:
    folder = steps(trained)[0]
    for part in json.loads((folder / MANIFEST).read_bytes())["parts"]:
        data = (folder / part["name"]).read_bytes()
        with safe_open(folder / part["name"], framework="np") as file:
            assert len(file.keys()) == len(part["intervals"])
            end = part["data_start"]
            for kind, name, start, stop, _ in part["intervals"]:
                begin, end = end, end + 4 * (stop - start)
                assert file.get_tensor(f"{kind}/{start}/{name}").tobytes() == data[begin:end]
        assert end == part["size_bytes"]


def test_it_reads_every_type_that_numpy_has_bf16_as_float32_scalars_and_tied_names(
    tmp_path: Path, example: ModuleType
) -> None:
    tensors = {
        "w": torch.randn(6, 4).to(torch.bfloat16),
        "scale": torch.tensor(0.5, dtype=torch.float16),
        "double": torch.randn(3, dtype=torch.float64),
        "count": torch.tensor([2**40, -1]),
        "mask": torch.tensor([True, False, True]),
        "byte/with slash": torch.arange(5, dtype=torch.uint8),
    }
    folder = tmp_path / "step-00000001"
    write_constants(folder, tensors, tied={"w2": "w"})
    held = open_checkpoint(open_storage(str(tmp_path)), folder.name)
    values = dict(CheckpointWeights(held).tensors())
    for name, tensor in tensors.items():
        expected = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        found = example.read(folder, name, "frozen")
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
        assert torch.equal(values[name], tensor)
    assert np.array_equal(example.read(folder, "w2", "frozen"), tensors["w"].float().numpy())


def test_it_walks_back_past_a_flipped_byte_in_a_part(checkpoints: Path) -> None:
    newest, before = steps(checkpoints)[:2]
    part = next(newest.glob("part-00001-*"))
    flip(part, part.stat().st_size - 100)
    answer = run(checkpoints, "lm_head.weight", "ema", checkpoints / "out.npy")
    assert answer.returncode == 0
    assert f"{newest.name} is skipped: {part.name} does not match" in answer.stderr
    held = open_checkpoint(open_storage(str(checkpoints)), before.name)
    assert np.load(checkpoints / "out.npy").tobytes() == elements(held, "lm_head.weight", "ema")


def test_it_walks_back_past_a_flipped_byte_in_the_manifest(checkpoints: Path) -> None:
    newest, before = steps(checkpoints)[:2]
    flip(newest / MANIFEST, (newest / MANIFEST).stat().st_size // 2)
    answer = run(checkpoints, "lm_head.weight", "master", checkpoints / "out.npy")
    assert answer.returncode == 0
    assert f"{newest.name} is skipped: " in answer.stderr
    held = open_checkpoint(open_storage(str(checkpoints)), before.name)
    assert np.load(checkpoints / "out.npy").tobytes() == elements(held, "lm_head.weight", "master")


@pytest.mark.parametrize("bit", [0x01, 0x20, 0x80])
def test_no_flipped_bit_of_a_manifest_is_believed(checkpoints: Path, example: ModuleType, bit: int) -> None:
    folder = steps(checkpoints)[0]
    text = (folder / MANIFEST).read_bytes()
    for at in {*range(64), *range(64, len(text), 41), len(text) - 1}:
        (folder / MANIFEST).write_bytes(text[:at] + bytes([text[at] ^ bit]) + text[at + 1 :])
        with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
            example.load(folder)


def test_it_lists_every_tensor_with_its_shape_and_kinds_and_imports_nothing_foreign(trained: Path) -> None:
    folder = steps(trained)[0]
    held = open_checkpoint(open_storage(str(trained)), folder.name)
    answer = run(trained)
    assert (answer.returncode, answer.stderr) == (0, "foreign: []\n")
    assert sorted(answer.stdout.splitlines()) == sorted(
        f"{name} {list(parameter.shape)} {kind}"
        for name, parameter in held.shape.parameters.items()
        for kind in held.kinds
    )


def test_it_reads_one_checkpoint_given_its_own_folder(trained: Path, tmp_path: Path) -> None:
    oldest = steps(trained)[-1]
    listed = run(oldest)
    assert (listed.returncode, listed.stdout) == (0, run(trained).stdout)
    assert run(oldest, "lm_head.weight", "master", tmp_path / "out.npy").returncode == 0
    held = open_checkpoint(open_storage(str(trained)), oldest.name)
    assert np.load(tmp_path / "out.npy").tobytes() == elements(held, "lm_head.weight", "master")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing 1 required positional argument"),
        (["nowhere"], "nowhere contains no checkpoint that verifies"),
        (["HERE", "no.such.weight"], "does not contain all of no.such.weight as master"),
        (["HERE", "lm_head.weight", "buffer"], "does not contain all of lm_head.weight as buffer"),
        (["HERE", "lm_head.weight", "ema", "no/such/folder/out.npy"], "No such file or directory"),
    ],
)
def test_bad_input_is_said_and_ends_with_2(trained: Path, arguments: list[str], message: str) -> None:
    answer = run(*(str(trained) if argument == "HERE" else argument for argument in arguments))
    assert answer.returncode == 2
    assert message in answer.stderr
    assert "usage:" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_the_reader_is_at_most_60_lines() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60


def test_the_page_about_the_format_names_every_key_that_stands_in_a_real_checkpoint(trained: Path) -> None:
    page = FORMAT.read_text()
    folder = steps(trained)[0]
    manifest = json.loads((folder / MANIFEST).read_bytes())
    state = json.loads((folder / manifest["state"]["name"]).read_bytes())
    # What stands below these is named by the model, not by the format.
    by_model = {"config", "tied"}
    keys = {*keys_of(manifest), *keys_of({key: state[key] for key in state if key not in by_model})}
    keys = (keys | by_model) - set(state["parameters"])
    assert {"crc32", "data_start", "config_digest", "shape"} <= keys
    assert [key for key in sorted(keys) if f"`{key}`" not in page] == []


def steps(checkpoints: Path) -> list[Path]:
    """Newest first."""
    return sorted(checkpoints.glob("step-*"), reverse=True)


def elements(held: Checkpoint, name: str, kind: str) -> bytes:
    """A whole parameter in one fp32 kind, by forge's own reader."""
    whole = held.value_interval(name)
    target = bytearray(4 * whole.numel)
    held.read([(Interval(kind=kind, name=name, start=0, stop=whole.stop, dtype="F32"), memoryview(target))])
    return bytes(target)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The example on an interpreter that has only numpy, safetensors and the standard library."""
    command = [sys.executable, "-I", "-c", ALONE, str(EXAMPLE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def keys_of(value: Any) -> Iterator[str]:
    """The keys of a JSON value and of all that lies in it."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    for child in value if isinstance(value, list) else ():
        yield from keys_of(child)


def write_constants(folder: Path, tensors: dict[str, torch.Tensor], *, tied: dict[str, str]) -> None:
    """A checkpoint of tensors that are not trained, each cut in two; the second half lies in the first part."""
    folder.mkdir()
    shape = ModelShape(
        parameters={
            name: Parameter(shape=tuple(tensor.shape), dtype=DTYPE_NAMES[tensor.dtype], kind="frozen")
            for name, tensor in tensors.items()
        },
        tied=tied,
        config={},
    )
    parts = []
    for rank in (0, 1):
        cuts = {name: (tensor.numel() // 2, tensor.numel()) for name, tensor in tensors.items()}
        if rank == 1:
            cuts = {name: (0, middle) for name, (middle, _) in cuts.items()}
        layout = pack(
            Interval(kind="frozen", name=name, start=start, stop=stop, dtype=DTYPE_NAMES[tensors[name].dtype])
            for name, (start, stop) in cuts.items()
        )
        data = b"".join(bytes_of(tensors[i.name].flatten()[i.start : i.stop].clone()) for i in layout.intervals)
        text = part_header(layout) + data
        name = f"part-{rank:05d}-0123456789ab.safetensors"
        (folder / name).write_bytes(text)
        parts.append(Part(name=name, size_bytes=len(text), crc32=zlib.crc32(text), layout=layout))
    state = state_bytes(Progress(step=1, num_tokens=1, config_digest="r", corpus="c"), shape)
    (folder / state_name(token="0123456789ab")).write_bytes(state)
    (folder / MANIFEST).write_bytes(manifest_bytes(1, parts=parts, state=state, token="0123456789ab"))
