"""Verify the outs that a stage reads against dvc.lock, and delete the checkpoints of finished runs.

DVC trusts a file that it has put in place: a changed byte in its cache, or in a remote without `verify`, reaches the
next stage unnoticed, and `dvc status` and `dvc data status` answer from its record of hashes. Until DVC has recorded a
stage in dvc.lock, it deletes the outs of that stage before it starts it again; the checkpoints stay until then.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from colintern.core.errors import UserError
from colintern.core.project import root

STAGE_VARIABLE = "DVC_STAGE"  # set by DVC for the commands it runs; from a subfolder it is ../dvc.yaml:NAME
FINISHED_MARK = "ended"  # file in the folder of checkpoints of a run whose outs are in place


def verify_dvc_outputs() -> None:
    """Hash every dep of the current stage that is the out of another stage, and compare it with dvc.lock.

    Without DVC nothing is compared, because the files may have another origin.

    Raises:
        UserError: a file differs; the message says what to delete.
    """
    stage = _get_current_stage()
    if not stage or not Path("dvc.lock").is_file():
        return
    deps = _read_stages("dvc.yaml")[stage]["deps"]
    outs = {out["path"]: out for entry in _read_stages("dvc.lock").values() for out in entry.get("outs", [])}
    changed = [file for dep in deps if dep in outs for file in _list_changed_files(outs[dep])]
    if changed:
        lines = "\n  ".join(f"{path}: is not what dvc.lock names, {md5}" for path, md5 in changed)
        cache = _find_cache()
        objects = [cache / md5[:2] / md5[2:] for _, md5 in changed]
        raise UserError(
            f"{lines}\n  the file was edited, or a byte of it changed in DVC's cache or remote; "
            f"delete it here: {shlex.join(['rm', '-rf', *map(str, [*(path for path, _ in changed), *objects])])}\n"
            "  then run dvc pull or dvc repro; if it comes back, see docs/remotes.md"
        )


def finalize_checkpoints(checkpoints: Path) -> None:
    """Delete the checkpoints of a finished run, or mark them for the next stage if DVC has not recorded the run."""
    if _is_stage_recorded():
        shutil.rmtree(checkpoints)
    else:
        (checkpoints / FINISHED_MARK).touch()


def purge_finished_checkpoints(current: Path | None = None) -> None:
    """Delete the checkpoints that `finalize_checkpoints` has marked.

    Args:
        current: checkpoints of the run that starts now. They are kept if DVC has not recorded that run: it resumes.
    """
    for mark in (root() / ".scratch").glob(f"*/{FINISHED_MARK}"):
        if mark.parent != current or _is_stage_recorded():
            shutil.rmtree(mark.parent, ignore_errors=True)
        else:
            mark.unlink()


def _is_stage_recorded() -> bool:
    """Return whether dvc.lock has the current stage with today's params and deps, so that DVC can restore its outs.

    True as well without DVC, which then deletes nothing.
    """
    if not (stage := _get_current_stage()):
        return True
    from dvc.repo import Repo  # here, because it takes seconds to import

    with Repo() as repo:
        return not any(dep.status() for dep in repo.stage.load_one("dvc.yaml", stage).deps)


def _get_current_stage() -> str:
    """Return the stage that DVC runs; "" if DVC has not started this process, or runs a stage of another project."""
    name = os.environ.get(STAGE_VARIABLE, "").rpartition(":")[2]
    return name if name and Path("dvc.yaml").is_file() and name in _read_stages("dvc.yaml") else ""


def _read_stages(name: str) -> dict[str, Any]:
    return YAML(typ="safe").load(Path(name))["stages"]


def _list_changed_files(out: dict[str, str]) -> list[tuple[Path, str]]:
    """List path and md5 of an out that differs; of a folder, of its files if DVC's cache still has their list."""
    from dvc.fs import LocalFileSystem  # here and below, because only stages that DVC runs need it
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    path, md5 = Path(out["path"]), out["md5"]
    if not path.exists():
        return [(path, md5)]
    files = LocalFileSystem()
    # A database without a record of hashes: every file is read.
    found = build(HashFileDB(files, ""), str(path.absolute()), files, "md5", dry_run=True)[-1]
    expected = HashInfo("md5", md5)
    if found.hash_info == expected:
        return []
    try:
        listed = Tree.load(HashFileDB(files, str(_find_cache())), expected) if isinstance(found, Tree) else ()
    except Exception:  # DVC's list of the folder's files is missing or damaged
        listed = ()
    hashes = {key: info for key, _, info in found} if isinstance(found, Tree) else {}
    return [(path.joinpath(*key), info.value) for key, _, info in listed if hashes.get(key) != info] or [(path, md5)]


def _find_cache() -> Path:
    """Return the folder of DVC's cache in which a file has its md5 as its name."""
    done = subprocess.run(["dvc", "cache", "dir"], cwd=root(), capture_output=True, text=True, check=True)
    return Path(done.stdout.strip(), "files", "md5")
