"""What stages leave, held against dvc.lock: before another one reads it, and before checkpoints go.

DVC takes a file that it has put in place for what dvc.lock names, and does not look at it again: a byte that has
changed in its cache, or in a remote without `verify`, is handed on in silence. And until it has recorded a stage in
dvc.lock, its outs are nothing to it: killed then, or with a full cache, it deletes them and starts the stage anew.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from colintern.core.errors import UserError
from colintern.core.project import root

STAGE = "DVC_STAGE"  # which DVC sets for the commands it runs; from a sub folder it is ../dvc.yaml:NAME
ENDED = "ended"  # in the folder of checkpoints of a run whose outs are in place


def check_outs() -> None:
    """Hash every dep of the stage under way that is an out of another; nothing where DVC has not started this process,
    because then the files may be anybody's.

    Raises:
        UserError: a file is not the one that dvc.lock names; the message says what to delete.
    """
    stage = _stage()
    if not stage or not Path("dvc.lock").is_file():
        return
    deps = _yaml("dvc.yaml")[stage]["deps"]
    outs = {out["path"]: out for entry in _yaml("dvc.lock").values() for out in entry.get("outs", [])}
    wrong = [fault for dep in deps if dep in outs for fault in _wrong(outs[dep])]
    if wrong:
        files = "\n  ".join(f"{path}: is not what dvc.lock names, {md5}" for path, md5 in wrong)
        rotten = shlex.join([*(str(path) for path, _ in wrong), *(str(_cached(md5)) for _, md5 in wrong)])
        raise UserError(
            f"{files}\n  somebody changed it, or a byte of DVC's cache or remote is another; "
            f"delete what is here: rm -rf {rotten}\n"
            "  then dvc pull, or dvc repro; where it comes back, see docs/remotes.md"
        )


def let_go(checkpoints: Path) -> None:
    """Delete the checkpoints of a run whose outs are in place, or leave that to the next stage: see `_recorded`."""
    if _recorded():
        shutil.rmtree(checkpoints)
    else:
        (checkpoints / ENDED).touch()


def forget_ended(own: Path | None = None) -> None:
    """Delete the checkpoints that `let_go` has left. Those of the run `own`, which starts again, stay where it was not
    recorded: it goes on from them."""
    for mark in (root() / ".scratch").glob(f"*/{ENDED}"):
        if mark.parent != own or _recorded():
            shutil.rmtree(mark.parent, ignore_errors=True)
        else:
            mark.unlink()


def _recorded() -> bool:
    """Whether DVC can bring back the outs of the stage under way, since dvc.lock has it with the params and files of
    now; also where DVC has not started this process, and will not delete them."""
    stage = _stage()
    if not stage:
        return True
    known = _yaml("dvc.lock").get(stage) if Path("dvc.lock").is_file() else None
    if not known:
        return False
    for file, values in known.get("params", {}).items():
        now = YAML(typ="safe").load(Path(file))
        if any(now.get(key) != value for key, value in values.items()):
            return False
    return not any(_wrong(dep) for dep in known.get("deps", []))


def _stage() -> str:
    """Return the stage under way; "" where DVC has not started this process, or for a stage of another project."""
    name = os.environ.get(STAGE, "").rpartition(":")[2]
    return name if name and Path("dvc.yaml").is_file() and name in _yaml("dvc.yaml") else ""


def _yaml(name: str) -> dict[str, Any]:
    return YAML(typ="safe").load(Path(name))["stages"]


def _wrong(out: dict[str, Any]) -> list[tuple[Path, str]]:
    """The path and md5 of an out that has another one; of a folder, of its files where DVC still has their list."""
    path, wanted = Path(out["path"]), out["md5"]
    if not path.is_dir():
        return [] if path.is_file() and _md5(path) == wanted else [(path, wanted)]
    here = {file.relative_to(path).as_posix(): _md5(file) for file in path.rglob("*") if file.is_file()}
    listed = [{"md5": here[name], "relpath": name} for name in sorted(here)]  # as DVC lists a folder
    if _bytes_md5(json.dumps(listed, sort_keys=True).encode()) == wanted.removesuffix(".dir"):
        return []
    there = _cached(wanted)
    if not there.is_file() or _md5(there) + ".dir" != wanted:
        return [(path, wanted)]
    known = {entry["relpath"]: entry["md5"] for entry in json.loads(there.read_text())}
    return [(path / name, md5) for name, md5 in known.items() if here.get(name) != md5] or [(path, wanted)]


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def _bytes_md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _cached(md5: str) -> Path:
    """Where DVC keeps a file."""
    done = subprocess.run(["dvc", "cache", "dir"], cwd=root(), capture_output=True, text=True, check=True)
    return Path(done.stdout.strip(), "files", "md5", md5[:2], md5[2:])
