"""The documentation names only modules, functions, files and terms that exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORGE = ROOT / "forge"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*/README.md"))]

# Also sections of the job file, whose keys are written the same way as modules: `data.files`.
SECTIONS = ["checkpoint", "cluster", "data", "model", "objective", "search"]
PACKAGES = sorted(
    folder.parent.name for folder in FORGE.glob("*/__init__.py") if folder.parent.name not in SECTIONS
)

FILE = re.compile(r"(?<![\w./<-])[\w-][\w./-]*\.py\b")
FOLDER = re.compile(r"(?<=`)[\w-][\w./-]*/(?=`)")
DOTTED = re.compile(rf"(?<![\w./-])(?:forge\.(?:\w+\.)*|(?:{'|'.join(PACKAGES)})\.)\w+(?![\w/])")
TERM = re.compile(r"^\| ([^|]+?) \|", re.MULTILINE)

# The user's modules in examples, and one that hides an installed module.
USERS_FILES = {"src/my_losses.py", "json.py", "torch.py"}


def id_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def occurrences(pattern: re.Pattern[str], page: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(page.read_text().splitlines(), 1):
        for match in pattern.finditer(line):
            yield f"{id_of(page)}:{number}", match[0]


def has_path(name: str, *, page: Path) -> bool:
    """Whether a path exists from the root, from the page, or as the end of a path in forge."""
    return (
        (ROOT / name).exists()
        or (page.parent / name).exists()
        or any(FORGE.glob(f"**/{name.rstrip('/')}"))
        or any(page.parent.glob(f"*/{name}"))
    )


def has_name(dotted: str) -> bool:
    """Whether a dotted name is a module of forge, or is defined in one; a trailing file suffix is no name."""
    parts = dotted.removeprefix("forge.").split(".")
    for end in range(len(parts), 0, -1):
        module = FORGE.joinpath(*parts[:end])
        if module.is_dir() and end == len(parts):
            return True
        if module.with_suffix(".py").is_file():
            return end == len(parts) or is_defined(parts[end], module.with_suffix(".py").read_text())
    if len(parts) == 1:
        return is_defined(parts[0], (FORGE / "__init__.py").read_text())
    return any(is_defined(parts[1], module.read_text()) for module in (FORGE / parts[0]).glob("*.py"))


def is_defined(name: str, source: str) -> bool:
    return (
        re.search(rf"^(?:def |async def |class |type )?{name}\b|\"{name}\"|import .*\b{name}\b", source, re.M)
        is not None
    )


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_docs__files_named__exist(page: Path) -> None:
    names = [(location, name) for location, name in occurrences(FILE, page) if name not in USERS_FILES]
    assert [f"{location}: {name}" for location, name in names if not has_path(name, page=page)] == []


def test_architecture_page__folders_named__exist() -> None:
    page = ROOT / "docs/architecture.md"
    assert [f"{line}: {name}" for line, name in occurrences(FOLDER, page) if not has_path(name, page=page)] == []


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_docs__modules_named__exist(page: Path) -> None:
    assert [f"{line}: {name}" for line, name in occurrences(DOTTED, page) if not has_name(name)] == []


def test_architecture_page__packages__all_described() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    assert [name for name in [*SECTIONS, *PACKAGES] if f"| `{name}/` |" not in text] == []


def test_glossary__terms__used_in_code_and_in_order() -> None:
    code = "\n".join(path.read_text() for path in FORGE.rglob("*.py")).lower()
    terms = [term for term in TERM.findall((ROOT / "docs/glossary.md").read_text()) if term not in ("term", "---")]
    words = [re.sub(r" \(.*\)", "", word) for term in terms for word in term.split(", ")]
    assert [word for word in words if not re.search(word.lower().replace(" ", r"[\s_]?"), code)] == []
    assert terms == sorted(terms, key=str.lower)
