"""Download and verify files of hub repositories at a commit, in huggingface_hub's own cache (HF_HOME).

`snapshot_download` lists and transfers (Xet or HTTP), sends HF_TOKEN, waits for 429, and resumes dropped connections.
This module adds:

- a hash check of every file: over HTTP it accepts any bytes of the right length;
- retries after a 5xx for a file, a reset connection and a wrong length;
- a check of free disk space from one listing: its `dry_run` sends a request for each file and returns no hash;
- exit on Ctrl-C: it would wait for its threads, which may wait for the network.
"""

import errno
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub import HfApi, RepoFile, constants, get_cached_repo_tree, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils.sha import git_hash

from colintern.core.errors import UserError
from colintern.core.progress import ProgressBar
from colintern.storage.digests import Digests
from colintern.storage.files import DANGLING, MISSING, irregular_type

logger = logging.getLogger(__name__)
RETRY_WAITS_SECONDS = (1, 2, 4, 8)  # after the last one the download fails
STALE_PARTIAL_SECONDS = 3600  # minimum age of a partial file that a killed process has left
RETRYABLE_STATUS_CODES = (500, 502, 503, 504)  # errors of the server, not refusals
REVISION_KEYS = {
    "base": "base_revision", "train_data": "train_revision", "train_corpus": "train_corpus_revision",
}  # fmt: skip


class OfflineError(UserError):
    """The cache lacks a file and the hub cannot be reached; the process exits with 7."""

    exit_code = 7

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class Repo(NamedTuple):
    """A repository at a commit; `key` is what names it for the user, such as "base" or "benchmarks: <task>"."""

    key: str
    name: str
    revision: str
    kind: str  # model, dataset or kernel

    @property
    def cache_folder(self) -> Path:
        """Return the repository's folder in the hub's cache."""
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type=self.kind)

    @property
    def snapshot_folder(self) -> Path:
        """Return the folder of the files at this commit in the hub's cache; it need not exist."""
        return self.cache_folder / "snapshots" / self.revision


# Selects files of a repository: by their suffixes, of which the first one must occur; or by a function of all paths.
FileSelector = tuple[str, ...] | Callable[[Repo, list[str]], list[str]]


class HubFile(NamedTuple):
    """A file of a repository; `hash` is the sha256 of its bytes or, of a file outside LFS, its git hash (40 hex)."""

    repo: Repo
    path: str
    size: int
    hash: str

    @property
    def has_sha256(self) -> bool:
        """Return whether the hash is a sha256, not a git hash."""
        return len(self.hash) == 64

    @property
    def cached(self) -> Path:
        """Return the path in the hub's cache; it need not exist."""
        return self.repo.snapshot_folder / self.path


def enable_offline_mode() -> None:
    """Keep the rest of this process off the hub: all it needs is in the cache.

    Otherwise transformers requests every optional file of a repository; without a network each of these 17 requests
    takes 23 seconds to fail.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # for child processes and later imports
    constants.HF_HUB_OFFLINE = True


def download_repos(wanted: Sequence[tuple[Repo, FileSelector]], digests: Digests) -> list[list[HubFile]]:
    """Download the selected files of each repository that the cache lacks, and verify all of them.

    Raises:
        OfflineError: the hub cannot be reached and the cache lacks something.
        UserError: an unknown, private or gated repository, an unknown revision, nothing to select, too little disk
            space, or a file that arrives wrong twice.
    """
    selected: list[list[HubFile]] = []
    for repo, selector in wanted:
        try:
            selected.append(_select_files(repo, selector))
        except OfflineError as error:
            raise create_offline_error(
                [repo for repo, _ in wanted if not _read_cached_tree(repo)], error.reason
            ) from error
    ensure_downloaded([file for files in selected for file in files], digests)
    return selected


def download_file(repo: Repo, path: str, digests: Digests) -> Path:
    """Return the path of one file in the cache; download and verify it first if it is missing."""
    cached = repo.snapshot_folder / path
    if not cached.is_file():
        ensure_downloaded(_select_files(repo, lambda _, paths: [name for name in paths if name == path]), digests)
    if not cached.is_file():
        raise UserError(f"{repo.key}: {repo.name!r} at {repo.revision} holds no {path}")
    return cached


def escapes_root(path: str) -> bool:
    """Return whether a path that should be below a folder may lead out of it."""
    return PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts


def _read_cached_tree(repo: Repo) -> list[RepoFile]:
    """Return the files of a repository if the cache has its listing, else []."""
    try:
        return get_cached_repo_tree(repo.name, repo_type=repo.kind, revision=repo.revision)
    except CachedRepoTreeNotFoundError:
        return []


def _list_files(repo: Repo) -> dict[str, RepoFile]:
    """Return the files of a repository by path; requests the listing only if the cache lacks it."""
    tree = _read_cached_tree(repo)
    if not tree:
        try:
            listed = HfApi().list_repo_tree(repo.name, recursive=True, revision=repo.revision, repo_type=repo.kind)
            tree = [entry for entry in listed if isinstance(entry, RepoFile)]
        except (HTTPError, OSError, HFValidationError) as error:
            raise to_user_error(error, repo) from error
    return {entry.path: entry for entry in tree}


def _select_files(repo: Repo, selector: FileSelector) -> list[HubFile]:
    entries = _list_files(repo)
    if isinstance(selector, tuple):
        paths = [path for path in sorted(entries) if PurePosixPath(path).suffix in selector]
        if not any(path.endswith(selector[0]) for path in paths):
            raise UserError(f"{repo.key}: {repo.name!r} at {repo.revision} holds no *{selector[0]}")
    else:
        paths = selector(repo, sorted(entries))
    for path in paths:
        if escapes_root(path):
            raise UserError(f"{repo.key}: {repo.name!r} at {repo.revision} names a file outside itself, {path!r}")
    hashes = {path: entry.lfs.sha256 if entry.lfs else entry.blob_id for path, entry in entries.items()}
    return [HubFile(repo, path, entries[path].size, hashes[path]) for path in paths]


def ensure_downloaded(files: Sequence[HubFile], digests: Digests) -> None:
    """Download the files that the cache lacks, and verify the hash of every file."""
    kinds = [irregular_type(file.cached) for file in files]
    for file, kind in zip(files, kinds, strict=True):
        if kind not in ("", MISSING, DANGLING):
            raise UserError(f"{file.cached}: is {kind}, not a regular file; delete it, it is then fetched again")
    missing = [file for file, kind in zip(files, kinds, strict=True) if kind]
    if is_offline_mode() and missing:
        raise create_offline_error([file.repo for file in missing], "HF_HUB_OFFLINE is set")
    remove_stale_partials({file.repo for file in missing})
    total = _check_disk_space(missing)
    if missing:
        logger.info(f"fetching {len(missing)} files, {total / 1e9:.2f} GB, into {constants.HF_HUB_CACHE}")
    _download_files(missing)
    wrong = _list_wrong_files(files, digests)
    for file in wrong:
        logger.info(f"{file.cached}: not the bytes the hub names; fetching it again")
    _download_files(wrong, force=True)
    for file in _list_wrong_files(wrong, digests):
        # Both the link and its target, or the next reader would find a file.
        file.cached.resolve().unlink(missing_ok=True)
        file.cached.unlink(missing_ok=True)
        raise UserError(
            f"{file.repo.key}: {file.path} of {file.repo.name} arrived twice with other bytes than its hash "
            f"{file.hash[:12]}; something between here and {constants.ENDPOINT} changes files"
        )


def remove_stale_partials(repos: Iterable[Repo]) -> None:
    """Delete the partial files of killed processes; huggingface_hub does not read them again."""
    for repo in repos:
        for path in (repo.cache_folder / "blobs").glob("*.incomplete"):
            if time.time() - path.stat().st_mtime > STALE_PARTIAL_SECONDS:
                path.unlink(missing_ok=True)


def _check_disk_space(missing: Sequence[HubFile]) -> int:
    """Return the number of bytes to download; a file that another commit has with the same hash is not counted."""
    blobs = {file.repo.cache_folder / "blobs" / file.hash: file.size for file in missing}
    need = sum(size for blob, size in blobs.items() if not blob.exists())
    cache = Path(constants.HF_HUB_CACHE).absolute()
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if need > free:
        raise UserError(
            f"HF_HOME: the files need {need / 1e9:.1f} GB, have {free / 1e9:.1f} GB at {cache}; make room, or set "
            f"HF_HOME to a folder on a larger disk"
        )
    return need


def _list_wrong_files(files: Sequence[HubFile], digests: Digests) -> list[HubFile]:
    digests.hash_files([file.cached for file in files if file.has_sha256])  # in parallel
    return [file for file in files if not hash_matches(file, digests)]


def hash_matches(file: HubFile, digests: Digests) -> bool:
    """Return whether the cached bytes have the hash that the hub lists."""
    if file.has_sha256:
        return digests(file.cached)["sha256"] == file.hash
    return file.cached.stat().st_size == file.size and git_hash(file.cached.read_bytes()) == file.hash


def _download_files(files: Sequence[HubFile], force: bool = False) -> None:
    """Download files, repository by repository, with huggingface_hub's progress bars."""
    for repo in dict.fromkeys(file.repo for file in files):
        listed = _list_files(repo)
        paths = [file.path for file in files if file.repo == repo]
        for path in paths:
            if path not in listed:
                raise UserError(
                    f"{repo.key}: {repo.name!r} has no file {path} at {repo.revision}; run: dvc repro -f fetch-data"
                )
        for wait in (*RETRY_WAITS_SECONDS, None):
            try:
                with _end_on_ctrl_c():
                    snapshot_download(
                        repo.name, repo_type=repo.kind, revision=repo.revision, force_download=force,
                        allow_patterns=list(map(escape, paths)), tqdm_class=ProgressBar,
                    )  # fmt: skip
                break
            except (HTTPError, OSError, ValueError, RuntimeError) as error:
                if wait is None or not is_retryable(error):
                    raise to_user_error(error, repo) from error
                logger.info(f"{repo.name}: {describe_hub_error(error)}; trying again in {wait} s")
                time.sleep(wait)


@contextmanager
def _end_on_ctrl_c() -> Iterator[None]:
    """Let SIGINT end the process in the block, instead of KeyboardInterrupt, which waits for threads."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def is_retryable(error: Exception) -> bool:
    """Return whether another try may help after an error that huggingface_hub does not retry."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in RETRYABLE_STATUS_CODES
    return isinstance(error, HTTPError) or "Consistency check" in str(error)


def to_user_error(error: Exception, repo: Repo) -> UserError:
    """Translate what huggingface_hub raised when it listed or downloaded `repo`.

    The message names the key of params.yaml and the remedy. It shows no request, whose headers hold the token.
    """
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return to_user_error(error.__cause__, repo)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    what = f"{repo.key}: {repo.name!r}"
    page = f"{constants.ENDPOINT}/{'' if repo.kind == 'model' else repo.kind + 's/'}{repo.name}"
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{what} is gated: open {page} and accept its terms, then set HF_TOKEN to a token of that account "
            f"(made at {constants.ENDPOINT}/settings/tokens)"
        )
    if isinstance(error, RevisionNotFoundError):
        key = REVISION_KEYS.get(repo.key, repo.key)
        return UserError(f"{key}: {repo.revision!r} is no commit of {repo.name}; see {page}/commits/main")
    if status in (401, 403, 404) or isinstance(error, HFValidationError):
        return UserError(
            f"{what} is not a {repo.kind} on the hub, or is private: check the name at {page}; for a private one set "
            f"HF_TOKEN to a token that may read it (one that is set and refused looks the same)"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"HF_HOME: the disk of {constants.HF_HUB_CACHE} is full; downloaded files are kept")
    is_unreachable = status is None or status in (408, 429, *RETRYABLE_STATUS_CODES)
    if isinstance(error, HTTPError | OfflineModeIsEnabled | RuntimeError) and is_unreachable:  # RuntimeError: hf_xet's
        return create_offline_error([repo], describe_hub_error(error))
    return UserError(f"{what}: {describe_hub_error(error)}")


def describe_hub_error(error: Exception) -> str:
    """Describe an error in one line, without the address of an HTTP error, which may be signed."""
    if isinstance(error, HfHubHTTPError):
        return f"HTTP {error.response.status_code}"
    return str(error).partition("\n")[0] or type(error).__name__


def create_offline_error(repos: Iterable[Repo], reason: str) -> OfflineError:
    """Return the error that names the commands to fill the cache where there is a network."""
    commands = [
        f"hf download {repo.name} --revision {repo.revision}" + f" --repo-type {repo.kind}" * (repo.kind != "model")
        for repo in dict.fromkeys(repos)
    ]
    return OfflineError(
        f"{constants.ENDPOINT} cannot be reached ({reason}) and {constants.HF_HUB_CACHE} lacks files; where there is a "
        "network, with the same HF_HOME, run: dvc repro -f fetch-data\n  or: " + "\n  or: ".join(commands),
        reason,
    )
