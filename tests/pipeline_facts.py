"""Read from the code what dvc.yaml must declare: which folders, params and library versions decide a stage's result.

python tests/pipeline_facts.py      writes them into dvc.yaml, and versions.yaml from requirements.txt
"""

import ast
import dataclasses
import re
import sys
from pathlib import Path

from ruamel.yaml import YAML

sys.path.insert(0, str(Path(__file__).parents[1]))  # the code of this clone, wherever colintern is installed

from colintern.core.imports import list_imports, list_reached_modules
from colintern.params import Params

ROOT = Path(__file__).parents[1]
VERSIONS = "versions.yaml"
ALL_KEYS = [{"params.yaml": None}]  # of a stage that reads the whole file
KEYS = {field.name for field in dataclasses.fields(Params)}
# Import name -> distribution, of the libraries that compute a result.
LIBRARIES = {
    "accelerate": "accelerate",
    "bm25s": "bm25s",
    "colpali_engine": "colpali-engine",
    "datasets": "datasets",
    "kernels": "kernels",
    "mteb": "mteb",
    "numpy": "numpy",
    "peft": "peft",
    "PIL": "pillow",
    "py3langid": "py3langid",
    "pyarrow": "pyarrow",
    "pypdfium2": "pypdfium2",
    "Stemmer": "pystemmer",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "torchvision": "torchvision",
    "transformers": "transformers",
}
# What a library computes with although our modules do not import it.
IMPLIED = {
    "bm25s": {"pystemmer"},
    "mteb": {"datasets"},
    "peft": {"torch", "transformers"},
    "transformers": {"tokenizers", "torch", "torchvision"},
}
TRAINER = "accelerate"  # computes where transformers' Trainer is imported


def get_script(stage: dict) -> str:
    """Return the dotted name of a stage's script."""
    return stage["cmd"].removeprefix("python -m ")


def list_folder_deps(module: str) -> set[str]:
    """Return the script of a stage, and the folders of the modules that decide its result."""
    files = list_reached_modules(module)
    paths = {file.relative_to(ROOT).as_posix() for file in files}
    return {path if path.startswith("stages/") else path.rpartition("/")[0] for path in paths}


def list_params(module: str) -> set[str]:
    """Return the keys that the modules of a stage read: attributes of names through which the params object goes.

    What checks and observes a run reads keys too; a study, which only some runs belong to, does not count.
    """
    attributes = {
        node.attr
        for file in list_reached_modules(module, without={"analysis", "planning", "reporting", "tuning"})
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        and (
            (isinstance(node.value, ast.Name) and node.value.id == "params")
            or (isinstance(node.value, ast.Attribute) and node.value.attr == "params")
        )
    }
    return attributes & KEYS


def list_libraries(module: str) -> set[str]:
    """Return the distributions whose version decides the result of a stage."""
    names = {name for file in list_reached_modules(module) for name in list_imports(file)}
    found = {LIBRARIES[top] for name in names if (top := name.partition(".")[0]) in LIBRARIES}
    found |= {TRAINER} if "transformers.Trainer" in names else set()
    for _ in IMPLIED:
        found = found.union(*(IMPLIED.get(library, ()) for library in found))
    return found


def read_locked_versions() -> dict[str, str]:
    """Return the versions that requirements.txt holds, of the libraries that compute a result."""
    locked = dict(re.findall(r"^([a-z0-9-]+)==([^ ;\\]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    return {name: locked[name] for name in sorted(LIBRARIES.values())}


def write() -> None:
    """Update versions.yaml, and the lists of dvc.yaml; comments and all else are kept."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 200, True
    yaml.indent(mapping=2, sequence=2, offset=0)
    header = "# Written by `python tests/pipeline_facts.py`: stages of dvc.yaml depend on these locked versions.\n"
    lines = [f'{name}: "{version}"' for name, version in read_locked_versions().items()]
    (ROOT / VERSIONS).write_text(header + "\n".join(lines) + "\n")
    declared = yaml.load(ROOT / "dvc.yaml")
    for stage in declared["stages"].values():
        module = get_script(stage)
        data = {dep for dep in stage["deps"] if not dep.startswith(("colintern/", "stages/"))}
        stage["deps"] = sorted(data | list_folder_deps(module))
        if stage["params"] != ALL_KEYS:
            stage["params"] = [*sorted(list_params(module)), {VERSIONS: sorted(list_libraries(module))}]
    yaml.dump(declared, ROOT / "dvc.yaml")


if __name__ == "__main__":
    write()
