"""forge.user_code: importing classes of the user's from the packed folder, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from forge.code_archive import PackedCode, code_folder, has_code, unpack_code
from forge.errors import UserCodeError
from forge.user_code import (
    check_module_names,
    check_reference,
    error_place,
    load_class,
    use_code,
    user_code_errors,
)

RANKING = "class Ranking:\n    def loss(self):\n        return 1\n"


class HasLoss(Protocol):
    name: str

    def loss(self) -> int: ...

    def batch(self) -> int: ...


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    yield
    use_code(None)


def use_files(files: Mapping[str, str]) -> str:
    code = packed(files)
    unpack_code(code)
    use_code(code.digest)
    return code.digest


def packed(files: Mapping[str, str]) -> PackedCode:
    return PackedCode(files={name: files[name].encode() for name in sorted(files)})


def test_load_class__module_and_package__come_from_the_packed_folder() -> None:
    digest = use_files({"my_losses.py": RANKING, "losses/a.py": "from losses.b import B\nclass A(B): ...\n",
                        "losses/b.py": "class B: ...\n"})  # fmt: skip
    assert load_class("my_losses:Ranking")().loss() == 1
    assert load_class("losses.a:A").__mro__[1].__name__ == "B"
    assert has_code(digest)  # no byte code is written into the folder
    assert sys.modules["my_losses"].__file__ == str(code_folder(digest) / "my_losses.py")


def test_use_code__another_digest__forgets_the_modules_of_the_first() -> None:
    use_files({"my_losses.py": RANKING})
    assert load_class("my_losses:Ranking")().loss() == 1
    use_files({"my_losses.py": RANKING.replace("1", "2")})
    assert load_class("my_losses:Ranking")().loss() == 2
    use_code(None)
    assert "my_losses" not in sys.modules
    assert not any("cache" in entry and "code" in entry for entry in sys.path)


def test_use_code__code_is_not_in_the_cache__is_refused() -> None:
    with pytest.raises(UserCodeError, match="does not hold the code"):
        use_code("0" * 32)


def test_use_code__changed_after_it_was_unpacked__is_refused() -> None:
    digest = use_files({"my_losses.py": RANKING})
    use_code(None)
    (code_folder(digest) / "my_losses.py").write_text("import os\n")
    with pytest.raises(UserCodeError, match="does not hold the code"):
        use_code(digest)


def test_load_class__same_module_in_the_current_folder__does_not_win(tmp_path: Path) -> None:
    digest = use_files({"my_losses.py": RANKING})
    (tmp_path / "my_losses.py").write_text("raise SystemExit('the wrong module')\n")
    script = (
        "from forge.user_code import load_class, use_code\n"
        f"use_code({digest!r})\n"
        "print(load_class('my_losses:Ranking')().loss())\n"
    )
    for command in ([sys.executable, "-P", "-c", script], [sys.executable, "-c", script]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stdout == "1\n", done.stderr


def test_load_class__module_only_in_the_current_folder__is_not_found(tmp_path: Path) -> None:
    digest = use_files({"my_losses.py": RANKING})
    (tmp_path / "other.py").write_text("class Other: ...\n")
    script = f"from forge.user_code import load_class, use_code\nuse_code({digest!r})\nload_class('other:Other')\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "UserCodeError" in done.stderr


def test_load_class__no_torch__is_imported() -> None:
    script = "import sys, forge.user_code; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_load_class__job_without_code__says_how_to_add_it() -> None:
    with pytest.raises(UserCodeError, match=r"the job has no `code:`; add the folder that contains my_losses\.py"):
        load_class("my_losses:Ranking")


@pytest.mark.parametrize(
    "reference", ["my_losses", ":Ranking", "my_losses:", "my losses:A", "../a:B", "a:b:C", "a.:B"]
)
def test_load_class__not_module_and_class__is_refused(reference: str) -> None:
    use_files({"my_losses.py": RANKING})
    with pytest.raises(UserCodeError, match="must be a module and a class"):
        load_class(reference)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = 1\nclass Ranking(:\n", r"my_losses\.py:2: SyntaxError"),
        ("x = 1\n\nraise ValueError('no data')\n", r"my_losses\.py:3: ValueError: no data"),
        ("import json\n\njson.loads('{')\n", r"my_losses\.py:3: JSONDecodeError"),
        ("import no_such_module\n", r"my_losses\.py:1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("import my\n", r"my_losses\.py:1: ModuleNotFoundError: No module named 'my'"),
        (
            "class E(Exception):\n    def __str__(self): return 1 / 0\nraise E\n",
            r"my_losses\.py:3: E: its text cannot",
        ),
        ("import sys\nsys.exit(3)\n", r"my_losses\.py:2: SystemExit: 3"),
        ("class Rankings:\n    ...\n", r"my_losses\.py has no class Ranking; did you mean Rankings\?"),
        ("class Other:\n    ...\n", r"my_losses\.py has no class Ranking; it has Other"),
        ("x = 1\n", "it has no class"),
        ("def Ranking(): ...\n", "is function .*, not a class"),
        ("Ranking = 7\n", "is int 7, not a class"),
        (RANKING, r"my_losses\.py:1: Ranking lacks batch; see HasLoss"),
        ("class Ranking: ...\n", r"my_losses\.py:1: Ranking lacks loss and batch; see HasLoss in tests"),
    ],
)
def test_load_class__unusable_module__names_the_users_line(text: str, problem: str) -> None:
    use_files({"my_losses.py": text})
    with pytest.raises(UserCodeError, match=problem):
        load_class("my_losses:Ranking", base=HasLoss)


CALLER = """import ast, json
from lib import deeper

class Ranking:
    def in_json(self):
        return json.loads('{')

    def in_helper(self):
        return deeper('{')

    def in_a_sort(self):
        return sorted([1], key=lambda value: value.rank)

    def in_parsed_text(self):
        return ast.literal_eval('1 +')
"""


@pytest.mark.parametrize(
    ("method", "place"),
    [("in_json", "my_losses.py:6"), ("in_helper", "lib.py:4"), ("in_a_sort", "my_losses.py:12"),
     ("in_parsed_text", "my_losses.py:15")],
)  # fmt: skip
def test_error_place__error_in_a_library__is_the_innermost_line_of_the_user(method: str, place: str) -> None:
    use_files({"lib.py": "import json\n\ndef deeper(text):\n    json.loads(text)\n", "my_losses.py": CALLER})
    ranking = load_class("my_losses:Ranking")()
    with pytest.raises(UserCodeError) as caught, user_code_errors("Ranking"):
        getattr(ranking, method)()
    assert str(caught.value).startswith(f"{place}: ")
    assert caught.value.__cause__ is not None
    assert error_place(caught.value.__cause__) == place


def test_error_place__no_line_of_the_user__is_empty() -> None:
    use_files({"my_losses.py": RANKING})
    assert error_place(ValueError()) == ""
    with pytest.raises(UserCodeError, match=r"^Ranking: ValueError: none$"), user_code_errors("Ranking"):
        raise ValueError("none")


def test_load_class__base_is_no_protocol__must_be_derived_from_it() -> None:
    use_files({"my_losses.py": RANKING + "\nclass Mapped(dict): ...\n"})
    assert issubclass(load_class("my_losses:Mapped", base=dict), dict)
    with pytest.raises(UserCodeError, match=r"my_losses\.py:1: Ranking must be derived from builtins\.dict"):
        load_class("my_losses:Ranking", base=dict)


def test_load_class__module_imported_before_from_elsewhere__is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_shared_name.py").write_text("class Ranking: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("my_shared_name")
    use_files({"my_shared_name.py": RANKING})
    with pytest.raises(UserCodeError, match="already imported from"):
        load_class("my_shared_name:Ranking")
    del sys.modules["my_shared_name"]


@pytest.mark.parametrize(
    ("file", "owner"),
    [
        ("json.py", "Python's own module json"),
        ("forge/__init__.py", "forge's own package"),
        ("torch.py", "an installed module"),
        ("numpy/core.py", "an installed module"),
    ],
)
def test_check_module_names__name_of_another_module__is_refused(file: str, owner: str, tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match=f"{file.split('/')[0]} has the name of {owner}"):
        check_module_names(packed({file: ""}), folder=tmp_path)


def test_check_module_names__own_names_and_data__are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = packed({"my_losses.py": RANKING, "json/table.csv": "", "my_lib/json.py": "", "setup.cfg": ""})
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "my_losses.py").write_text(RANKING)
    monkeypatch.syspath_prepend(tmp_path / "src")  # installed in place: `pip install -e src`
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_lib").mkdir()
    (tmp_path / "my_lib" / "__init__.py").touch()  # in the current folder, which is never searched
    check_module_names(code, folder=tmp_path / "src")


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("my_loses:Ranking", r"no my_loses\.py; did you mean my_losses\?"),
        ("zzz:Ranking", r"no zzz\.py; it has broken, deep, my_losses, pack\.__init__"),
        ("broken:A", r"broken\.py:2: SyntaxError"),
        ("deep:A", r"deep\.py: its expressions are nested too deeply"),
    ],
)
def test_check_reference__what_can_be_found_without_import__is_found(reference: str, problem: str) -> None:
    code = packed({"my_losses.py": RANKING, "broken.py": "x = 1\ndef f(:\n", "pack/__init__.py": "",
                   "deep.py": "-" * 100_000 + "1"})  # fmt: skip
    check_reference(code, "my_losses:Ranking")
    check_reference(code, "pack:A")
    with pytest.raises(UserCodeError, match=problem):
        check_reference(code, reference)
