"""What the code itself says about the pipeline: which modules a stage reaches, which params those modules read.

python tests/pipeline_facts.py      writes both into dvc.yaml
"""

import ast
import dataclasses
from pathlib import Path

from ruamel.yaml import YAML

from colintern.params import Params

ROOT = Path(__file__).parents[1]
ALL_KEYS = [{"params.yaml": None}]  # of a stage that reads the whole file
KEYS = {field.name for field in dataclasses.fields(Params)}


def module_file(name: str) -> Path | None:
    """The file of one of our modules, None for anybody else's."""
    path = ROOT / Path(*name.split("."))
    if name.split(".")[0] not in ("colintern", "stages"):
        return None
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)


def imports(file: Path) -> set[Path]:
    """The files of ours that `file` imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {f for name in names if (f := module_file(name))}
    return found


def reached(file: Path) -> set[Path]:
    """`file` and every file of ours it reaches by imports."""
    seen, todo = set(), {file}
    while todo:
        here = todo.pop()
        seen.add(here)
        todo |= imports(here) - seen
    return seen


def params_read(file: Path) -> set[str]:
    """The keys a file reads: attributes of the names through which the params object goes."""
    return {
        node.attr
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        and (
            (isinstance(node.value, ast.Name) and node.value.id == "params")
            or (isinstance(node.value, ast.Attribute) and node.value.attr == "params")
        )
    }


def facts(script: Path) -> dict[str, set[str]]:
    """The modules among a stage's deps, and its params."""
    files = reached(script)
    return {
        "deps": {f.relative_to(ROOT).as_posix() for f in files if f.name != "__init__.py"},
        "params": set().union(*map(params_read, files)) & KEYS,
    }


def write() -> None:
    """Bring the lists of dvc.yaml up to what the code says; comments and all else stay."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 200, True
    yaml.indent(mapping=2, sequence=2, offset=0)
    declared = yaml.load(ROOT / "dvc.yaml")
    for stage in declared["stages"].values():
        found = facts(ROOT / (stage["cmd"].removeprefix("python -m ").replace(".", "/") + ".py"))
        stage["deps"] = sorted({d for d in stage["deps"] if not d.endswith(".py")} | found["deps"])
        if stage["params"] != ALL_KEYS:
            stage["params"] = sorted(found["params"])
    yaml.dump(declared, ROOT / "dvc.yaml")


if __name__ == "__main__":
    write()
