"""What a run is made of, as content hashes: its own params, the files it depends on, the library versions.

Two runs with one identity give the same bytes, whatever commit they stand on; the identity's fingerprint names the
folder in which an interrupted run finds its checkpoints again.
"""

import hashlib
import json
import os
import platform
import reprlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from colintern.core.errors import UserError
from colintern.params import Params
from colintern.storage.jsonfile import read_json_object

IDENTITY_FILE = "identity.json"
NUMBER = (int, float)
WORDS: dict[Any, str] = {str: "a text", int: "a whole number", NUMBER: "a number"}
# The parts of identity.json that are used, and their types.
PARTS: dict[str, Any] = {
    "params": {"dtype": str, "max_visual_tokens": int, "max_query_tokens": int},
    "deps": {},
    "versions": {"*": str},
    "base": {"folder": str, "revision": str, "files": {"*": {"sha256": str}}},
    "start": {"*": {"tensors": int, "std": NUMBER, "sha256": str}},
}
BESIDE = ("tracker",)  # params that watch a run and leave its bytes alone: a run may go on under another value of them
LIBRARIES = ("torch", "torchvision", "transformers", "tokenizers", "peft", "accelerate", "datasets", "pillow", "numpy")


def stage_identity(stage: str, params: Params) -> dict[str, Any]:
    """The identity of a dvc.yaml stage: {"params": its values, "deps": {path: sha256}, "versions": {...}}."""
    declared = YAML(typ="safe", pure=True).load(Path("dvc.yaml"))["stages"][stage]
    return {
        "params": {key: getattr(params, key) for key in declared["params"] if key not in BESIDE},
        "deps": {dep: content_hash(Path(dep)) for dep in declared["deps"]},
        "versions": versions(),
    }


def stage_code(stage: str) -> dict[str, str]:
    """{path: sha256} of the modules that a stage of dvc.yaml reaches."""
    declared = YAML(typ="safe", pure=True).load(Path("dvc.yaml"))["stages"][stage]
    return {dep: content_hash(Path(dep)) for dep in declared["deps"] if dep.endswith(".py")}


def versions() -> dict[str, str]:
    """Python's and those of the libraries that decide results."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def content_hash(path: Path) -> str:
    """Return the sha256 of a file, or of the names and hashes of all files in a folder, compiled code left out.

    Raises:
        UserError: nothing is there, or a folder holds no file. The hash of nothing would be the same for each of them.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    if not files:
        raise UserError(f"{path}: {'holds no file' if path.is_dir() else 'no such file or folder'}")
    lines = [f"{p.relative_to(path).as_posix()} {content_hash(p)}" for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fingerprint(identity: dict[str, Any]) -> str:
    """sha256 of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def read_identity(folder: Path) -> dict[str, Any]:
    """Read what a training run wrote about itself into identity.json; {} where the folder has none.

    Raises:
        UserError: the file is damaged, or a part of it that is used has another type.
    """
    file = folder / IDENTITY_FILE
    if not os.path.lexists(file):
        return {}
    identity = read_json_object(file)
    if misfit := _find_misfit(identity, PARTS):
        raise UserError(f"{file}: {misfit}; copy the file from the run that trained {folder}")
    return identity


def _find_misfit(value: Any, form: Any, name: str = "", is_entry: bool = False) -> str:
    """Name the first part that has another type than in `form`, "" if there is none.

    "*" in `form` stands for any key; an entry of that kind (`is_entry`) has all of its parts.
    """
    if not isinstance(form, dict):
        fits = isinstance(value, form) and not isinstance(value, bool)
        return "" if fits else f"{name}: {reprlib.repr(value)} is not {WORDS[form]}"
    if not isinstance(value, dict):
        return f"{name}: {reprlib.repr(value)} is not an object"
    entries = "*" in form
    parts = dict.fromkeys(value, form["*"]) if entries else {k: form[k] for k in form if is_entry or k in value}
    misfits = (_find_misfit(value.get(k), part, f"{name}.{k}".strip("."), entries) for k, part in parts.items())
    return next(filter(None, misfits), "")
