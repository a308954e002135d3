"""Evaluations to be compared: of a folder, a git revision or a DVC experiment."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from colintern.core.errors import UserError

OUT = "results/mteb_evaluation"
FILES = ("run.json", "queries/trained.parquet")


class Outcome(NamedTuple):
    """`run`: what its run.json says (revision, params, data). `queries`: its rows, see queries.py."""

    name: str
    run: dict[str, Any]
    queries: list[dict[str, Any]]


def outcome(name: str) -> Outcome:
    """The evaluation at a folder (an eval stage's out, or a checkout with one), or else at a revision.

    Raises:
        UserError: there is none, it is older than these files, or DVC's cache lacks it.
    """
    found = _folder(Path(name)) if Path(name).is_dir() else _revision(name)
    try:
        run, queries = (found(file) for file in FILES)
        # Not `read_table`: a thread of its scanner that is there when Python ends aborts the process
        # (apache/arrow#34314); of such a short one, one in seven on busy cores.
        table = pq.ParquetFile(pa.BufferReader(queries)).read(use_threads=False)
        return Outcome(name, json.loads(run), table.to_pylist())
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: its results cannot be read: {error}; evaluate it again: dvc repro -f eval") from error


def _folder(folder: Path) -> Callable[[str], bytes]:
    place = next((top for top in (folder, folder / OUT) if (top / FILES[0]).is_file()), None)
    if place is None:
        raise UserError(
            f"{folder}: holds no {FILES[0]}, nor does {folder / OUT}; give the folder of an evaluation made by "
            f"the eval stage or by `colintern evaluate`; results of an older version: dvc repro -f eval"
        )

    def read(file: str) -> bytes:
        if not (place / file).is_file():
            raise UserError(f"{place / file}: missing; evaluate it again: dvc repro -f eval")
        return (place / file).read_bytes()

    return read


def _revision(name: str) -> Callable[[str], bytes]:
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import RevError, SCMError
    from dvc_data.index import DataIndexDirError

    try:
        files = DVCFileSystem(rev=name, subrepos=True)
        # Its paths begin at git's root, which may hold this pipeline as a sub folder. `repo` opens the revision:
        # `exists` would take an error for "no".
        below = Path(Repo.find_root()).resolve().relative_to(Path(files.repo.scm.root_dir).resolve())
        place = f"{Path('/', below, OUT)}"
        listed = files.exists(place)
    except DataIndexDirError as error:
        raise _lacking(name, OUT) from error
    except (RevError, SCMError, DvcException) as error:
        raise UserError(
            f"{name!r} is no folder here, and no git revision or DVC experiment: {error}; "
            f"`git log --oneline` and `dvc exp list --all-commits` name some, and the workspace is `.`"
        ) from error
    if not listed:
        raise UserError(f"{name}: has no {OUT}; it was not evaluated there, or dvc.lock was not committed")

    def read(file: str) -> bytes:
        try:
            return files.read_bytes(f"{place}/{file}")
        except (OSError, DvcException, DataIndexDirError) as error:
            raise _lacking(name, f"{OUT}/{file}") from error

    return read


def _lacking(name: str, what: str) -> UserError:
    return UserError(
        f"{name}: {what} is not in DVC's cache here, nor in a remote, or that revision is older than this file; get it "
        f"with `dvc pull` at that revision or `dvc exp pull`, or make it in a checkout of it with `dvc repro eval`"
    )
