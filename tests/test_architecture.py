"""Architecture rules, checked by parsing every module: import layers, unique class names, module style.

A violation is one line, `forge/data/order.py:12: ...`, so that a terminal leads there.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [
    {"cli"},
    {"ui"},
    {"forge", "api"},  # forge/__init__.py and forge/api.py, the public API
    {"runtime", "remote", "search", "cluster", "report", "chaos", "serve", "evaluate"},
    {"inference"},
    {"runs", "elastic"},
    {"train"},
    {"checkpoint", "model", "objective", "data"},
    {"plan", "pricing"},
    {"config"},
    {"registries"},  # the modules in REGISTRIES
    {"user_code"},
    {"code_archive"},
    {"fs", "aws_client"},
    {"environment"},
    {"units", "events", "errors", "foreign", "process", "limits"},
    {"redact", "strict_json"},
]
"""A package imports only from the layers below its own; packages of one layer are independent of each other."""

REGISTRIES = {"forge.objective.registry", "forge.data.formats.registry", "forge.data.sources.registry"}
"""Tables of names that the configuration reads. They stand in the folder of the classes that they name, but are a
layer below `config`, and import nothing that a client must not import."""

SAME_LAYER = {
    ("forge", "api"),
    ("runtime", "cluster"),
    ("runtime", "search"),
    ("runtime", "serve"),
    ("runtime", "report"),
    ("evaluate", "runtime"),
    ("runtime", "evaluate"),
    ("evaluate", "cluster"),
    ("evaluate", "remote"),
    ("remote", "cluster"),
    ("remote", "runtime"),
    ("remote", "chaos"),
    ("remote", "serve"),
    ("search", "cluster"),
    ("search", "runtime"),
    ("report", "search"),
    ("chaos", "cluster"),
    ("chaos", "runtime"),
    ("elastic", "runs"),
    ("objective", "data"),
    ("plan", "pricing"),
    ("pricing", "plan"),
    ("objective", "model"),
    ("model", "checkpoint"),
}
"""Imports that are allowed between packages of one layer; cycles of modules are rejected everywhere."""

CLIENT_SIDE = {
    *("cli", "forge", "api", "cluster", "remote", "report", "runs", "checkpoint", "plan", "pricing", "config"),
    *("registries", "user_code", "code_archive", "units", "events", "errors", "foreign", "fs", "process", "redact"),
    *("environment", "limits", "aws_client", "ui", "strict_json"),
}
TRAINING_SIDE = {"train", "model", "objective", "data", "checkpoint"}
NOT_ON_THE_CLIENT_SIDE = {"torch", "deepspeed", "transformers"}
NOT_ON_THE_TRAINING_SIDE = {"typer", "rich", "ray"}

ONLY_IN = {
    "typer": ("forge/cli/",),
    "rich": ("forge/cli/",),
    "pydantic": ("forge/config/", "forge/serve/http/bodies.py"),
    "fastapi": ("forge/serve/http/",),
    "starlette": ("forge/serve/http/", "forge/ui/"),
    "uvicorn": ("forge/serve/http/connection.py", "forge/runtime/serve_process.py", "forge/ui/server.py"),
    "yaml": ("forge/config/",),
    "deepspeed": (
        "forge/train/engine.py",
        "forge/train/process_group.py",
        "forge/train/state.py",
        "forge/train/zero3.py",
    ),
    "bitsandbytes": ("forge/model/quantise.py", "forge/train/optimizer_8bit.py"),
    "torchao": ("forge/train/fp8.py",),
    "peft": ("forge/model/adapters.py",),
    "wandb": ("forge/runs/trackers/wandb_tracker.py", "forge/runs/trackers/wandb_log.py"),
    "mlflow": ("forge/runs/trackers/mlflow_tracker.py",),
    "tensorboard": ("forge/runs/trackers/tensorboard_tracker.py",),
    "ray": ("forge/runtime/", "forge/search/", "forge/cluster/", "forge/remote/", "forge/chaos/"),
    "sacrebleu": ("forge/evaluate/metrics/",),
    "re2": ("forge/evaluate/answers.py",),
    "optuna": ("forge/search/importance.py", "forge/search/suggest.py", "forge/report/figures.py"),
    "plotly": ("forge/report/figures.py", "forge/report/page.py"),
    "jinja2": (
        "forge/report/page.py",
        "forge/cluster/kubernetes/manifests.py",
        "forge/data/chat_template.py",
        "forge/evaluate/prompt.py",
    ),
}
"""Foreign libraries that only the named files may import."""

VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "manager", "misc"}
MAX_LINES = 400
MAX_FUNCTION_LINES = 60


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
    def package(self) -> str:
        return "cli" if self.name == "forge.__main__" else package_of(self.name)

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


def package_of(name: str) -> str:
    """`forge.config.load` → `config`; `forge.units.parse_bytes` → `units`; `forge` → `forge`."""
    if name in REGISTRIES:
        return "registries"
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
    return violations_of(read_modules(root))


def violations_of(modules: dict[str, Module]) -> list[str]:
    found = [*find_cycles(modules), *duplicate_classes(modules)]
    for module in modules.values():
        found += import_violations(module, modules)
        found += looks(module)
    return found


def import_violations(module: Module, modules: Mapping[str, Module]) -> Iterator[str]:
    if layer_of(module.package) is None:
        name = Path(__file__).name
        yield f"{module.file}:1: the package '{module.package}' is in no layer; add it to LAYERS in {name}"
        return
    for imported in module.imports():
        location = f"{module.file}:{imported.line}"
        library = imported.name.split(".")[0]
        if library == "forge":
            yield from (f"{location}: {rule}" for rule in broken_layer_rules(module, imported, modules))
            continue
        if module.package in CLIENT_SIDE and library in NOT_ON_THE_CLIENT_SIDE:
            yield f"{location}: {library} on the client side, where '{module.package}' is"
        if module.package in TRAINING_SIDE and library in NOT_ON_THE_TRAINING_SIDE:
            yield f"{location}: {library} on the training side, where '{module.package}' is"
        if library in ONLY_IN and not module.file.startswith(ONLY_IN[library]):
            yield f"{location}: {library} is imported only in {' and '.join(ONLY_IN[library])}"


def broken_layer_rules(module: Module, imported: Import, modules: Mapping[str, Module]) -> Iterator[str]:
    target = target_of(imported, modules)
    there = package_of(target)
    here_layer, there_layer = layer_of(module.package), layer_of(there)
    if there == module.package:
        return
    if there_layer is None:
        yield f"'{there}' is in no layer"
    elif there == "cli":
        yield f"nothing imports 'cli', not even '{module.package}'"
    elif here_layer == there_layer and (module.package, there) not in SAME_LAYER:
        yield f"'{module.package}' and '{there}' must not import each other"
    elif here_layer is not None and there_layer < here_layer:
        yield f"'{module.package}' is below '{there}' and must not import it"


def target_of(imported: Import, modules: Mapping[str, Module]) -> str:
    """The module that an import reaches: `forge.units.Every` → `forge.units`."""
    name = imported.name
    while name not in modules and package_of(name) != name and name.count(".") > 1:
        name = name.rpartition(".")[0]
    return name if name in modules or layer_of(package_of(name)) is not None else "forge"


def layer_of(package: str) -> int | None:
    return next((number for number, packages in enumerate(LAYERS) if package in packages), None)


def find_cycles(modules: Mapping[str, Module]) -> Iterator[str]:
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
            yield f"{first.file}:{edges[name][circle[1]]}: import cycle: {' → '.join(circle)}"
            return
        if name in finished or name not in modules:
            return
        for target in edges[name]:
            if target != name:
                yield from walk(target, [*path, name])
        finished.add(name)

    for name in modules:
        yield from walk(name, [])


def duplicate_classes(modules: Mapping[str, Module]) -> Iterator[str]:
    """Top-level classes whose name another module has defined already; private ones included."""
    defined: dict[str, str] = {}
    for module in modules.values():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef):
                where = f"{module.file}:{node.lineno}"
                if node.name in defined:
                    yield f"{where}: class '{node.name}' is already defined in {defined[node.name]}"
                defined.setdefault(node.name, where)


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
    for node in ast.walk(module.tree) if module.package != "cli" else ():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{module.file}:{node.lineno}: print() outside of cli"
    yield from unsafe_children(module)
    yield from long_functions(module)


def long_functions(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = node.body[0] if ast.get_docstring(node) else None
            in_docstring = (documented.end_lineno or 0) - documented.lineno + 1 if documented else 0
            num_lines = (node.end_lineno or 0) - node.lineno + 1 - in_docstring
            if num_lines > MAX_FUNCTION_LINES:
                lines = f"{num_lines} lines, more than {MAX_FUNCTION_LINES}"
                yield f"{module.file}:{node.lineno}: {node.name} has {lines}"


def unsafe_children(module: Module) -> Iterator[str]:
    """Python children without `-P`, which would import modules from the user's current folder."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.List | ast.Tuple):
            words = [ast.unparse(element) for element in node.elts]
            for word, following in itertools.pairwise(words):
                if word in ("sys.executable", "'python'") and following in ("'-m'", "'-c'"):
                    yield f"{module.file}:{node.lineno}: a Python child imports from the current folder; add '-P'"


def test_package__import_rules_and_style__hold() -> None:
    modules = read_modules(ROOT)
    assert {"forge", "forge.errors", "forge.config.load"} <= set(modules)
    found = violations_of(modules)
    assert not found, "\n" + "\n".join(found)


FINE = '"""Fine."""\n'


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("config/x.py", "from forge.plan import batch", ":2: 'config' is below 'plan'"),
        ("config/x.py", "import forge.plan.deepspeed_config", ":2: 'config' is below 'plan'"),
        ("config/x.py", "from ..plan.batch import B", ":2: 'config' is below 'plan'"),
        ("config/x.py", "def f():\n    from forge.train.loop import train", ":3: 'config' is below 'train'"),
        ("data/x.py", "from forge.model.build import b", ":2: 'data' and 'model' must not import each other"),
        ("cluster/x.py", "from forge.remote.submit import s", ":2: 'cluster' and 'remote' must not import each"),
        ("report/x.py", "from forge.runtime.driver import s", ":2: 'report' and 'runtime' must not import each"),
        ("runs/x.py", "from forge.cli.app import main", ":2: nothing imports 'cli'"),
        ("__init__.py", "def f():\n    from forge.cli.app import main", ":3: nothing imports 'cli'"),
        ("config/x.py", "from forge import load_job", ":2: 'config' is below 'forge'"),
        ("config/x.py", "from forge import attic", ":2: 'config' is below 'forge'"),
        ("config/x.py", "from forge.objective.base import Objective", ":2: 'config' is below 'objective'"),
        ("objective/registry.py", "import torch", ":2: torch on the client side"),
        ("data/formats/registry.py", "from forge.config.data import D", ":2: 'registries' is below 'config'"),
        ("data/sources/registry.py", "from forge.data.sources.base import S", ":2: 'registries' is below 'data'"),
        ("attic/x.py", "", ":1: the package 'attic' is in no layer"),
        ("cli/x.py", "def f():\n    import torch", ":3: torch on the client side"),
        ("checkpoint/x.py", "import torch", ":2: torch on the client side"),
        ("__init__.py", "from transformers import A", ":2: transformers on the client side"),
        ("events.py", "import importlib\nimportlib.import_module('torch')", ":3: torch on the client side"),
        ("train/x.py", "import ray.train", ":2: ray on the training side"),
        ("model/x.py", "from deepspeed import zero", ":2: deepspeed is imported only in forge/train/engine.py"),
        ("report/x.py", "from rich.table import Table", ":2: rich is imported only in forge/cli/"),
        ("runs/x.py", "import pydantic", ":2: pydantic is imported only in forge/config/"),
        ("runtime/x.py", "import wandb", ":2: wandb is imported only in forge/runs/trackers/wandb_tracker.py"),
        ("elastic/x.py", "import ray", ":2: ray is imported only in forge/runtime/"),
        ("cluster/x.py", "import yaml", ":2: yaml is imported only in forge/config/"),
        ("runs/x.py", "import sys\nx = [sys.executable, '-m', 'a']", ":3: a Python child imports from the current"),
        ("runs/x.py", "x = ('python', '-c', 'import a')", ":2: a Python child imports from the current folder"),
        ("runs/utils.py", "", ":1: a module is named after one thing"),
        ("runs/x.py", "\nprint(1)", ":3: print() outside of cli"),
        ("runs/x.py", "x = 1\n" * 400, ":1: 401 lines; over 400"),
        ("runs/x.py", "def f():\n" + "    g()\n" * 60, ":2: f has 61 lines, more than 60"),
    ],
)
def test_violations__each_planted_one__is_found(tmp_path: Path, file: str, source: str, expected: str) -> None:
    plant(tmp_path, {f"forge/{file}": FINE + source + ("" if source.endswith("\n") else "\n")})
    found = violations(tmp_path)
    assert [line for line in found if line.startswith(f"forge/{file}{expected}")], found


def test_violations__missing_docstring_and_filled_init__are_found(tmp_path: Path) -> None:
    plant(tmp_path, {"forge/runs/x.py": "x = 1\n", "forge/runs/__init__.py": FINE})
    assert [line.split(":")[0] for line in violations(tmp_path)] == ["forge/runs/__init__.py", "forge/runs/x.py"]


def test_violations__class_name_defined_twice__is_found(tmp_path: Path) -> None:
    body = FINE + "\n\nclass Place:\n    pass\n"
    plant(tmp_path, {"forge/runs/a.py": body, "forge/train/b.py": body})
    assert violations(tmp_path) == ["forge/train/b.py:4: class 'Place' is already defined in forge/runs/a.py:4"]


def test_violations__import_cycle_through_a_function__is_found(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "forge/runs/a.py": FINE + "from forge.runs.b import f\n",
            "forge/runs/b.py": FINE + "from forge.runs import c\n",
            "forge/runs/c.py": FINE + "def f():\n    import forge.runs.a\n",
        },
    )
    cycle = "forge/runs/a.py:2: import cycle: forge.runs.a → forge.runs.b → forge.runs.c → forge.runs.a"
    assert violations(tmp_path) == [cycle]


def test_violations__allowed_imports__none_found(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "forge/__init__.py": FINE + "def f():\n    from forge.runtime.driver import run\n",
            "forge/__main__.py": FINE + "from forge.cli.app import main\n",
            "forge/cli/__init__.py": "",
            "forge/cli/app.py": FINE
            + "import typer\nfrom forge import f\nfrom forge.cli import display\nprint(1)\n",
            "forge/cli/display.py": FINE + "import rich.table\nfrom forge import units\n",
            "forge/runtime/driver.py": FINE + "import ray, torch\nfrom forge.cluster.local.ray_cluster import x\n",
            "forge/config/job.py": FINE + "from forge.objective.registry import OBJECTIVES\n",
            "forge/objective/registry.py": FINE,
            "forge/cluster/local/ray_cluster.py": FINE + "import ray\nfrom forge.config.job import JobSpec\n",
            "forge/elastic/replicas/store.py": FINE + "from forge.train import loop\n",
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
