"""Classes of the user's own code, named in a job as `module:Class`.

They are imported only from the unpacked code folder of the plan (`forge.code_archive`), which `use_code` puts on
`sys.path`; never from the current folder, and never in place of an installed module. This module imports no torch;
user code may, so the client has it imported by a subprocess (`forge.runtime.check_user_code`).
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.machinery
import inspect
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, Protocol, TypeGuard

from forge.code_archive import PackedCode, code_folder, has_code, hold_code, release_code
from forge.errors import UserCodeError
from forge.process import one_line

_SUFFIXES = tuple(importlib.machinery.all_suffixes())
_current: list[Path] = []
"""The code folder that this process uses: none or one."""


def is_reference(value: object) -> TypeGuard[str]:
    """Whether a value of the job file names a class of the user's: `my_losses:Ranking`."""
    return isinstance(value, str) and ":" in value


def load_class(reference: str, *, base: type | None = None) -> type[Any]:
    """Import a class of the user's from the code folder that `use_code` was given.

    Args:
        reference: `module:Class`; the module may be in a package: `losses.ranking:Ranking`.
        base: a protocol whose public methods the class must have, or another class that it must be derived from.

    Raises: UserCodeError that names the user's file and line: no such module or class, an exception while it is
        imported, not a class, or methods that are missing.
    """
    module_name, class_name = split_reference(reference)
    if not _current:
        raise UserCodeError(
            f"{reference} names a class of your own, but the job has no `code:`; add the folder that contains "
            f"{module_name.split('.')[0]}.py, such as `code: ./src`"
        )
    module = _import(module_name, folder=_current[0])
    with user_code_errors(reference):  # a module's own __getattr__, or the class's, may raise
        found = getattr(module, class_name, None)
        if found is None:
            raise UserCodeError(_missing_class(module, class_name))
        if not isinstance(found, type):
            raise UserCodeError(f"{reference} is {type(found).__name__} {found!r}, not a class")
        if base is not None:
            _require_base(found, base)
    return found


@contextmanager
def user_code_errors(name: str) -> Iterator[None]:
    """Raise whatever user code raises, `SystemExit` included, as a UserCodeError with the user's own line.

    Args:
        name: what is run, for an error without a line of the user's.
    """
    try:
        yield
    except (KeyboardInterrupt, UserCodeError):
        raise
    except BaseException as error:
        raise UserCodeError(describe_error(error, fallback=name)) from error


def describe_error(error: BaseException, *, fallback: str = "") -> str:
    """Return `my_data.py:12: KeyError: 'label'`: the place of an error, its class and its text on one line.

    Args:
        fallback: the place to name if no line of the user's was run.
    """
    place = error_place(error) or fallback
    return f"{place}: " * bool(place) + f"{type(error).__name__}: {_text(error)}"


def error_place(error: BaseException) -> str:
    """Return `my_losses.py:12`, the innermost frame inside the user's files; empty if there is none.

    What the user's code calls, such as numpy, is further in and is not named: the user can change only own lines.
    """
    folder = _current[0] if _current else None
    if folder is None:
        return ""
    if isinstance(error, SyntaxError) and error.filename and _is_below(error.filename, folder):
        with_line = f":{error.lineno}" if error.lineno else ""
        return f"{_relative(error.filename, folder)}{with_line}"
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_below(frame.filename, folder)]
    return f"{_relative(own[-1].filename, folder)}:{own[-1].lineno}" if own else ""


def use_code(digest: str | None) -> None:
    """Make the unpacked code of a plan importable in this process, instead of that of another plan.

    Modules of the code used before are forgotten. Nothing is imported. The code stays in the cache until this
    process ends or uses other code.

    Args:
        digest: None for a plan without code.

    Raises: UserCodeError if the cache does not hold the code unchanged.
    """
    folder = code_folder(digest) if digest is not None else None
    if digest is not None and not has_code(digest):
        raise UserCodeError(f"{folder} does not hold the code of this plan; start the run again")
    if _current == [folder]:
        return
    for former in _current:
        release_code(former.name)
        sys.path[:] = [entry for entry in sys.path if entry != str(former)]
        for name in [name for name, module in sys.modules.items() if _is_from(module, former)]:
            del sys.modules[name]
    _current.clear()
    if folder is not None:
        # In front: Ray adds the current folder of the driver to the path of its workers.
        sys.path.insert(0, str(folder))
        sys.dont_write_bytecode = True  # the folder must stay equal to its digest
        importlib.invalidate_caches()
        hold_code(folder.name)
        _current.append(folder)


def load_builtin_class(reference: str) -> type[Any]:
    """Import a class of forge itself; `reference` is its `module:Class` in a registry."""
    module_name, class_name = split_reference(reference)
    found: type[Any] = getattr(importlib.import_module(module_name), class_name)
    return found


def split_reference(reference: str) -> tuple[str, str]:
    """`losses.ranking:Ranking` → module and class. Raises: UserCodeError for another form."""
    module_name, _, class_name = reference.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), class_name]):
        raise UserCodeError(f"{reference!r} must be a module and a class, such as my_losses:Ranking")
    return module_name, class_name


def check_module_names(code: PackedCode, *, folder: Path) -> None:
    """Reject code that would be imported in place of another module of the same name.

    Args:
        folder: that was packed; a module installed from this very folder is no conflict.

    Raises: UserCodeError.
    """
    for name in sorted({_module_name(file) for file in code.files} - {""}):
        owner = _owner(name, folder=folder.resolve())
        if owner is not None:
            file = next(file for file in code.files if _module_name(file) == name).split("/")[0]
            raise UserCodeError(f"{folder / file} has the name of {owner}; rename it")


def check_reference(code: PackedCode, reference: str) -> None:
    """Find without importing anything what can be found: a missing module, a syntax error.

    Raises: UserCodeError.
    """
    module_name, _ = split_reference(reference)
    path = module_name.replace(".", "/")
    file = next((name for name in (f"{path}.py", f"{path}/__init__.py") if name in code.files), None)
    if file is None:
        modules = sorted(name[:-3].replace("/", ".") for name in code.files if name.endswith(".py"))
        near = difflib.get_close_matches(module_name, modules, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(modules[:10])}"
        raise UserCodeError(f"the code folder has no {path}.py; {hint}")
    try:
        ast.parse(code.files[file], filename=file)
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        problem = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserCodeError(f"{file}{line}: {type(error).__name__}: {problem}") from error
    except (RecursionError, MemoryError) as error:
        raise UserCodeError(f"{file}: its expressions are nested too deeply for Python's parser") from error


def _import(name: str, *, folder: Path) -> ModuleType:
    """Import a module of the code folder. Raises: UserCodeError with the user's own line."""
    with user_code_errors(name):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and f"{name}.".startswith(f"{error.name}."):
                raise UserCodeError(f"the code folder has no module {error.name}") from error
            raise
    if not _is_from(module, folder):
        origin = getattr(module, "__file__", None) or "the interpreter"
        raise UserCodeError(
            f"a module named {name} was already imported from {origin}, so that of the code folder cannot be "
            "used; rename one of them"
        )
    return module


def _text(error: BaseException) -> str:
    try:
        return one_line(error)
    except Exception:
        return "its text cannot be shown"


def _missing_class(module: ModuleType, name: str) -> str:
    classes = [key for key, value in vars(module).items() if isinstance(value, type) and not key.startswith("_")]
    near = difflib.get_close_matches(name, classes, n=1)
    own = [key for key in classes if vars(module)[key].__module__ == module.__name__]
    hint = f"did you mean {near[0]}?" if near else f"it has {_listed(own)}" if own else "it has no class"
    return f"{Path(module.__file__ or module.__name__).name} has no class {name}; {hint}"


def _require_base(found: type, base: type) -> None:
    """Raises: UserCodeError if a class lacks methods of a protocol, or is not derived from another class."""
    where = f"{_place(found)}: " if _place(found) else ""
    if not getattr(base, "_is_protocol", False):
        if not issubclass(found, base):
            raise UserCodeError(
                f"{where}{found.__name__} must be derived from {base.__module__}.{base.__qualname__}"
            )
        return
    missing = [name for name in _public_methods(base) if not callable(getattr(found, name, None))]
    if missing:
        raise UserCodeError(
            f"{where}{found.__name__} lacks {_listed(missing)}; see {base.__name__} in {base.__module__}"
        )


def _public_methods(protocol: type) -> Iterator[str]:
    for cls in reversed(protocol.__mro__):
        if cls not in (object, Protocol, Generic):
            yield from (name for name, value in vars(cls).items() if name[0] != "_" and callable(value))


def _place(cls: type) -> str:
    try:
        file = inspect.getsourcefile(cls)
        line = inspect.getsourcelines(cls)[1]
    except (OSError, TypeError):
        return ""
    return f"{_relative(file, _current[0])}:{line}" if file and _current else ""


def _owner(name: str, *, folder: Path) -> str | None:
    """What else has a module's name: Python itself or an installed package; None if nothing."""
    if name == "forge" or name in sys.stdlib_module_names:
        return "forge's own package" if name == "forge" else f"Python's own module {name}"
    own = {Path.cwd(), folder, *_current}
    path = [entry for entry in sys.path if entry and Path(entry).resolve() not in own]
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        is_path_finder = finder is importlib.machinery.PathFinder
        spec = find(name, path if is_path_finder else None) if find is not None else None
        # A folder without __init__.py anywhere on the path is found last, so it does not matter.
        if spec is not None and spec.origin is not None and not _is_below(spec.origin, folder):
            return f"an installed module, {spec.origin}"
    return None


def _module_name(file: str) -> str:
    """`my_losses.py` → `my_losses`, `losses/ranking.py` → `losses`; empty for what cannot be imported."""
    top, slash, _ = file.partition("/")
    if slash:
        return top if top.isidentifier() and file.endswith(_SUFFIXES) else ""
    name = top.split(".")[0]
    return name if top.endswith(_SUFFIXES) and name.isidentifier() else ""


def _is_from(module: ModuleType, folder: Path) -> bool:
    """Whether a module, or a package without `__init__.py`, was imported from a folder."""
    # Not getattr: modules that import their parts when they are asked for would import them here.
    found = getattr(module, "__dict__", {})
    file, paths = found.get("__file__"), found.get("__path__")
    places = [file, *(paths if isinstance(paths, Iterable) else ())]
    return any(isinstance(place, str) and _is_below(place, folder) for place in places)


def _is_below(path: str, folder: Path) -> bool:
    return os.path.realpath(path).startswith(f"{os.path.realpath(folder)}{os.sep}")


def _relative(path: str, folder: Path) -> str:
    return os.path.relpath(os.path.realpath(path), os.path.realpath(folder)) if _is_below(path, folder) else path


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]
