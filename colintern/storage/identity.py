"""Identify a run by the hashes of its params, the files it depends on and the library versions.

Two runs with one identity give the same bytes, whatever their commits; the fingerprint of the identity names the folder
in which an interrupted run finds its checkpoints again.
"""

import hashlib
import json
import os
import platform
import reprlib
from collections.abc import Mapping, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from colintern.core.errors import UserError
from colintern.core.imports import OBSERVERS, TOP, list_reached_modules
from colintern.params import Params
from colintern.storage.files import read_json_object

IDENTITY_FILE = "identity.json"
PARTS = ("params", "deps", "versions", "base", "start")  # of identity.json, each an object
NON_IDENTITY_PARAMS = ("tracker",)  # they observe a run; it may resume with other values of them
VERSIONS_FILE = "versions.yaml"
LIBRARIES = ("torch", "torchvision", "transformers", "tokenizers", "peft", "accelerate", "datasets", "pillow", "numpy")


def stage_identity(stage: str, params: Params) -> dict[str, Any]:
    """Return the identity of a dvc.yaml stage: {"params": its values, "deps": {path: sha256}, "versions": {...}}."""
    declared = _read_stage(stage)
    keys = [key for key in declared["params"] if isinstance(key, str)]
    return {
        "params": {key: getattr(params, key) for key in keys if key not in NON_IDENTITY_PARAMS},
        "deps": {dep: content_hash(Path(dep)) for dep in declared["deps"]},
        "versions": get_stage_versions(stage),
    }


def stage_code(stage: str) -> dict[str, str]:
    """Return {path: sha256} of the folders and the script that decide the result of a dvc.yaml stage."""
    deps = [dep for dep in _read_stage(stage)["deps"] if dep.startswith(("colintern/", "stages/"))]
    return {dep: content_hash(Path(dep)) for dep in deps}


def get_stage_versions(stage: str) -> dict[str, str]:
    """Return the installed versions of Python and of the libraries that a dvc.yaml stage depends on."""
    groups = [entry for entry in _read_stage(stage)["params"] if isinstance(entry, dict)]
    return get_versions(*(name for group in groups for name in group.get(VERSIONS_FILE) or ()))


def _read_stage(stage: str) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(Path("dvc.yaml"))["stages"][stage]


def get_versions(*libraries: str) -> dict[str, str]:
    """Return the installed versions of Python and of `libraries`, by default of those that decide results."""
    return {"python": platform.python_version()} | {name: version(name) for name in libraries or LIBRARIES}


def code_hashes(*modules: str, without: Set[str] = frozenset()) -> dict[str, str]:
    """Return {path: sha256} of `modules` and of the modules of this repository that they reach by imports.

    Args:
        modules: dotted names.
        without: parts of colintern/ that are left out beside the observers.
    """
    files = list_reached_modules(*modules, without=OBSERVERS | without)
    return {file.relative_to(TOP).as_posix(): content_hash(file) for file in files}


def content_hash(path: Path) -> str:
    """Return the sha256 of a file, or of the names and hashes of all files in a folder, compiled code left out.

    Raises:
        UserError: the path is missing or is an empty folder, whose hash would be that of every empty folder.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    if not files:
        raise UserError(f"{path}: {'holds no file' if path.is_dir() else 'no such file or folder'}")
    lines = [f"{p.relative_to(path).as_posix()} {content_hash(p)}" for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fingerprint(identity: Mapping[str, object]) -> str:
    """Return the sha256 of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def read_identity(folder: Path) -> dict[str, Any]:
    """Read what a training run wrote about itself into identity.json; {} where the folder has none.

    Raises:
        UserError: the file is damaged, or a part of it is no object.
    """
    file = folder / IDENTITY_FILE
    if not os.path.lexists(file):
        return {}
    identity = read_json_object(file)
    for part in PARTS:
        if not isinstance(value := identity.get(part, {}), dict):
            error = f"{part}: {reprlib.repr(value)} is not an object"
            raise UserError(f"{file}: {error}; copy the file from the run that trained {folder}")
    return identity
