"""The manifest: fetch-data's out, which names every file of a run with its size and sha256.

Whoever reads one of those files asks here for its folder, so that a file that is missing or was changed is found
before it is trained on.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.core.rules import kernel_at
from colintern.params import Params
from colintern.storage import hub
from colintern.storage.digests import Digests, digests_at
from colintern.storage.hub import Choice, HubFile
from colintern.storage.hub_errors import Repo
from colintern.storage.identity import fingerprint
from colintern.storage.lock import mark_in_use, open_lock
from colintern.storage.regular import MISSING, describe_refused, irregular_type, list_files

MANIFEST = "data/manifest.json"
ARROW = "data/.arrow"  # mteb's copies of the pages it ranks; below the repository's root
QUARANTINE = "data/quarantine.json"  # rows that are left out, with their reasons
SURVEY = "data/survey.json"  # the data in numbers
BASE_SUFFIXES = (".safetensors", ".json", ".txt", ".jinja")  # no pickles
TRAIN_SUFFIXES = (".parquet",)
BEIR_SUFFIXES = (".parquet", ".md")
TASK_SUFFIXES = (*BEIR_SUFFIXES, ".yaml", ".json", ".jsonl", ".csv", ".tsv")  # where mteb's data sets are read from


class Files(NamedTuple):
    """`folder` holds `files` (path below the folder -> {size, sha256}); it is a hub repository if `revision`.

    `made_from`: {"folder", "files", "pseudo"} of the documents they were made from, if they were; `weight`: how often
    an epoch shows each training row.
    """

    folder: str
    revision: str
    files: dict[str, dict[str, Any]]
    made_from: dict[str, Any] | None = None
    weight: int = 1


def local(benchmark: str) -> bool:
    """Whether an entry of `benchmarks` is the demo or a folder, not a name of mteb's."""
    return benchmark == "demo" or (root() / benchmark).is_dir()


def digests() -> Digests:
    """The hashes this repository's stages have taken of files."""
    return digests_at(root().absolute())


def local_files(folder: str, suffixes: tuple[str, ...]) -> Files:
    """Every file with one of the `suffixes` below `folder` of the repository.

    Raises:
        UserError: the folder does not exist or holds no such file, or what is called like one is no regular file.
    """
    return Files(folder, "", _below(root() / folder, folder, suffixes))


def local_file(name: str) -> Files:
    """One file of the repository.

    Raises:
        UserError: it does not exist.
    """
    if kind := irregular_type(root() / name):
        state = "does not exist" if kind == MISSING else f"is {kind}, not a regular file"
        raise UserError(f"negatives_file: {name!r} {state}; `colintern mine --out {name}` makes one")
    return Files(".", "", _named(root(), [name]))


def source_files(folder: str) -> dict[str, dict[str, Any]]:
    """Every file below a folder of documents, hidden ones left out."""
    top = root() / folder
    return _named(top, [path.relative_to(top).as_posix() for path in list_files(top).files])


def hub_files(wanted: Sequence[tuple[Repo, Choice]]) -> list[Files]:
    """The chosen files of each repository, whole in the hub's own cache.

    Raises:
        UserError: see `hub.fetch`.
    """
    found = hub.fetch(wanted, digests())
    return [
        Files(repo.name, repo.revision, _named(hub.folder(repo), [file.path for file in files]))
        for (repo, _), files in zip(wanted, found, strict=True)
    ]


def _below(top: Path, name: str, suffixes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    paths, refused = list_files(top, suffixes)
    irregular = {path: kind for path, kind in refused.items() if not path.endswith("/")}
    if irregular:  # a part of the data would be missing
        raise UserError(f"{name}: {describe_refused(irregular)}; only regular files are read, replace or delete it")
    if not paths:
        state = "holds no " + " or ".join(f"*{s}" for s in suffixes) if top.is_dir() else "does not exist"
        others = f" ({describe_refused(refused)})" if top.is_dir() and refused else ""
        raise UserError(f"{name}: the folder {state}{others}; give `demo`, a folder, or a hub id with its revision")
    if refused:
        print(f"{name}: not read: {describe_refused(refused)}")
    return _named(top, [p.relative_to(top).as_posix() for p in paths])


def _named(top: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    return dict(zip(names, digests().many([top / name for name in names]), strict=True))


def folder_of(files: Files, kind: str) -> Path:
    """Where the files lie on this disk."""
    return hub.folder(Repo("", files.folder, files.revision, kind)) if files.revision else root() / files.folder


def arrow_cache() -> None:
    """Have `datasets` keep its arrow files in the repository, and no bars; to be called before it is imported.

    mteb makes a folder when it is imported, by default in the home directory, which may be read-only.

    Copies of data sets that the manifest no longer names are deleted, unless another process may be reading them.
    """
    cache = root() / ARROW
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    os.environ.setdefault("MTEB_CACHE", str(root() / "data" / ".mteb"))
    with open_lock(cache / ".lock") as file:
        lock = os.dup(file.fileno())  # the copy is held until this process ends
    # A copy that `dvc exp run --temp` makes has another manifest, and shares the cache with the workspace.
    if root().resolve() == Path.cwd() and Path(MANIFEST).is_file():
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _prune(cache)
    fcntl.flock(lock, fcntl.LOCK_SH)


def _prune(cache: Path) -> None:
    """Delete what `datasets` has made of data sets that the manifest does not name, and no other files."""
    named = {arrow_name(entry) for entry in read(MANIFEST)["evaluation"].values()}
    for path in cache.iterdir():
        name = re.search(r"(?:^|_)([0-9a-f]{40})(?:_|$)", path.name)
        if name and name[1] not in named:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def arrow_name(entry: dict[str, Any]) -> str:
    """Name the folder of the arrow cache for an entry of the manifest: a commit of the hub, or a hash of its files.

    `datasets` itself takes the commit, which is the last part of the path in the hub's cache.
    """
    return entry["revision"] or fingerprint(entry["files"])[:40]


def ready(params: Params, *, evaluation: bool = False, anew: bool = False) -> str:
    """Fetch and check files of base, kernel and, if asked, evaluation; after that, this process stays off the hub.

    Returns where the base is loaded from, see `check_base`.

    Args:
        anew: hash every file, whatever is known of it, to find what the disk itself has changed.

    Raises:
        UserError: no manifest, or a file is missing and cannot be fetched, or is not the one that was fetched.
    """
    base = check_base(params, anew)
    if entry := read(MANIFEST).get("kernel"):
        checked_folder(entry, "attention", "kernel", anew)
    for name in read(MANIFEST)["evaluation"] if evaluation else ():
        benchmark_folder(name, anew)
    hub.stay_offline()
    return base


def check_base(params: Params, anew: bool = False) -> str:
    """Where the base is loaded from, a hub id or a folder, whose files are there and are those that were fetched.

    Raises:
        UserError: the manifest was made for another base, or a file is missing or changed.
    """
    entry = read(MANIFEST)["base"]
    if (entry["folder"], entry["revision"]) != (params.base, params.base_revision):
        raise UserError(
            f"base: {params.base!r} is not the one in {MANIFEST}, {entry['folder']!r}; run: dvc repro fetch-data"
        )
    folder = checked_folder(entry, "base", "model", anew)
    return params.base if params.base_revision else str(folder)


def kernel_entry(attention: str) -> dict[str, Any] | None:
    """What is known of the kernel repository that `attention` names; None where it names none.

    Raises:
        UserError: fetch-data has not fetched it.
    """
    wanted = kernel_at(attention)
    if wanted is None:
        return None
    entry = read(MANIFEST).get("kernel")
    if entry is None or (entry["folder"], entry["revision"]) != wanted:
        there = f"{entry['folder']}@{entry['revision']}" if entry else "none"
        raise UserError(f"attention: {attention!r} is not the kernel in {MANIFEST}, {there}; run: dvc repro fetch-data")
    return entry


def benchmark_folder(name: str, anew: bool = False) -> Path:
    """The checked folder, in mteb's layout, of a local benchmark, or of the task of mteb's that is called `name`.

    Raises:
        UserError: fetch-data has not seen it, or its files are missing or changed.
    """
    entries = read(MANIFEST)["evaluation"]
    if name not in entries:
        raise UserError(
            f"benchmarks: {name!r} is not among the data sets in {MANIFEST}, which are "
            f"{', '.join(entries) or 'none'}; check the name, then run: dvc repro fetch-data"
        )
    return checked_folder(entries[name], f"benchmarks: {name}", "dataset", anew)


def read(name: str) -> dict[str, Any]:
    """Read one of fetch-data's JSON files.

    Raises:
        UserError: it is missing, or damaged.
    """
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{name}: missing; run the stage that makes it: dvc repro fetch-data") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: damaged: {str(error)[:200]}; make it again: dvc repro -f fetch-data") from error
    if not _is_intact(name, found):
        raise UserError(f"{name}: damaged: is not what fetch-data wrote; make it again: dvc repro -f fetch-data")
    return found


def _is_intact(name: str, found: Any) -> bool:
    """Tell whether the content of one of fetch-data's files has the form in which it was written."""
    if not isinstance(found, dict):
        return False
    if name == QUARANTINE:
        rows = found.get("rows")
        keys = {"source", "kind", "row", "reason"}
        return isinstance(rows, list) and all(isinstance(row, dict) and keys <= row.keys() for row in rows)
    if name == SURVEY:
        return all(isinstance(facts, dict) and "page sizes" in facts for facts in found.values())
    train, evaluation = found.get("train", []), found.get("evaluation", {})
    if (
        not found.keys() & {"base", "train", "kernel", "evaluation"}
        or not isinstance(train, list)
        or not isinstance(evaluation, dict)
    ):
        return False
    others = [found[key] for key in ("base", "train_corpus", "negatives", "kernel") if found.get(key)]
    return all(map(_is_entry, [*train, *others, *evaluation.values()]))


def _is_entry(entry: Any) -> bool:
    """Tell whether an entry of the manifest has the fields of `Files`, and a size and a hash for each file."""
    return (
        isinstance(entry, dict)
        and {"folder", "revision", "files"} <= entry.keys() <= set(Files._fields)
        and isinstance(entry["folder"], str)
        and isinstance(entry["revision"], str)
        and isinstance(entry["files"], dict)
        and all(isinstance(file, dict) and {"size", "sha256"} <= file.keys() for file in entry["files"].values())
    )


def checked_folder(entry: dict[str, Any], key: str, kind: str, anew: bool = False) -> Path:
    """The folder of an entry, all of whose files are there and are the ones that were fetched.

    Raises:
        UserError: a file is missing and cannot be fetched, or was changed.
    """
    files = Files(**entry)
    for name in files.files:
        if hub.outside(name):
            raise UserError(f"{MANIFEST}: {name!r} points outside {files.folder}")
    folder = root() / files.folder
    if files.made_from:
        mark_in_use(folder.parent.resolve())
    if files.revision:
        repo = Repo(key, files.folder, files.revision, kind)
        folder = hub.folder(repo)
        lacking = {name: want for name, want in files.files.items() if not (folder / name).is_file()}
        if lacking:  # the manifest came from elsewhere, or the cache was emptied
            hub.get([HubFile(repo, name, want["size"], want["sha256"]) for name, want in lacking.items()], digests())
    for name in files.files:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing, but {MANIFEST} names it; run: dvc repro -f fetch-data")
    paths = [folder / name for name in files.files]
    for path, want, have in zip(paths, files.files.values(), digests().many(paths, anew), strict=True):
        if have != want:
            digests().forget(path)  # so that fetch-data, too, sees what is in it now
            raise UserError(
                f"{path}: {have['size']} bytes with sha256 {have['sha256'][:12]}, but {MANIFEST} says {want['size']} "
                f"bytes with {want['sha256'][:12]}; it was changed after it was fetched: dvc repro -f fetch-data"
            )
    if files.made_from:
        _check_sources(files.made_from)
    return folder


def _check_sources(made_from: dict[str, Any]) -> None:
    have, want = source_files(made_from["folder"]), made_from["files"]
    changed = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
    if changed:
        name = changed[0]
        state = "new" if name not in want else "missing" if name not in have else "changed"
        raise UserError(
            f"{made_from['folder']}/{name}: {state} since the pages were made ({len(changed)} such files); "
            f"run: dvc repro -f fetch-data"
        )
