"""Fixtures come from pinned packages: another content or licence is refused, and nothing is half prepared."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "examples" / "fixtures.py"


@pytest.fixture
def fixtures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, with a folder of its own and wheels from `tmp_path/index` alone."""
    spec = importlib.util.spec_from_file_location("forge_fixtures", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "forge_fixtures", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path / "fixtures")
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    yield module


def write_wheel(folder: Path, *, files: dict[str, str], licence: str = "BSD License") -> str:
    """Write a wheel of `chatterbot-corpus` 1.3.3. Returns: its SHA-256."""
    info = "chatterbot_corpus-1.3.3.dist-info"
    metadata = "Metadata-Version: 2.1\nName: chatterbot-corpus\nVersion: 1.3.3\n"
    files = files | {
        f"{info}/METADATA": metadata + f"Classifier: License :: OSI Approved :: {licence}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    path = folder / "chatterbot_corpus-1.3.3-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(content)}")
        archive.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]))
    return hashlib.sha256(path.read_bytes()).hexdigest()


CHATS = {
    "chatterbot_corpus/data/english/a.yml": "conversations:\n- [Hi, Hello, 'Bye ', So long]\n- [Only a question]\n",
    "chatterbot_corpus/data/english/b.yml": "conversations:\n- ['Is it 3?', 3, '', lost]\n",
    "chatterbot_corpus/data/german/a.yml": "conversations:\n- [Hallo, Tag]\n",
}


def pin(fixtures: ModuleType, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    chat = fixtures.FIXTURES["chat"]
    monkeypatch.setitem(fixtures.FIXTURES, "chat", replace(chat, origin=replace(chat.origin, **changes)))


def test_prepare__pinned_package__writes_its_conversations_once(
    fixtures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pin(fixtures, monkeypatch, sha256=write_wheel(tmp_path / "index", files=CHATS))
    fixtures.prepare("chat")
    lines = (tmp_path / "fixtures" / "chat" / "english.jsonl").read_text().splitlines()
    turns = [[message["content"] for message in json.loads(line)["messages"]] for line in lines]
    assert turns == [["Hi", "Hello", "Bye", "So long"], ["Is it 3?", "3"]]
    assert "BSD License" in capsys.readouterr().out
    (tmp_path / "index" / "chatterbot_corpus-1.3.3-py3-none-any.whl").unlink()
    fixtures.prepare("chat")
    assert "is there" in capsys.readouterr().out
    record = json.loads((tmp_path / "fixtures" / "chat" / "FIXTURE.json").read_text())
    assert record["licence"] == "BSD License"
    assert set(record["files"]) == {"english.jsonl", "PACKAGE-METADATA"}


@pytest.mark.parametrize(
    ("licence", "is_pinned", "message"),
    [("BSD License", False, "has the SHA-256 .*, not 86de5300afb9"), ("Other", True, "is Other, not BSD License")],
)
def test_prepare__another_content_or_licence__is_refused_and_leaves_nothing(
    fixtures: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    licence: str,
    is_pinned: bool,
    message: str,
) -> None:
    found = write_wheel(tmp_path / "index", files=CHATS, licence=licence)
    if is_pinned:
        pin(fixtures, monkeypatch, sha256=found)
    with pytest.raises(ValueError, match=message):
        fixtures.prepare("chat")
    assert [path.name for path in (tmp_path / "fixtures").iterdir()] == [".lock"]


@pytest.mark.parametrize("damage", ["cut", "lost", "no record"])
def test_prepare__files_that_are_not_as_they_were_written__are_prepared_again(
    fixtures: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    pin(fixtures, monkeypatch, sha256=write_wheel(tmp_path / "index", files=CHATS))
    fixtures.prepare("chat")
    folder = tmp_path / "fixtures" / "chat"
    whole = (folder / "english.jsonl").read_bytes()
    (tmp_path / "fixtures" / ".draft-killed").mkdir()
    if damage == "cut":
        (folder / "english.jsonl").write_bytes(whole[:-9])
    else:
        (folder / ("english.jsonl" if damage == "lost" else "FIXTURE.json")).unlink()
    fixtures.prepare("chat")
    assert "prepared again" in capsys.readouterr().out
    assert (folder / "english.jsonl").read_bytes() == whole
    assert sorted(path.name for path in (tmp_path / "fixtures").iterdir()) == [".lock", "chat"]


def test_prepare__interrupted_at_any_step__leaves_no_folder_of_the_name(
    fixtures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin(fixtures, monkeypatch, sha256=write_wheel(tmp_path / "index", files=CHATS))
    for step in ("_sha256", "convert_chatterbot", "_seal", "sync_folder"):
        with monkeypatch.context() as patch:

            def interrupt(*_: Any, **__: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(fixtures, step, interrupt)
            chat = fixtures.FIXTURES["chat"]
            if step == "convert_chatterbot":
                patch.setitem(fixtures.FIXTURES, "chat", replace(chat, convert=interrupt))
            with pytest.raises(KeyboardInterrupt):
                fixtures.prepare("chat")
        assert [path.name for path in (tmp_path / "fixtures").iterdir()] == [".lock"], step


def test_main__without_network__names_what_failed_and_goes_on(
    fixtures: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fixtures.py"])
    monkeypatch.setattr(fixtures.shutil, "which", lambda _: None)
    monkeypatch.setattr(fixtures, "find_spec", lambda _: None)
    monkeypatch.setattr(fixtures.sysconfig, "get_paths", lambda: {"stdlib": str(Path(__file__).parent)})
    assert fixtures.main() == 1
    out, err = capsys.readouterr()
    assert "debian: skipped: it needs apt-get" in err
    assert "smollm2: skipped: it needs gguf: pip install" in err
    for name in ("smollm2", "minilm", "chat", "preferences"):
        assert f"{name}: " in err
    assert "functions: functions of Python's standard library" in out
    monkeypatch.setattr(sys, "argv", ["fixtures.py", "debian"])
    assert fixtures.main() == 1
    monkeypatch.setattr(sys, "argv", ["fixtures.py", "functions"])
    assert fixtures.main() == 0


PACKAGES = """\
Package: a
Section: games
Description: a game
Description-md5: 1

Package: a-data
Section: data
Description: a game
Description-md5: 1

Package: b
Section: net
Description: a tool
Description-md5: 2
"""
ENGLISH = """\
Package: a
Description-md5: 1
Description-en: a game
 First line
 second line.
 .
 Second paragraph.

Package: b
Description-md5: 2
Description-en: a tool
"""
GERMAN = """\
Package: a
Description-md5: 1
Description-de: ein Spiel
 Ein Absatz.

Package: c
Description-md5: 9
Description-de: verwaist
"""


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_debian__lists__become_sections_summaries_and_translations(fixtures: ModuleType, tmp_path: Path) -> None:
    lists, folder = tmp_path / "lists", tmp_path / "made"
    lists.mkdir()
    folder.mkdir()
    contents = {"Packages": PACKAGES, "Translation-en": ENGLISH, "Translation-de": GERMAN, "Translation-fr": GERMAN}
    for name, content in contents.items():
        (lists / f"deb.debian.org_debian_dists_bookworm_main_{name}").write_text(content)
    fixtures.convert_debian(lists, folder)
    text = "First line\nsecond line.\n\nSecond paragraph."
    assert read(folder / "summaries.jsonl") == [{"source": text, "target": "a game"}]
    assert read(folder / "sections.jsonl") == [
        {"text": f"a game\n\n{text}", "label": "games"},
        {"text": "a tool", "label": "net"},
    ]
    assert read(folder / "en-de.jsonl") == [{"source": f"a game\n\n{text}", "target": "ein Spiel\n\nEin Absatz."}]


def test_debian__other_lists_than_those_checked__are_used_and_said(
    fixtures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    apt = tmp_path / "bin" / "apt-get"
    apt.write_text(
        textwrap.dedent("""\
            #!/bin/sh
            for word; do case "$word" in Dir::State::lists=*) lists="${word#*=}";; esac; done
            for name in Packages Translation-en Translation-de Translation-fr; do
              printf 'Package: a\\nDescription-md5: 1\\nDescription-en: a\\n' > "$lists/main_$name"
            done
        """)
    )
    apt.chmod(0o755)
    monkeypatch.setattr(fixtures.shutil, "which", lambda _: str(apt))
    monkeypatch.setattr(fixtures.Path, "exists", lambda self: True if "keyrings" in str(self) else self.is_dir())
    run = subprocess.run
    monkeypatch.setattr(
        fixtures.subprocess, "run", lambda command, **options: run([str(apt), *command[1:]], **options)
    )
    fixtures.prepare("debian")
    assert "Packages is not that of Debian" in capsys.readouterr().out
    origin = json.loads((tmp_path / "fixtures" / "debian" / "FIXTURE.json").read_text())["origin"]
    assert origin["release"].startswith("another release")
    assert len(origin["sha256 of Packages"]) == 64


def test_preferences__scores_of_people__choose_the_less_harmful_response(
    fixtures: ModuleType, tmp_path: Path
) -> None:
    folder = tmp_path / "pyrit" / "datasets" / "scorer_evals" / "harm"
    folder.mkdir(parents=True)
    (folder / "a.csv").write_text(
        "# dataset_version=1.0,,\nobjective,assistant_response,human_score_1,human_score_2\n"
        "q,kind,0.25,0\nq,worse,1.0,\nq,middle,0.5,0.5\nsame,one,1,1\nsame,two,1,1\nalone,one,0,0\n"
    )
    (tmp_path / "x.dist-info").mkdir()
    (tmp_path / "x.dist-info" / "METADATA").touch()
    fixtures.convert_pyrit(tmp_path, tmp_path)
    assert read(tmp_path / "preferences.jsonl") == [{"prompt": "q", "chosen": "kind", "rejected": "worse"}]


def test_functions__docstring_and_signature__are_the_source(fixtures: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "class A:\n    def f(self, x):\n        'Double it.\\n\\nMore.'\n        y = 2\n        return x * y\n\n"
        "    def g(self): pass\n"
    )
    (tmp_path / "bad.py").write_text("print 'two'\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.py").write_text("def f():\n    'x'\n    return 1\n")
    fixtures.convert_functions(tmp_path, tmp_path)
    assert read(tmp_path / "functions.jsonl") == [
        {"source": "def f(self, x):\nDouble it.", "target": "y = 2\nreturn x * y"}
    ]
