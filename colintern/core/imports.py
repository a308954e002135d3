"""Find the code that decides a result: the modules of this repository that a module reaches by imports."""

import ast
from collections.abc import Set
from pathlib import Path

TOP = Path(__file__).parents[2]
PACKAGES = ("colintern", "stages", "demo")
# Parts of colintern/ that observe, check, report or move bytes whose hashes are checked. No result depends on them, so
# no stage and no cache does, and imports are not followed through them.
OBSERVERS = frozenset(
    "analysis commands core monitoring params planning preflight reporting storage stores tuning".split()
)


def find_module(name: str) -> Path | None:
    """Return the file of a module of this repository, None for any other."""
    path = TOP / Path(*name.split("."))
    if name.split(".")[0] not in PACKAGES:
        return None
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def list_imports(file: Path) -> set[str]:
    """Return the names that `file` imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def get_package(file: Path) -> str:
    """Return the part of colintern/ that a file of this repository belongs to, or the name of its top folder."""
    top, *names = file.relative_to(TOP).with_suffix("").parts
    return names[0] if top == "colintern" else top


def list_reached_modules(*modules: str, without: Set[str] = OBSERVERS) -> list[Path]:
    """Return the files of `modules` and of every module that they reach by imports, not through `without`, sorted."""
    reached: set[Path] = set()
    pending = []
    for name in modules:
        if (file := find_module(name)) is None:
            raise ModuleNotFoundError(f"{name}: no module of {', '.join(PACKAGES)}")
        pending.append(file)
    while pending:
        file = pending.pop()
        if file not in reached:
            reached.add(file)
            targets = filter(None, map(find_module, list_imports(file)))
            pending += [target for target in targets if get_package(target) not in without]
    return sorted(file for file in reached if file.name != "__init__.py")
