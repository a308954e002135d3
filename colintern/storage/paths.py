"""Checks of paths that a command line names, made before a command imports what takes half a minute to import."""

import os
from pathlib import Path

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.params import Params, is_on_hub, split_hub_id
from colintern.storage.files import require_regular_file

ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
TRAIN_OUT = Path("experiments/colintern")  # of dvc.yaml
PRESETS = ("internvl3_5-1b", "internvl3_5-2b", "internvl3_5-4b", "internvl3_5-8b")  # configs that are shipped


def require_model(key: str, folder: Path, merged: bool = True) -> None:
    """Raise UserError unless `folder` holds an adapter or, with `merged`, a merged model."""
    if not folder.is_dir():
        state = "is a file" if folder.is_file() else "does not exist, or is no folder here"
        is_trained_here = folder.resolve() == TRAIN_OUT.resolve()
        source = f"or {suggest_adapter_source(folder)}" if is_trained_here else f"such as {TRAIN_OUT}"
        raise UserError(f"{key}: {folder}: {state}; give the folder of an adapter, {source}")
    if merged and not os.path.lexists(folder / ADAPTER[1]) and (folder / "config.json").is_file():
        return
    for name in ADAPTER:
        if not os.path.lexists(folder / name):
            merged_too = ", nor a merged model's config.json" if merged else ""
            raise UserError(
                f"{key}: {folder}: holds no {name}{merged_too}; give the folder of an adapter, or "
                f"{suggest_adapter_source(folder)}"
            )
        require_regular_file(folder / name)


def suggest_adapter_source(folder: Path) -> str:
    """Suggest how to get a whole adapter: from the stage train if the folder is its out, else from its origin."""
    if folder.resolve() == TRAIN_OUT.resolve():
        return "run the stage that makes it: dvc repro train"
    return "copy the whole folder again from where it was trained or downloaded"


def require_evaluated_model(name: str) -> None:
    """Raise UserError for a MODEL of `colintern evaluate` that is no model's folder, hub id or name of mteb's."""
    if Path(name).is_dir():
        require_model("MODEL", Path(name))
    elif not is_on_hub(name.partition("@")[0]) or ("@" not in name and Path(name).parent.is_dir()):
        split_hub_id("MODEL", name, "; a model of mteb's whose owner is also the name of a folder here needs it too")


def require_base(base: str, params: Params) -> None:
    """Raise UserError for a base that is a path without a config.json, or a hub id without its commit.

    Args:
        base: a folder, a hub id as `ID@COMMIT` or that of `params` with its commit, or one of `PRESETS`.
        params: those that pin the commit of their own base.
    """
    if base in PRESETS:
        return
    if is_on_hub(base.partition("@")[0]):
        base_at_commit(base, params)
    elif not (root() / base / "config.json").is_file():
        raise UserError(
            f"base: {base!r}: {root() / base / 'config.json'} cannot be used: No such file or directory; give a folder "
            f"that has one, a hub id with its commit, or one of {', '.join(PRESETS)}"
        )


def base_at_commit(base: str, params: Params) -> tuple[str, str]:
    """Split a hub id, `ID@COMMIT` or that of `params`, into id and commit; raise UserError if it has no commit."""
    known_commit = f"{base}@{params.base_revision}" if base == params.base else base
    return split_hub_id("base", known_commit, f"; or take one of {', '.join(PRESETS)}")


def require_new_file(key: str, path: Path) -> None:
    """Raise UserError if no file can be written to `path`."""
    if path.is_dir():
        raise UserError(f"{key}: {path} is a folder; give a file's name, such as {path / 'found.html'}")
    require_writable(key, path.parent)


def require_writable(key: str, folder: Path) -> None:
    """Raise UserError if `folder` cannot be created, or nothing can be written in it."""
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise UserError(f"{key}: {above} is a file, so {folder} cannot be a folder; give another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {above} may not be written; give another place")
