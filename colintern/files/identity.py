"""What a run is made of, as content hashes: its own params, the files it depends on, the library versions.

Two runs with one identity give the same bytes, whatever commit they stand on; the identity's fingerprint names the
folder in which an interrupted run finds its checkpoints again.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from colintern.adapter_files import IDENTITY_FILE, read_json_object, show
from colintern.params import Params, UserError

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


# The parts of identity.json that are read again, and their types; a part comes after the one that it is in.
Kind = type | tuple[type, ...]
WORDS: dict[Kind, str] = {
    dict: "an object", str: "a text", int: "a whole number", (int, float): "a number",
}  # fmt: skip
PARTS: dict[str, Kind] = {
    **dict.fromkeys(("params", "deps", "versions", "base", "start"), dict),
    **dict.fromkeys(("base.files", "base.files.*", "start.*"), dict),
    **dict.fromkeys(("versions.*", "params.dtype", "base.folder", "base.revision"), str),
    **dict.fromkeys(("base.files.*.sha256", "start.*.sha256"), str),
    **dict.fromkeys(("params.max_visual_tokens", "params.max_query_tokens", "start.*.tensors"), int),
    "start.*.std": (int, float),
}


def read_identity(folder: Path) -> dict[str, Any]:
    """Return what a training run wrote about itself into identity.json, {} where the folder has none.

    Raises:
        UserError: the file cannot be read, or a part that is read again is of another type.
    """
    file = folder / IDENTITY_FILE
    if not os.path.lexists(file):
        return {}
    identity = read_json_object(file)
    for path, kind in PARTS.items():
        for name, value in _parts(identity, path.split(".")):
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(f"{file}: {name}: {show(value)} is not valid; it must be {WORDS[kind]}")
    return identity


def _parts(value: Any, path: list[str], name: str = "", is_entry: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of each part that a path leads to; one that an entry of many lacks is None."""
    if not path:
        yield name.removeprefix("."), value
        return
    key, *rest = path
    for found in value if key == "*" else [key] if is_entry or key in value else []:
        yield from _parts(value.get(found), rest, f"{name}.{found}", is_entry=key == "*")
