"""Prebuilt attention kernels of the hub. The `kernels` package selects the build for this machine and imports it.

A repository has a build for each version of torch, of CUDA and kind of processor, hundreds of megabytes each. Only the
one for this machine is downloaded. A kernel is imported from a new folder of links to files whose hashes were just
checked, not from the hub's cache, which may also hold compiled copies of its modules.
"""

import atexit
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from colintern.core.errors import UserError
from colintern.storage.hub import Repo

if TYPE_CHECKING:
    from kernels.resolver import LocalKernel


def select_build_files(repo: Repo, paths: list[str]) -> list[str]:
    """Select the files of the build for this machine from the paths of a kernel repository.

    Raises:
        UserError: there is no such build, or the package `kernels` is missing.
    """
    _require_kernels()
    from kernels.variants import parse_variant, resolve_variant, variants_trace_str

    variants = []
    for name in sorted({path.split("/")[1] for path in paths if path.startswith("build/") and path.count("/") > 1}):
        with suppress(ValueError):  # of another framework
            variants.append(parse_variant(name))
    best, trace = resolve_variant(variants)
    if best is None:
        reasons = variants_trace_str(trace).replace("\n", "; ") or "none at all"
        raise UserError(f"{repo.key}: {repo.name!r} at {repo.revision} has no build for this machine: {reasons}")
    chosen = [path for path in paths if path.startswith(f"build/{best.variant_str}/")]
    return [path for path in chosen if not path.endswith((".pyc", ".pyo"))]


def find_build(key: str, folder: Path) -> "LocalKernel":
    """Find the build for this machine in the folder of a kernel repository; nothing of it is imported.

    Raises:
        UserError: no build fits, its metadata.json is damaged, it needs other kernels, or `kernels` is missing.
    """
    _require_kernels()
    from kernels.resolver import resolve_local_kernel

    try:
        build = resolve_local_kernel(folder, backend=None)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: the kernel cannot be used: {' '.join(str(error).split())}") from error
    if others := [other.repo_id for other in build.metadata.kernel_depends]:
        raise UserError(f"{key}: the kernel needs others, {', '.join(others)}, which no revision of ours pins")
    return build


def find_unmet_need(build: "LocalKernel", dtype: str) -> str:
    """Describe what a build needs that this machine or `dtype` lacks; "" if nothing."""
    import torch  # here, because it takes longer to import than the rest of fetch-data
    from kernels.validate import AllValidator, ArchValidator, default_metadata_validators

    if str(build.metadata.backend.backend_type) != "cpu":
        if not torch.cuda.is_available():
            return "needs a GPU"
        if dtype == "float32":
            return "needs dtype: bfloat16"
    try:
        validator = AllValidator([*default_metadata_validators(), ArchValidator()])
        validator.validate_metadata(metadata=build.metadata, variant=build.variant_str)
    except (ImportError, RuntimeError, ValueError) as error:
        return f"cannot be used: {str(error).partition('. ')[0]}"
    return ""


def import_kernel(key: str, folder: Path, paths: Iterable[str]) -> ModuleType:
    """Import a kernel from links to the named files of `folder`, and nothing beside them.

    Raises:
        UserError: its import fails.
    """
    from kernels import get_local_kernel

    links = Path(tempfile.mkdtemp(prefix="colintern-kernel-"))
    atexit.register(shutil.rmtree, links, ignore_errors=True)  # the kernel may import more of itself later
    for path in paths:
        (links / path).parent.mkdir(parents=True, exist_ok=True)
        (links / path).symlink_to((folder / path).resolve())
    try:
        return get_local_kernel(links)
    except Exception as error:  # foreign code may raise anything
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{key}: the kernel in {folder / 'build'} cannot be imported: {what}") from error


def _require_kernels() -> None:
    if find_spec("kernels") is None:
        raise UserError("attention: a kernel needs the package kernels, which is in requirements.txt: make env")
