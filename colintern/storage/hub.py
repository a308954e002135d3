"""The hub: files of a repository at a commit, whole and checked, in huggingface_hub's own cache (HF_HOME).

huggingface_hub lists and transfers: Xet or HTTP, redirects, HF_TOKEN, 429 with Retry-After, and a cut transfer goes on
where it broke off. What it lacks is here: the question whether all of it fits the disk, before the first byte; one bar
over all files; the hash of what arrived, since it takes any bytes of the right length; another try where it gives up
at once (a 5xx on the file itself, a reset connection, a wrong length).
A download that was killed goes on with the files it had not finished.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from huggingface_hub import HfApi, RepoFile, constants, hf_hub_download, is_offline_mode
from huggingface_hub._tree_cache import TreeCacheEntry, read_tree_cache, write_tree_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils.sha import git_hash
from tqdm import tqdm

from colintern.core.errors import UserError
from colintern.core.progress import ProgressBar
from colintern.storage.digests import Digests
from colintern.storage.hub_errors import PASSING, OfflineError, Repo, brief, explained, offline
from colintern.storage.regular import DANGLING, MISSING, irregular_type

WORKERS = 8  # files at once
WAITS = (1, 2, 4, 8)  # seconds before another try, after which a file is given up
ABANDONED = 3600  # seconds after which nobody writes a partial file any more: a killed process left it


# Which files of a repository are wanted: those with one of these suffixes, the first of which some file must have; or
# what picks them from the paths of all.
Choice = tuple[str, ...] | Callable[[Repo, list[str]], list[str]]


class HubFile(NamedTuple):
    """A file of a repository; `want` is the sha256 of its bytes or, of a file outside LFS, its git hash (40 hex)."""

    repo: Repo
    path: str
    size: int
    want: str

    @property
    def cached(self) -> Path:
        return folder(self.repo) / self.path


def folder(repo: Repo) -> Path:
    """Where the cache has, or will have, the repository's files at this commit."""
    return _storage(repo) / "snapshots" / repo.revision


def _storage(repo: Repo) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo.name, repo_type=repo.kind)


def stay_offline() -> None:
    """Keep the rest of this process off the hub: all it needs is in the cache.

    Else transformers asks for every file that a repository might also have, and where there is no network each of these
    17 questions takes 23 seconds to fail.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # for processes this one starts, and for what is imported later
    constants.HF_HUB_OFFLINE = True


def fetch(wanted: Sequence[tuple[Repo, Choice]], digests: Digests) -> list[list[HubFile]]:
    """Have the chosen files of each of the repositories whole in the cache.

    Raises:
        OfflineError: the hub cannot be reached and the cache lacks something.
        UserError: an unknown, private or gated repository, an unknown revision, nothing to choose, not enough room on
            the disk, or a file that arrives wrong twice.
    """
    found: list[list[HubFile]] = []
    for repo, choice in wanted:
        try:
            found.append(_listing(repo, choice))
        except OfflineError as error:
            raise offline([repo for repo, _ in wanted if _tree(repo) is None], error.reason) from error
    get([file for files in found for file in files], digests)
    return found


def fetch_one(repo: Repo, path: str, digests: Digests) -> Path:
    """One file of a repository in the cache, which nothing else of it need be.

    Raises:
        OfflineError, UserError: see `fetch`.
    """
    cached = folder(repo) / path
    if cached.is_file():
        return cached
    files = [file for file in _listing(repo, (PurePosixPath(path).suffix,)) if file.path == path]
    if not files:
        raise UserError(f"{repo.key}: {repo.name!r} at {repo.revision} holds no {path}")
    get(files, digests)
    return cached


def outside(path: str) -> bool:
    """Whether a path that should be below a folder may lead out of it."""
    return PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts


def _tree(repo: Repo) -> dict[str, TreeCacheEntry] | None:
    return read_tree_cache(str(_storage(repo)), repo.revision)


def _listing(repo: Repo, choice: Choice) -> list[HubFile]:
    """The chosen ones of the repository's files; the hub is asked once, since a commit's files never change."""
    tree = _tree(repo)
    if tree is None:
        try:
            listed = HfApi().list_repo_tree(repo.name, recursive=True, revision=repo.revision, repo_type=repo.kind)
            tree = {entry.path: _entry(entry) for entry in listed if isinstance(entry, RepoFile)}
        except (HTTPError, OSError, HFValidationError) as error:
            raise explained(error, repo) from error
        write_tree_cache(str(_storage(repo)), repo.revision, tree)
    if isinstance(choice, tuple):
        paths = [path for path in sorted(tree) if PurePosixPath(path).suffix in choice]
        if not any(path.endswith(choice[0]) for path in paths):
            raise UserError(f"{repo.key}: {repo.name!r} at {repo.revision} holds no *{choice[0]}")
    else:
        paths = choice(repo, sorted(tree))
    for path in paths:
        if outside(path):
            raise UserError(f"{repo.key}: {repo.name!r} at {repo.revision} names a file outside itself, {path!r}")
    return [HubFile(repo, path, tree[path].size, tree[path].lfs_sha256 or tree[path].blob_id) for path in paths]


def _entry(file: RepoFile) -> TreeCacheEntry:
    lfs_sha256, lfs_size = (file.lfs.sha256, file.lfs.size) if file.lfs else (None, None)
    return TreeCacheEntry(file.size, file.blob_id, lfs_sha256, lfs_size, file.xet_hash)


def get(files: Iterable[HubFile], digests: Digests) -> None:
    """Have these files in the cache, each with the hash it should have; what is there and right is left alone.

    Raises:
        OfflineError, UserError: see `fetch`.
    """
    files = list(files)
    kinds = [irregular_type(file.cached) for file in files]
    for file, kind in zip(files, kinds, strict=True):
        if kind not in ("", MISSING, DANGLING):
            raise UserError(f"{file.cached}: is {kind}, not a regular file; delete it, it is then fetched again")
    missing = [file for file, kind in zip(files, kinds, strict=True) if kind]
    if is_offline_mode() and missing:
        raise offline([file.repo for file in missing], "HF_HUB_OFFLINE is set")
    _sweep({file.repo for file in missing})
    total = _check_room(missing)
    if missing:
        print(f"fetching {len(missing)} files, {total / 1e9:.2f} GB, into {constants.HF_HUB_CACHE}", flush=True)
    stop = threading.Event()
    with (
        ProgressBar(total=total, unit="B", unit_scale=True, desc="fetching", delay=1) as bar,
        ThreadPool(WORKERS) as pool,  # of daemon threads: Ctrl-C ends the process, not the transfers under way
    ):
        try:
            for _ in pool.imap_unordered(partial(_whole, digests=digests, bar=bar, stop=stop), files):
                pass
        finally:
            stop.set()
            digests.save()


def _sweep(repos: Iterable[Repo]) -> None:
    """Delete what killed processes left half-written; huggingface_hub never looks at it again."""
    for repo in repos:
        for path in (_storage(repo) / "blobs").glob("*.incomplete"):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink(missing_ok=True)


def _check_room(missing: Sequence[HubFile]) -> int:
    """How many bytes are to come; a file that another commit has under the same hash is not among them."""
    blobs = {_storage(file.repo) / "blobs" / file.want: file.size for file in missing}
    need = sum(size for blob, size in blobs.items() if not blob.exists())
    cache = Path(constants.HF_HUB_CACHE).absolute()
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if need > free:
        raise UserError(
            f"HF_HOME: the files need {need / 1e9:.1f} GB, have {free / 1e9:.1f} GB at {cache}; make room, or set "
            f"HF_HOME to a folder on a larger disk"
        )
    return need


def _whole(file: HubFile, digests: Digests, bar: tqdm, stop: threading.Event) -> None:
    """Download a file unless it is there and right; bytes of another hash are fetched once more."""
    if not file.cached.is_file():
        _download(file, bar, stop, again=False)
    if _right(file, digests):
        return
    bar.write(f"{file.cached}: not the bytes the hub names; fetching it again")
    _download(file, bar, stop, again=True)
    if not _right(file, digests):
        # Both the link and what it leads to, or the next reader would find a file.
        file.cached.resolve().unlink(missing_ok=True)
        file.cached.unlink(missing_ok=True)
        raise UserError(
            f"{file.repo.key}: {file.path} of {file.repo.name} arrived twice with other bytes than its hash "
            f"{file.want[:12]}; something between here and {constants.ENDPOINT} changes files"
        )


def _right(file: HubFile, digests: Digests) -> bool:
    if len(file.want) == 64:
        return digests(file.cached)["sha256"] == file.want
    return file.cached.stat().st_size == file.size and git_hash(file.cached.read_bytes()) == file.want


def _download(file: HubFile, bar: tqdm, stop: threading.Event, again: bool) -> None:
    repo = file.repo
    for wait in (*WAITS, None):
        feed = _feed(bar, stop)
        try:
            hf_hub_download(
                repo.name,
                file.path,
                repo_type=repo.kind,
                revision=repo.revision,
                force_download=again,
                tqdm_class=feed,  # type: ignore[arg-type]
            )
            return
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            if wait is None or not _passing(error):
                raise explained(error, repo, file.path) from error
            bar.update(-feed.sent)
            bar.write(f"{file.path}: {brief(error)}; trying again in {wait} s")
            if stop.wait(wait):
                raise _Stopped from error


def _passing(error: Exception) -> bool:
    """Whether another try may help where the client made none, or none that helped."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    return isinstance(error, HTTPError) or "Consistency check" in str(error)


class _Stopped(Exception):
    """Another file has failed, or Ctrl-C."""


def _feed(bar: tqdm, stop: threading.Event) -> Any:
    """What huggingface_hub takes for the progress bar of one file: it hands the bytes on to the one bar of all."""

    class Feed:
        sent = 0

        def __init__(self, *args: Any, **kwargs: Any):
            pass

        def __enter__(self) -> "Feed":
            return self

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise _Stopped
            with bar.get_lock():
                bar.update(n)
            Feed.sent += int(n or 0)

        def ignore(self, *args: Any, **kwargs: Any) -> None:
            pass

        __exit__ = close = set_postfix_str = ignore
        update_transfer = set_transfer_postfix_str = ignore  # having these, it does not open a second bar for Xet

    return Feed
