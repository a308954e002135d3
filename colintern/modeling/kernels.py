"""Prebuilt attention kernels of the hub: the package `kernels` selects, downloads and imports the build that fits."""

from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import HFValidationError, HTTPError

from colintern.core.errors import UserError
from colintern.core.rules import split_kernel
from colintern.storage.hub import Repo, create_offline_error, to_user_error

T = TypeVar("T")


def get_kernel_repo(attention: str) -> Repo | None:
    """Return the kernel repository that `attention` of params.yaml names; None if it names none."""
    kernel = split_kernel(attention)
    return Repo("attention", *kernel, "kernel") if kernel else None


def download_kernel(repo: Repo) -> None:
    """Download the build of a kernel for this machine; nothing of it is imported.

    Raises:
        UserError: no build fits.
        OfflineError: the hub cannot be reached, and the cache lacks the kernel.
    """
    if is_offline_mode():
        require_downloaded(repo)
        return
    from kernels import install_kernel  # here, because it imports torch

    _call_kernels(lambda: install_kernel(repo.name, revision=repo.revision, trust_remote_code=[repo.name]), repo)


def require_downloaded(repo: Repo) -> None:
    """Raise OfflineError if the cache has no build of the kernel."""
    if not (repo.snapshot_folder / "build").is_dir():
        raise create_offline_error([repo], f"{repo.name} is not downloaded")


def import_kernel(repo: Repo) -> Callable[..., object]:
    """Import a kernel and return its `flash_attn_func`, which flash-attn 2 and 3 and the kernels made from them have.

    Its folder is given, because by name the package refuses, without the hub, a repository with one build in the cache.

    Raises:
        UserError: it does not fit this machine, cannot be imported, or has no such function.
        OfflineError: the cache lacks it.
    """
    require_downloaded(repo)
    from kernels import get_local_kernel

    module = _call_kernels(lambda: get_local_kernel(repo.snapshot_folder), repo)
    function = getattr(module, "flash_attn_func", None)
    if not callable(function):
        raise UserError(f"attention: {repo.name} at {repo.revision} has no flash_attn_func; it is no attention kernel")
    return function


def _call_kernels(call: Callable[[], T], repo: Repo) -> T:
    try:
        return call()
    except (HTTPError, HFValidationError) as error:
        raise to_user_error(error, repo) from error
    except Exception as error:  # foreign code may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"attention: the kernel {repo.name} at {repo.revision} cannot be used: {reason}") from error
