"""What a run depends on outside params.yaml: this machine, git, DVC's remotes, the hub, W&B.

No token, key or address of a remote leaves this module.
"""

import atexit
import csv
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError, HTTPError

from colintern.core.project import root
from colintern.core.rules import parse_mixture, unsupported_path_characters
from colintern.encoding.page_features import FEATURES_DIR
from colintern.modeling.kernels import get_kernel_repo
from colintern.params import Params, is_on_hub
from colintern.storage.hub import Repo, create_offline_error, to_user_error
from colintern.storage.manifest import MANIFEST

QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
NVIDIA_VENDOR = "0x10de"  # of a PCI device
DISPLAY_CLASS = "0x03"  # prefix of the PCI class of display controllers
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is Arm's
HUB_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class Machine:
    """The hardware and drivers of this machine; sizes in bytes.

    `num_cards` counts NVIDIA GPUs that the PCI bus or the driver lists, whether torch can use them or not. `gpu` is
    what torch would train on, "" for the CPU; `torch_cuda` is the CUDA version that torch was built for, "" for none.
    """

    num_cards: int
    driver: str
    torch: str
    torch_cuda: str
    gpu: str
    gpu_bytes: int
    is_gpu_hidden: bool
    has_bf16: bool
    has_flash_attn: bool
    memory_bytes: int
    disk_bytes: int
    features_bytes: int


def probe_machine() -> Machine:
    """Probe this machine; starts no CUDA context unless torch finds a GPU."""
    has_gpu = torch.cuda.is_available()
    smi_rows = _query_nvidia_smi()
    gpu = torch.cuda.get_device_properties(0) if has_gpu else None
    return Machine(
        num_cards=max(_count_pci_cards(), len(smi_rows), torch.cuda.device_count() if has_gpu else 0),
        driver=smi_rows[0][2] if smi_rows else "",
        torch=torch.__version__,
        torch_cuda=torch.version.cuda or "",
        gpu=gpu.name if gpu else "",
        gpu_bytes=gpu.total_memory if gpu else 0,
        is_gpu_hidden=os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"),
        has_bf16=gpu.major >= 8 if gpu else has_cpu_bf16(Path("/proc/cpuinfo")),
        has_flash_attn=find_spec("flash_attn") is not None,
        memory_bytes=get_available_memory(),
        disk_bytes=shutil.disk_usage(root()).free,
        features_bytes=sum(file.stat().st_size for file in (root() / FEATURES_DIR).rglob("*") if file.is_file()),
    )


def _query_nvidia_smi() -> list[list[str]]:
    """Return name, MiB and driver version of each card that the driver lists; empty without a driver."""
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return list(csv.reader(done.stdout.splitlines(), skipinitialspace=True)) if done.returncode == 0 else []


def _count_pci_cards() -> int:
    devices = Path("/sys/bus/pci/devices").glob("*")  # none where it is not Linux
    kinds = [((device / "vendor").read_text().strip(), (device / "class").read_text()) for device in devices]
    return sum(vendor == NVIDIA_VENDOR and kind.startswith(DISPLAY_CLASS) for vendor, kind in kinds)


def get_available_memory() -> int:
    """Return the bytes of main memory that a new process could have; in a container no more than its limit."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    values = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(values["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(available, int(text)) if text.isdigit() else available


def has_cpu_bf16(cpuinfo: Path) -> bool:
    """Return whether the kernel lists bfloat16 instructions of the CPU."""
    lines = cpuinfo.read_text().lower().splitlines() if cpuinfo.is_file() else []
    flags = {flag for line in lines if line.startswith(("flags", "features")) for flag in line.split()}
    return bool(flags & BF16_FLAGS)


@dataclass(frozen=True)
class Environment:
    """What surrounds a run on this machine.

    `git_error` and `hub_error` are "" or one line with what is wrong; `incomplete_repos` are those of the run's hub
    repositories of which the cache lacks files; with `unsupported_characters` of its path DVC cannot copy the project.
    """

    is_demo: bool
    git_error: str
    commit: str
    num_changed: int
    has_committer: bool
    remotes: tuple[str, ...]
    default_remote: str
    repos: tuple[str, ...]
    incomplete_repos: tuple[str, ...]
    hub_error: str
    has_token: bool
    wandb_variables: tuple[str, ...]
    uses_wandb: bool
    unsupported_characters: str


def probe_environment(params: Params, is_demo: bool) -> Environment:
    """Probe what surrounds a run; the hub is called only for repositories of which the cache lacks files."""
    commit, git_error = _run_git("rev-parse", "--short", "HEAD")
    remotes, default_remote = _list_dvc_remotes()
    repos = list_hub_repos(params)
    incomplete_repos = [repo for repo, files in repos.items() if not _is_cached(repo, files)]
    return Environment(
        is_demo=is_demo,
        git_error=git_error,
        commit=commit,
        num_changed=len(_run_git("status", "--porcelain", "--untracked-files=no")[0].splitlines()),
        has_committer=not _run_git("var", "GIT_COMMITTER_IDENT")[1],
        remotes=remotes,
        default_remote=default_remote,
        repos=tuple(repo.name for repo in repos),
        incomplete_repos=tuple(repo.name for repo in incomplete_repos),
        hub_error=next(filter(None, map(probe_hub, incomplete_repos)), ""),
        has_token=get_token() is not None,
        wandb_variables=tuple(sorted(name for name in os.environ if name.startswith("WANDB_"))),
        uses_wandb=params.tracker == "wandb",
        unsupported_characters=unsupported_path_characters(os.getcwd()),
    )


def _run_git(*arguments: str) -> tuple[str, str]:
    """Return what git prints, and "" or the first line of its error."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return "", "git is not installed"
    if done.returncode:
        return "", done.stderr.strip().partition("\n")[0] or f"git {arguments[0]} failed"
    return done.stdout.rstrip("\n"), ""


def _list_dvc_remotes() -> tuple[tuple[str, ...], str]:
    """Return the names of DVC's remotes, and of the default one."""
    from colorama.initialise import reset_all
    from dvc.config import Config, ConfigError  # here: it takes a while to import

    atexit.unregister(reset_all)  # DVC's import would print an escape sequence at the end, colour or not
    try:
        config = Config.from_cwd()
    except ConfigError:
        return (), ""
    return tuple(config["remote"]), config["core"].get("remote", "")


def list_hub_repos(params: Params) -> dict[Repo, list[str] | None]:
    """Return the run's hub repositories with their files by the manifest; None for files that it does not list."""
    repos = [Repo("base", params.base, params.base_revision, "model")]
    repos += [
        Repo("train_data", name, params.train_revision, "dataset") for name, _ in parse_mixture(params.train_data)
    ]
    repos += [Repo("train_corpus", params.train_corpus, params.train_corpus_revision, "dataset")]
    kernel = get_kernel_repo(params.attention)
    kernels: dict[Repo, list[str] | None] = {kernel: ["build"]} if kernel else {}
    try:
        files, tasks = _read_manifest()
    except (OSError, ValueError, KeyError, TypeError):  # missing, or an older version's, which is written again
        files, tasks = {}, {}
    return {repo: files.get((repo.name, repo.revision)) for repo in repos if is_on_hub(repo.name)} | tasks | kernels


def _read_manifest() -> tuple[dict[tuple[str, str], list[str]], dict[Repo, list[str] | None]]:
    """Return the files of base and training data by (folder, revision), and those of the hub's tasks."""
    manifest = json.loads(Path(MANIFEST).read_text())
    entries = [manifest["base"], *manifest["train"], *filter(None, [manifest["train_corpus"]])]
    tasks: dict[Repo, list[str] | None] = {
        Repo(f"benchmarks: {task}", part["folder"], part["revision"], "dataset"): list(part["files"])
        for task, part in manifest["evaluation"].items()
        if part["revision"]
    }
    return {(entry["folder"], entry["revision"]): list(entry["files"]) for entry in entries}, tasks


def _is_cached(repo: Repo, files: list[str] | None) -> bool:
    return files is not None and all((repo.snapshot_folder / name).exists() for name in files)


def probe_hub(repo: Repo) -> str:
    """Return why the hub would not give `repo` at its commit, with the remedy; "" if it would."""
    if is_offline_mode():
        return str(create_offline_error([repo], "HF_HUB_OFFLINE is set"))
    try:
        HfApi().repo_info(repo.name, revision=repo.revision, repo_type=repo.kind, timeout=HUB_TIMEOUT_SECONDS)
    except (HTTPError, OSError, HFValidationError) as error:
        return str(to_user_error(error, repo))
    return ""
