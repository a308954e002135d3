"""Prebuilt kernels of the hub: which of a repository's builds fit, and how one is imported from checked files.

A repository holds a build for each version of torch, its CUDA and a kind of processor, hundreds of megabytes each, and
what they hold is run as it is. The lock fixes torch and its CUDA on every machine; the processor of the machine that
will train may be another than here. So the builds for the locked torch are fetched, one for each kind of processor, and
the manifest does not depend on where that was done. No file is imported from the hub's cache: compiled copies that
others left there would be run unseen. It is imported from a new folder of links to files whose hashes were just taken.
"""

import atexit
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from platform import machine
from types import ModuleType
from typing import Any, NamedTuple

from colintern.core.errors import UserError
from colintern.storage.hub_errors import Repo

BYTECODE = (".pyc", ".pyo")


class Build(NamedTuple):
    """A build's folder, such as torch213-cxx11-cu130-x86_64-linux, and what its metadata.json says."""

    folder: Path
    metadata: Any

    @property
    def on_gpu(self) -> bool:
        return str(self.metadata.backend.backend_type) != "cpu"


def fitting(repo: Repo, paths: list[str]) -> list[str]:
    """Of a kernel repository's files those of the builds for the torch that is installed, one a kind of processor.

    Raises:
        UserError: there is no such build, or the package `kernels` is missing.
    """
    names = _builds(paths)
    chosen = {best for cpu in _processors(names) if (best := _best(names, cpu))}
    if not chosen:
        raise UserError(f"{repo.key}: {repo.name!r} at {repo.revision} has {_lack(names)}")
    kept = [path for path in paths if not path.endswith(BYTECODE)]
    return [path for path in kept if PurePosixPath(path).parts[:2] in {("build", name) for name in chosen}]


def build_here(key: str, folder: Path, paths: Iterable[str]) -> Build:
    """The build for this machine among a kernel's files in `folder`; nothing of it is imported.

    Raises:
        UserError: there is none, it needs other kernels, or the package `kernels` is missing.
    """
    names = _builds(paths)
    best = _best(names, machine())
    if best is None:
        raise UserError(f"{key}: of the kernel's builds that were fetched there is {_lack(names)}")
    from kernels import Metadata

    place = folder / "build" / best
    try:
        metadata = Metadata.read_from_file(place / "metadata.json")
    except ValueError as error:
        raise UserError(f"{key}: {place / 'metadata.json'}: cannot be read: {error}") from error
    if others := [other.repo_id for other in metadata.kernel_depends]:
        raise UserError(f"{key}: the kernel needs others, {', '.join(others)}, which no revision of ours pins")
    return Build(place, metadata)


def unfit(build: Build, dtype: str) -> str:
    """What a build needs that this machine or `dtype` lacks, in words, "" if nothing."""
    import torch  # here and below, because it takes longer to import than the rest of fetch-data
    from kernels.validate import ArchValidator, DependencyValidator, MinverValidator

    if build.on_gpu and not torch.cuda.is_available():
        return "needs a GPU"
    if build.on_gpu and dtype == "float32":
        return "needs dtype: bfloat16"
    for validator in (DependencyValidator(), MinverValidator(), ArchValidator()):
        try:
            validator.validate_metadata(metadata=build.metadata, variant=build.folder.name)
        except (ImportError, RuntimeError, ValueError) as error:
            return f"cannot be used: {str(error).partition('. ')[0]}"
    return ""


def imported(key: str, folder: Path, build: str, paths: Iterable[str]) -> ModuleType:
    """The kernel's module, from links to those files of `folder` that are named, and nothing beside them.

    Raises:
        UserError: its import fails.
    """
    from kernels import get_local_kernel

    alone = Path(tempfile.mkdtemp(prefix="colintern-kernel-"))
    atexit.register(shutil.rmtree, alone, ignore_errors=True)  # it may import more of itself as long as we run
    for path in paths:
        if PurePosixPath(path).parts[1] == build:
            (alone / path).parent.mkdir(parents=True, exist_ok=True)
            (alone / path).symlink_to((folder / path).resolve())
    try:
        return get_local_kernel(alone)
    except Exception as error:  # whatever foreign code raises
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{key}: {folder / 'build' / build} cannot be imported: {what}") from error


def _builds(paths: Iterable[str]) -> list[str]:
    parts = [PurePosixPath(path).parts for path in paths]
    return sorted({names[1] for names in parts if len(names) > 2 and names[0] == "build"})


def _parsed(names: Iterable[str]) -> dict[str, Any]:
    if find_spec("kernels") is None:
        raise UserError("attention: a kernel needs the package kernels, which is in requirements.txt: make env")
    from kernels.variants import parse_variant

    found = {}
    for name in names:
        try:
            found[name] = parse_variant(name)
        except ValueError:  # of another framework
            continue
    return found


def _processors(names: Iterable[str]) -> set[str]:
    archs = [getattr(variant.arch, "platform", None) for variant in _parsed(names).values()]
    return {machine(), *filter(None, archs)}


def _best(names: Iterable[str], cpu: str) -> str | None:
    """The build that would be the best one here were this machine's processor a `cpu`."""
    variants = {}
    for name, variant in _parsed(names).items():
        if getattr(variant.arch, "platform", cpu) == cpu:
            arch = replace(variant.arch, platform=machine()) if hasattr(variant.arch, "platform") else variant.arch
            variants[replace(variant, arch=arch)] = name
    from kernels.variants import resolve_variant

    best, _ = resolve_variant(list(variants))
    return variants[best] if best else None


def _lack(names: list[str]) -> str:
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return (
        f"none for torch {torch.__version__.partition('+')[0]} with {cuda} on {machine()}; there are: "
        f"{', '.join(names) or 'none'}"
    )
