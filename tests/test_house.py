"""The rules of the house, held by reading every module's syntax: who may import whom, and how a module looks.

A violation is one line, `forge/data/order.py:12: ...`, so that a terminal leads there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [
    {"cli"},
    {"forge"},  # forge/__init__.py, the public API
    {"run", "cluster", "report"},
    {"elastic"},
    {"serve", "evaluate"},
    {"train"},
    {"model", "data"},
    {"plan"},
    {"spec"},
    {"units", "events", "errors"},
]
"""A room imports from the floors below its own, never from above; rooms of one floor do not know each other."""

NEIGHBOURS = {("run", "cluster"), ("run", "report")}
"""Who may import whom on one floor all the same."""

CLIENT_SIDE = {"cli", "forge", "cluster", "report", "plan", "spec", "units", "events", "errors"}
TRAINING_SIDE = {"train", "model", "data"}
NOT_ON_THE_CLIENT_SIDE = {"torch", "deepspeed", "transformers"}
NOT_ON_THE_TRAINING_SIDE = {"typer", "rich", "ray"}

DOORS = {
    "typer": ("forge/cli/",),
    "rich": ("forge/cli/display.py", "forge/cli/trials_screen.py"),
    "pydantic": ("forge/spec/",),
    "yaml": ("forge/spec/",),
    "deepspeed": ("forge/train/engine.py", "forge/train/state.py"),
    "wandb": ("forge/run/record.py",),
    "ray": ("forge/run/", "forge/cluster/", "forge/elastic/"),
    "optuna": ("forge/report/importance.py", "forge/run/suggest.py"),
    "plotly": ("forge/report/figures.py",),
}
"""One foreign library, one door."""

VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "manager", "misc"}
MAX_LINES = 400


@dataclass(frozen=True, kw_only=True)
class Import:
    """One name that a module imports, wherever in it the import stands."""

    name: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Module:
    """One file of forge, parsed."""

    file: str
    name: str
    text: str
    tree: ast.Module = field(repr=False)

    @property
    def room(self) -> str:
        return "cli" if self.name == "forge.__main__" else room_of(self.name)

    def imports(self) -> Iterator[Import]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (Import(name=alias.name, line=node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                yield from (Import(name=f"{base}.{alias.name}", line=node.lineno) for alias in node.names)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
                yield from (Import(name=str(name), line=node.lineno) for name in names)

    def _absolute(self, node: ast.ImportFrom) -> str:
        package = self.name.split(".") + ["__init__"] * self.file.endswith("__init__.py")
        parents = package[: len(package) - node.level] if node.level else []
        return ".".join([*parents, *filter(None, [node.module])])


def room_of(name: str) -> str:
    """`forge.spec.load` → `spec`; `forge.units.parse_bytes` → `units`; `forge` → `forge`."""
    return name.split(".")[1] if "." in name else name


def read_modules(root: Path) -> dict[str, Module]:
    modules = {}
    for path in sorted((root / "forge").rglob("*.py")):
        file = path.relative_to(root)
        name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        text = path.read_text(encoding="utf-8")
        modules[name] = Module(file=file.as_posix(), name=name, text=text, tree=ast.parse(text))
    return modules


def violations(root: Path) -> list[str]:
    modules = read_modules(root)
    found = list(find_circles(modules))
    for module in modules.values():
        found += import_violations(module, modules)
        found += looks(module)
    return found


def import_violations(module: Module, modules: Mapping[str, Module]) -> Iterator[str]:
    if floor_of(module.room) is None:
        yield f"{module.file}:1: the room '{module.room}' is on no floor; give it one in {Path(__file__).name}"
        return
    for imported in module.imports():
        place = f"{module.file}:{imported.line}"
        library = imported.name.split(".")[0]
        if library == "forge":
            yield from (f"{place}: {rule}" for rule in broken_floor_rules(module, imported, modules))
            continue
        if module.room in CLIENT_SIDE and library in NOT_ON_THE_CLIENT_SIDE:
            yield f"{place}: {library} on the client side, where '{module.room}' is"
        if module.room in TRAINING_SIDE and library in NOT_ON_THE_TRAINING_SIDE:
            yield f"{place}: {library} on the training side, where '{module.room}' is"
        if library in DOORS and not module.file.startswith(DOORS[library]):
            yield f"{place}: {library} is imported only in {' and '.join(DOORS[library])}"


def broken_floor_rules(module: Module, imported: Import, modules: Mapping[str, Module]) -> Iterator[str]:
    target = target_of(imported, modules)
    there = room_of(target)
    here_floor, there_floor = floor_of(module.room), floor_of(there)
    if there == module.room:
        return
    if there_floor is None:
        yield f"'{there}' is on no floor of the house"
    elif there == "cli":
        yield f"nothing imports 'cli', not even '{module.room}'"
    elif here_floor == there_floor and (module.room, there) not in NEIGHBOURS:
        yield f"'{module.room}' and '{there}' do not know each other"
    elif here_floor is not None and there_floor < here_floor:
        yield f"'{module.room}' is below '{there}' and must not import it"


def target_of(imported: Import, modules: Mapping[str, Module]) -> str:
    """The module that an import reaches: `forge.units.Every` → `forge.units`."""
    name = imported.name
    while name not in modules and room_of(name) != name and name.count(".") > 1:
        name = name.rpartition(".")[0]
    return name if name in modules or floor_of(room_of(name)) is not None else "forge"


def floor_of(room: str) -> int | None:
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), None)


def find_circles(modules: Mapping[str, Module]) -> Iterator[str]:
    """Circles of imports, those inside functions included: an inner import only hides a circle."""
    edges = {
        name: {target_of(imported, modules): imported.line for imported in module.imports() if is_ours(imported)}
        for name, module in modules.items()
    }
    finished: set[str] = set()

    def walk(name: str, path: list[str]) -> Iterator[str]:
        if name in path:
            circle = [*path[path.index(name) :], name]
            first = modules[name]
            yield f"{first.file}:{edges[name][circle[1]]}: a circle of imports: {' → '.join(circle)}"
            return
        if name in finished or name not in modules:
            return
        for target in edges[name]:
            if target != name:
                yield from walk(target, [*path, name])
        finished.add(name)

    for name in modules:
        yield from walk(name, [])


def is_ours(imported: Import) -> bool:
    return imported.name.split(".")[0] == "forge"


def looks(module: Module) -> Iterator[str]:
    path = Path(module.file)
    docstring = ast.get_docstring(module.tree) or ""
    num_lines = module.text.count("\n")
    if path.name == "__init__.py" and module.name != "forge":
        if module.text.strip():
            yield f"{module.file}:1: an __init__.py is empty; only forge/__init__.py is not"
        return
    if {path.stem, *path.parent.parts} & VAGUE_NAMES:
        yield f"{module.file}:1: a module is named after one thing, not {path.stem}"
    if not docstring:
        yield f"{module.file}:1: a module says in its docstring what it is for"
    if num_lines > MAX_LINES and not re.search(r"\b(lines|long)\b", docstring):
        yield f"{module.file}:1: {num_lines} lines; over {MAX_LINES} the docstring says why it is so long"
    for node in ast.walk(module.tree) if module.room != "cli" else ():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{module.file}:{node.lineno}: print() outside of cli"


def test_the_house_holds_its_rules() -> None:
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_the_house_was_looked_at() -> None:
    assert {"forge", "forge.errors", "forge.spec.load"} <= set(read_modules(ROOT))


FINE = '"""Fine."""\n'


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("forge/spec/x.py", "from forge.plan import zero", ":2: 'spec' is below 'plan'"),
        ("forge/spec/x.py", "import forge.plan.zero", ":2: 'spec' is below 'plan'"),
        ("forge/spec/x.py", "from ..plan.zero import Z", ":2: 'spec' is below 'plan'"),
        ("forge/spec/x.py", "def f():\n    from forge.train.loop import train", ":3: 'spec' is below 'train'"),
        ("forge/units.py", "from forge.errors import E", ":2: 'units' and 'errors' do not know each other"),
        ("forge/data/x.py", "from forge.model.build import b", ":2: 'data' and 'model' do not know each other"),
        ("forge/cluster/x.py", "from forge.run.start import s", ":2: 'cluster' and 'run' do not know each other"),
        ("forge/report/x.py", "from forge.run.start import s", ":2: 'report' and 'run' do not know each other"),
        ("forge/run/x.py", "from forge.cli.app import main", ":2: nothing imports 'cli'"),
        ("forge/__init__.py", "def f():\n    from forge.cli.app import main", ":3: nothing imports 'cli'"),
        ("forge/spec/x.py", "from forge import load_job", ":2: 'spec' is below 'forge'"),
        ("forge/spec/x.py", "from forge import attic", ":2: 'spec' is below 'forge'"),
        ("forge/attic/x.py", "", ":1: the room 'attic' is on no floor"),
        ("forge/cli/x.py", "def f():\n    import torch", ":3: torch on the client side"),
        ("forge/__init__.py", "from transformers import A", ":2: transformers on the client side"),
        ("forge/events.py", "import importlib\nimportlib.import_module('torch')", ":3: torch on the client side"),
        ("forge/train/x.py", "import ray.train", ":2: ray on the training side"),
        (
            "forge/model/x.py",
            "from deepspeed import zero",
            ":2: deepspeed is imported only in forge/train/engine.py",
        ),
        ("forge/cli/x.py", "from rich.table import Table", ":2: rich is imported only in forge/cli/display.py"),
        ("forge/run/x.py", "import pydantic", ":2: pydantic is imported only in forge/spec/"),
        ("forge/run/x.py", "import wandb", ":2: wandb is imported only in forge/run/record.py"),
        ("forge/serve/x.py", "import ray", ":2: ray is imported only in forge/run/"),
        ("forge/cluster/x.py", "import yaml", ":2: yaml is imported only in forge/spec/"),
        ("forge/run/utils.py", "", ":1: a module is named after one thing"),
        ("forge/run/x.py", "\nprint(1)", ":3: print() outside of cli"),
        ("forge/run/x.py", "x = 1\n" * 400, ":1: 401 lines; over 400"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str, expected: str) -> None:
    plant(tmp_path, {file: FINE + source + ("" if source.endswith("\n") else "\n")})
    assert [line for line in violations(tmp_path) if line.startswith(file + expected)], violations(tmp_path)


def test_a_missing_docstring_and_a_filled_init_are_found(tmp_path: Path) -> None:
    plant(tmp_path, {"forge/run/x.py": "x = 1\n", "forge/run/__init__.py": FINE})
    assert [line.split(":")[0] for line in violations(tmp_path)] == ["forge/run/__init__.py", "forge/run/x.py"]


def test_circles_are_found_even_through_functions(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "forge/run/a.py": FINE + "from forge.run.b import f\n",
            "forge/run/b.py": FINE + "from forge.run import c\n",
            "forge/run/c.py": FINE + "def f():\n    import forge.run.a\n",
        },
    )
    circle = "forge/run/a.py:2: a circle of imports: forge.run.a → forge.run.b → forge.run.c → forge.run.a"
    assert violations(tmp_path) == [circle]


def test_what_is_allowed_is_not_complained_of(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "forge/__init__.py": FINE + "def f():\n    from forge.run.start import run\n",
            "forge/__main__.py": FINE + "from forge.cli.app import main\n",
            "forge/cli/__init__.py": "",
            "forge/cli/app.py": FINE
            + "import typer\nfrom forge import f\nfrom forge.cli import display\nprint(1)\n",
            "forge/cli/display.py": FINE + "import rich.table\nfrom forge import units\n",
            "forge/run/start.py": FINE + "import ray, torch\nfrom forge.cluster.local import x\n",
            "forge/cluster/local.py": FINE + "import ray\nfrom forge.spec.job import JobSpec\n",
            "forge/elastic/vault.py": FINE + "from forge.train import loop\n",
            "forge/train/loop.py": '"""As long as it is, it reads straight down."""\n' + "x = 1\n" * 500,
            "forge/units.py": FINE,
        },
    )
    assert violations(tmp_path) == []


def plant(root: Path, files: Mapping[str, str]) -> None:
    for file, text in files.items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
