"""The manifest: an out of fetch-data that names every file of a run with its size and sha256.

Stages get folders of files from here: a file that is missing or was changed is found before it is used.
"""

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.params import Params
from colintern.storage.digests import Digests, FileHash, load_digests
from colintern.storage.files import MISSING, describe_refused, irregular_type, list_files
from colintern.storage.hub import (
    FileSelector,
    HubFile,
    Repo,
    download_repos,
    enable_offline_mode,
    ensure_downloaded,
    escapes_root,
)  # fmt: skip
from colintern.storage.identity import fingerprint
from colintern.storage.lock import mark_in_use, open_lock

logger = logging.getLogger(__name__)
MANIFEST = "data/manifest.json"
ARROW = "data/.arrow"  # mteb's copies of the pages it ranks; below the repository's root
QUARANTINE = "data/quarantine.json"  # rows that are left out, with their reasons
SURVEY = "data/survey.json"  # the data in numbers
BASE_SUFFIXES = (".safetensors", ".json", ".txt", ".jinja")  # no pickles
TRAIN_SUFFIXES = (".parquet",)
BEIR_SUFFIXES = (".parquet", ".md")
TASK_SUFFIXES = (*BEIR_SUFFIXES, ".yaml", ".json", ".jsonl", ".csv", ".tsv")  # where mteb's data sets are read from
REDO = "dvc repro -f fetch-data"


class Source(TypedDict):
    """The folder of documents that files were made from, and whether a program made their queries."""

    folder: str
    files: dict[str, FileHash]
    pseudo: NotRequired[bool]


class FilesEntry(TypedDict):
    """`Files` as an entry of the manifest."""

    folder: str
    revision: str
    files: dict[str, FileHash]
    made_from: Source | None
    weight: int


class Files(NamedTuple):
    """The hashed files of a folder of the repository or, with a `revision`, of a repository of the hub.

    `files` maps a path below `folder` to its hash; `weight` is how often an epoch shows each training row.
    """

    folder: str
    revision: str
    files: dict[str, FileHash]
    made_from: Source | None = None
    weight: int = 1


def is_local_benchmark(benchmark: str) -> bool:
    """Return whether an entry of `benchmarks` is the demo or a folder, not a name that mteb knows."""
    return benchmark == "demo" or (root() / benchmark).is_dir()


def get_digests() -> Digests:
    """Return the recorded hashes of this repository."""
    return load_digests(root().absolute())


def hash_local_files(folder: str, suffixes: tuple[str, ...]) -> Files:
    """Hash every file with one of the `suffixes` below a folder of the repository.

    Raises:
        UserError: the folder does not exist or holds no such file, or one with such a name is not a regular file.
    """
    top = root() / folder
    paths, refused = list_files(top, suffixes)
    irregular = {path: kind for path, kind in refused.items() if not path.endswith("/")}
    if irregular:  # a part of the data would be missing
        raise UserError(f"{folder}: {describe_refused(irregular)}; only regular files are read, replace or delete it")
    if not paths:
        state = "holds no " + " or ".join(f"*{s}" for s in suffixes) if top.is_dir() else "does not exist"
        others = f" ({describe_refused(refused)})" if top.is_dir() and refused else ""
        raise UserError(f"{folder}: the folder {state}{others}; give `demo`, a folder, or a hub id with its revision")
    if refused:
        logger.info(f"{folder}: not read: {describe_refused(refused)}")
    return Files(folder, "", _hash_below(top, [path.relative_to(top).as_posix() for path in paths]))


def hash_local_file(name: str) -> Files:
    """Hash the `negatives_file` of the repository.

    Raises:
        UserError: it does not exist or is not a regular file.
    """
    if kind := irregular_type(root() / name):
        state = "does not exist" if kind == MISSING else f"is {kind}, not a regular file"
        raise UserError(f"negatives_file: {name!r} {state}; `colintern mine --out {name}` makes one")
    return Files(".", "", _hash_below(root(), [name]))


def hash_source_files(folder: str) -> dict[str, FileHash]:
    """Hash every file below a folder of documents, without hidden ones."""
    top = root() / folder
    return _hash_below(top, [path.relative_to(top).as_posix() for path in list_files(top).files])


def download_hub_files(wanted: Sequence[tuple[Repo, FileSelector]]) -> list[Files]:
    """Download and verify the selected files of each repository."""
    selected = download_repos(wanted, get_digests())
    return [
        Files(repo.name, repo.revision, _hash_below(repo.snapshot_folder, [file.path for file in files]))
        for (repo, _), files in zip(wanted, selected, strict=True)
    ]


def _hash_below(top: Path, names: list[str]) -> dict[str, FileHash]:
    return dict(zip(names, get_digests().hash_files([top / name for name in names]), strict=True))


def get_files_folder(files: Files, kind: str) -> Path:
    """Return the folder of the files on this disk."""
    if files.revision:
        return Repo("", files.folder, files.revision, kind).snapshot_folder
    return root() / files.folder


def set_arrow_cache() -> None:
    """Make `datasets` keep its arrow files in the repository, without progress bars. Call it before the import.

    On import mteb makes a folder, by default in the home directory, which may be read-only. Copies of data sets that
    the manifest no longer names are deleted, unless another process may be reading them.
    """
    cache = root() / ARROW
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    os.environ.setdefault("MTEB_CACHE", str(root() / "data" / ".mteb"))
    with open_lock(cache / ".lock") as file:
        lock = os.dup(file.fileno())  # held until this process ends
    # A copy that `dvc exp run --temp` makes has another manifest, and shares the cache with the workspace.
    if root().resolve() == Path.cwd() and Path(MANIFEST).is_file():
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _prune_arrow_cache(cache)
    fcntl.flock(lock, fcntl.LOCK_SH)


def _prune_arrow_cache(cache: Path) -> None:
    """Delete the copies of data sets that the manifest does not name, and no other files."""
    named = {get_arrow_name(entry) for entry in read_data_file(MANIFEST)["evaluation"].values()}
    for path in cache.iterdir():
        name = re.search(r"(?:^|_)([0-9a-f]{40})(?:_|$)", path.name)
        if name and name[1] not in named:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def get_arrow_name(entry: FilesEntry) -> str:
    """Return the folder's name in the arrow cache for an entry of the manifest: a commit, or a hash of its files.

    `datasets` itself takes the commit, which is the last part of the path in the hub's cache.
    """
    return entry["revision"] or fingerprint(entry["files"])[:40]


def ensure_inputs(params: Params, *, evaluation: bool = False, force: bool = False) -> str:
    """Download what is missing of base and, with `evaluation`, benchmarks, and verify all of it.

    After that this process stays off the hub.

    Args:
        params: they name the base.
        evaluation: whether benchmarks are needed.
        force: hash every file, even one whose hash is recorded, to find what the disk itself has changed.

    Returns:
        The name or folder from which the base is loaded, see `ensure_base`.

    Raises:
        UserError: no manifest, or a file is missing and cannot be fetched, or is not the one that was fetched.
    """
    base = ensure_base(params.base, params.base_revision, force)
    manifest = read_data_file(MANIFEST)
    for name in manifest["evaluation"] if evaluation else ():
        ensure_benchmark(name, force)
    enable_offline_mode()
    return base


def ensure_base(base: str, base_revision: str, force: bool = False) -> str:
    """Verify the base, and return the hub id or folder from which it is loaded.

    Raises:
        UserError: the manifest was made for another base, or a file is missing or changed.
    """
    entry = read_data_file(MANIFEST)["base"]
    if (entry["folder"], entry["revision"]) != (base, base_revision):
        raise UserError(f"base: {base!r} is not the one in {MANIFEST}, {entry['folder']!r}; run: dvc repro fetch-data")
    folder = ensure_files(entry, "base", "model", force)
    return base if base_revision else str(folder)


def ensure_benchmark(name: str, force: bool = False) -> Path:
    """Verify a local benchmark or a task of mteb, and return its folder, which has mteb's layout.

    Raises:
        UserError: fetch-data has not seen it, or its files are missing or changed.
    """
    entries = read_data_file(MANIFEST)["evaluation"]
    if name not in entries:
        raise UserError(
            f"benchmarks: {name!r} is not among the data sets in {MANIFEST}, which are "
            f"{', '.join(entries) or 'none'}; check the name, then run: dvc repro fetch-data"
        )
    return ensure_files(entries[name], f"benchmarks: {name}", "dataset", force)


def read_data_file(name: str) -> dict[str, Any]:
    """Read one of fetch-data's JSON files.

    Raises:
        UserError: it is missing, or damaged.
    """
    try:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
        _require_fields(name, content)
    except FileNotFoundError as error:
        raise UserError(f"{name}: missing; run the stage that makes it: dvc repro fetch-data") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: damaged: {str(error)[:200]}; make it again: {REDO}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{name}: damaged: is not what fetch-data wrote; make it again: {REDO}") from error
    return content  # type: ignore[no-any-return]


def _require_fields(name: str, content: Any) -> None:
    """Read the fields of one of fetch-data's files; a damaged one raises AttributeError, KeyError or TypeError."""
    if name == QUARANTINE:
        [(row["source"], row["kind"], row["row"], row["reason"]) for row in content["rows"]]
    elif name == SURVEY:
        [facts["page sizes"] for facts in content.values()]
    else:
        if not content.keys() & {"base", "train", "evaluation"}:
            raise KeyError("base")
        others = [content[key] for key in ("base", "train_corpus", "negatives") if content.get(key)]
        entries = [*content.get("train", []), *others, *content.get("evaluation", {}).values()]
        [(file["size"], file["sha256"]) for entry in entries for file in Files(**entry).files.values()]


def ensure_files(entry: FilesEntry, key: str, kind: str, force: bool = False) -> Path:
    """Download what is missing of an entry of the manifest, verify all of its files, and return their folder.

    Raises:
        UserError: a file is missing and cannot be fetched, or was changed.
    """
    files = Files(**entry)
    for name in files.files:
        if escapes_root(name):
            raise UserError(f"{MANIFEST}: {name!r} points outside {files.folder}")
    folder = get_files_folder(files, kind)
    if files.made_from:
        mark_in_use(folder.parent.resolve())
    missing = [name for name in files.files if not (folder / name).is_file()]
    if missing and not files.revision:
        raise UserError(f"{folder / missing[0]}: missing, but {MANIFEST} names it; run: {REDO}")
    if missing:  # the manifest came from elsewhere, or the cache was emptied
        repo = Repo(key, files.folder, files.revision, kind)
        wanted = {name: files.files[name] for name in missing}
        ensure_downloaded(
            [HubFile(repo, name, file["size"], file["sha256"]) for name, file in wanted.items()], get_digests()
        )
    have = dict(zip(files.files, get_digests().hash_files([folder / name for name in files.files], force), strict=True))
    for name, want in files.files.items():
        if have[name] != want:
            get_digests().invalidate(folder / name)  # so that fetch-data, too, reads it again
            raise UserError(
                f"{folder / name}: {have[name]['size']} bytes with sha256 {have[name]['sha256'][:12]}, but {MANIFEST} "
                f"says {want['size']} bytes with {want['sha256'][:12]}; it was changed after it was fetched: {REDO}"
            )
    if files.made_from:
        _verify_sources(files.made_from)
    return folder


def _verify_sources(made_from: Source) -> None:
    have, want = hash_source_files(made_from["folder"]), made_from["files"]
    changed = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
    if changed:
        name = changed[0]
        state = "new" if name not in want else "missing" if name not in have else "changed"
        raise UserError(
            f"{made_from['folder']}/{name}: {state} since the pages were made ({len(changed)} such files); run: {REDO}"
        )
