"""What this machine has that training depends on, asked of the machine itself."""

import csv
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from colintern.core.project import root
from colintern.encoding.page_features import FEATURES_DIR

QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
NVIDIA = "0x10de"  # PCI vendor
DISPLAY = "0x03"  # PCI class: display controllers
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is Arm's


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes. `cards`: NVIDIA GPUs the PCI bus or the driver shows, whether torch can use them or not; `gpu`:
    what torch would train on, "" for the CPU; `gpu_bytes` its memory; `bf16`: whether that, or the CPU, has bfloat16
    arithmetic; `hidden`: CUDA_VISIBLE_DEVICES names no device."""

    cards: int
    driver: str
    torch: str
    torch_cuda: str
    gpu: str
    gpu_bytes: int
    hidden: bool
    bf16: bool
    flash_attn: bool
    memory_bytes: int
    disk_bytes: int
    features_bytes: int


def machine() -> Machine:
    """This machine, as training would find it; starts no CUDA context unless torch finds a GPU."""
    usable = torch.cuda.is_available()
    smi = _nvidia_smi()
    gpu = torch.cuda.get_device_properties(0) if usable else None
    return Machine(
        cards=max(_pci_cards(), len(smi), torch.cuda.device_count() if usable else 0),
        driver=smi[0][2] if smi else "",
        torch=torch.__version__,
        torch_cuda=torch.version.cuda or "",
        gpu=gpu.name if gpu else "",
        gpu_bytes=gpu.total_memory if gpu else 0,
        hidden=os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"),
        bf16=gpu.major >= 8 if gpu else cpu_bf16(Path("/proc/cpuinfo")),
        flash_attn=find_spec("flash_attn") is not None,
        memory_bytes=_memory(),
        disk_bytes=shutil.disk_usage(root()).free,
        features_bytes=sum(file.stat().st_size for file in (root() / FEATURES_DIR).rglob("*") if file.is_file()),
    )


def _nvidia_smi() -> list[list[str]]:
    """Name, MiB and driver version of each card that the driver shows; empty without a driver."""
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return list(csv.reader(done.stdout.splitlines(), skipinitialspace=True)) if done.returncode == 0 else []


def _pci_cards(bus: Path = Path("/sys/bus/pci/devices")) -> int:
    def says(device: Path, name: str) -> str:
        try:
            return (device / name).read_text().strip()
        except OSError:
            return ""

    devices = bus.glob("*") if platform.system() == "Linux" else []
    return sum(says(d, "vendor") == NVIDIA and says(d, "class").startswith(DISPLAY) for d in devices)


def _memory() -> int:
    """Bytes of main memory that a new process could have, in a container no more than the container may."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(rows["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(free, int(text)) if text.isdigit() else free


def cpu_bf16(cpuinfo: Path) -> bool:
    """Whether the CPU has bfloat16 instructions, as far as the kernel says."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    return bool(flags & BF16_FLAGS)
