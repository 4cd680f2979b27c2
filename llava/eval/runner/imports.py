"""Which files of the package a module runs: its imports, followed through the sources without running them.

A package's ``__init__`` that only gathers names counts as what each name comes from, so that importing one name out
of `llava.pruning` does not bring all methods.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import llava

ROOT = Path(llava.__file__).parent
PACKAGE = "llava"


def reached(modules: Iterable[str], leave_out: Iterable[str] = (), root: Path = ROOT) -> set[str]:
    """Names of all modules of the package that ``modules`` import, directly or not, themselves among them.

    Args:
        leave_out: packages that are not entered.
        root: folder of the package.
    """
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found or any(name == other or name.startswith(f"{other}.") for other in leave_out):
            continue
        found.add(name)
        waiting += _imported(name, root)
    return found


def source_of(name: str, root: Path = ROOT) -> Path | None:
    """The file of a module of the package; ``None`` if there is none."""
    place = root.joinpath(*name.split(".")[1:])
    files = (place.with_suffix(".py"), place / "__init__.py") if name != PACKAGE else (place / "__init__.py",)
    return next((file for file in files if file.is_file()), None)


@cache
def _imported(name: str, root: Path) -> tuple[str, ...]:
    """The modules that a module takes names from."""
    found = []
    for module, names in _statements(source_of(name, root), name):
        for one in names or [None]:
            found += _where(module, one, root)
    return tuple(found)


def _where(module: str, name: str | None, root: Path) -> list[str]:
    """The module that a name imported from ``module`` comes from."""
    if not (module == PACKAGE or module.startswith(f"{PACKAGE}.")) or source_of(module, root) is None:
        return []
    if name is None:
        return [module]
    if source_of(f"{module}.{name}", root) is not None:
        return [f"{module}.{name}"]
    file = source_of(module, root)
    if file.name == "__init__.py":
        for origin, names in _statements(file, module):
            if name in names.values():
                return _where(origin, next(own for own, given in names.items() if given == name), root)
    return [module]


def _statements(file: Path, name: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Every import of a file: the module, and the names taken from it with those they get (none for ``import x``)."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in _running(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, {}) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module, {alias.name: alias.asname or alias.name for alias in node.names}


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _running(child)
