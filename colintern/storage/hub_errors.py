"""What goes wrong at the hub, in the words of params.yaml: which key is to blame, and what the user can do.

No message shows a request, because its headers hold the token.
"""

import errno
from collections.abc import Iterable
from typing import NamedTuple

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)

from colintern.core.errors import UserError

PASSING = (500, 502, 503, 504)  # answers of a server that is in trouble, not of one that refuses
REVISION_KEYS = {
    "base": "base_revision", "train_data": "train_revision", "train_corpus": "train_corpus_revision",
}  # fmt: skip


class OfflineError(UserError):
    """What is needed is not in the cache and the hub cannot be reached; the process exits with 7."""

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


def explained(error: Exception, repo: Repo, path: str = "") -> UserError:
    """The error for the user of what huggingface_hub raised when it listed `repo`, or fetched its file `path`."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return explained(error.__cause__, repo, path)  # the client's words for: asked, and got this
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
    if isinstance(error, RemoteEntryNotFoundError):
        return UserError(f"{what} has no file {path} at {repo.revision}; run: dvc repro -f fetch-data")
    if status in (401, 403, 404) or isinstance(error, HFValidationError):
        return UserError(
            f"{what} is not a {repo.kind} on the hub, or is private: check the name at {page}; for a private one set "
            f"HF_TOKEN to a token that may read it (one that is set and refused looks the same)"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"HF_HOME: the disk of {constants.HF_HUB_CACHE} is full; what is there already is kept")
    unreachable = status is None or status in (408, 429, *PASSING)
    if isinstance(error, HTTPError | OfflineModeIsEnabled | RuntimeError) and unreachable:  # RuntimeError: hf_xet's
        return offline([repo], brief(error))
    return UserError(f"{what}: {path}: {brief(error)}")


def brief(error: Exception) -> str:
    """One line; without the address of an HTTP error, which may be signed."""
    if isinstance(error, HfHubHTTPError):
        return f"HTTP {error.response.status_code}"
    return str(error).partition("\n")[0] or type(error).__name__


def offline(repos: Iterable[Repo], reason: str) -> OfflineError:
    """The error that names the commands which fill the cache where there is a network."""
    commands = [
        f"hf download {repo.name} --revision {repo.revision}" + f" --repo-type {repo.kind}" * (repo.kind != "model")
        for repo in dict.fromkeys(repos)
    ]
    return OfflineError(
        f"{constants.ENDPOINT} cannot be reached ({reason}) and {constants.HF_HUB_CACHE} lacks files; where there is a "
        "network, with the same HF_HOME, run: dvc repro -f fetch-data\n  or: " + "\n  or: ".join(commands),
        reason,
    )
