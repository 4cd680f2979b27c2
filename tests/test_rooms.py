"""The house: who may import whom. Every import statement of the package is read, those inside functions too."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "llava"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room and what it may import beside itself; "llava" is the package's own __init__.py, which imports nothing.
MAY_IMPORT = {
    "constants": set(),
    "checkpoint": set(),
    "terminal": set(),
    "downloads": set(),
    "pictures": {"downloads"},
    "pruning": set(),
    "relevance": {"constants", "checkpoint", "pruning"},
    "layout": {"constants", "pruning"},
    "decoder": {"pruning"},
    "conversation": {"constants", "relevance"},
    "mm_utils": {"constants", "conversation", "layout", "pictures"},
    "video": {"constants", "mm_utils", "layout", "pictures", "terminal"},
}
TOOLS = {"constants", "checkpoint", "conversation", "mm_utils", "video", "pictures", "downloads", "terminal"}
HEART = {"pruning", "relevance", "layout", "decoder"}
MAY_IMPORT["model"] = TOOLS | HEART
MAY_IMPORT["integrations"] = {"constants", "checkpoint", "pictures"} | HEART
MAY_IMPORT["serve"] = TOOLS | HEART | {"model", "integrations"}
MAY_IMPORT["eval"] = MAY_IMPORT["serve"] | {"serve"}


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


@cache
def imported_by(file: Path) -> frozenset[str]:
    """Modules of the package that a file's import statements name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "llava"}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "llava":
            assert node.level == 0
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = parts & set(MODULES)
            found |= submodules
            if len(submodules) < len(parts):
                found.add(node.module)
    return frozenset(found)


def room_of(module: str) -> str:
    return [*module.split("."), "llava"][1] if module != "llava" else "llava"


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_nothing_above_it(room):
    files = [file for module, file in MODULES.items() if room_of(module) == room]
    assert files
    upward = [
        f"{file.relative_to(PACKAGE)} imports {module}"
        for file in files
        for module in imported_by(file)
        if room_of(module) not in MAY_IMPORT[room] | {room, "llava"}
    ]
    assert not upward


def test_every_file_is_in_a_room():
    assert {room_of(module) for module in MODULES} <= {*MAY_IMPORT, "llava"}


def test_no_two_files_import_each_other_even_by_a_detour():
    graph = {module: {m for m in imported_by(file) if m in MODULES} - {module} for module, file in MODULES.items()}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        for other in sorted(graph[module]):
            walk(other, (*path, module))
        done.add(module)

    for module in graph:
        walk(module, ())


def test_the_heart_imports_torch_and_numpy_alone():
    """What selects can be used beside any model: no library of models, pictures or tables."""
    allowed = {"torch", "numpy", "triton", "llava", "__future__"}

    for file in (PACKAGE / "pruning").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                assert top in allowed or top in sys.stdlib_module_names, f"{file.name} imports {name}"
