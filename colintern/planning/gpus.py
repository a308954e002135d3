"""Data sheets of GPUs, and the predicted time of a step on one of them."""

from contextlib import suppress
from typing import NamedTuple

import torch

from colintern.core.errors import UserError


class Gpu(NamedTuple):
    """Memory in GiB; dense rates in 1e12 operations a second, bf16 with sums in float32; 1e12 bytes a second."""

    memory: int
    bf16: float
    fp32: float
    bandwidth: float
    source: str


# NVIDIA's data sheets and, for GeForce, the architecture white papers, as public pages quote them: the sheets were not
# at hand. Where the rate is given with sparsity, half of it. float32 is the rate without TF32, which torch leaves off
# for matrix products.
GPUS = {
    "RTX-4080": Gpu(16, 97.5, 48.7, 0.717, "Ada white paper"),
    "RTX-4090": Gpu(24, 165.2, 82.6, 1.008, "Ada white paper"),
    "RTX-5090": Gpu(32, 209.5, 104.8, 1.792, "RTX Blackwell white paper"),
    "L4": Gpu(24, 121.0, 30.3, 0.300, "L4 data sheet"),
    "L40S": Gpu(48, 362.0, 91.6, 0.864, "L40S data sheet"),
    "A100-40GB": Gpu(40, 312.0, 19.5, 1.555, "A100 data sheet, SXM"),
    "A100-80GB": Gpu(80, 312.0, 19.5, 2.039, "A100 data sheet, SXM"),
    "H100": Gpu(80, 989.4, 66.9, 3.35, "H100 data sheet, SXM"),
    "H200": Gpu(141, 989.4, 66.9, 4.8, "H200 data sheet"),
}
# Not measured: the shares of the two peak rates that kernels reach, and the seconds that the host needs to launch one.
# `colintern recommend --probe` measures the result.
RATE_SHARE, BANDWIDTH_SHARE, LAUNCH_SECONDS = 0.7, 0.8, 6e-6
ASSUMED = "at 70 % of the data sheet's rate, 80 % of its bandwidth, 6 us a kernel"


def find_gpu(name: str) -> str:
    """Return the key of `GPUS` for a name in any case, with or without hyphens and maker, or raise UserError."""
    plain = _strip_punctuation(name)
    exact = [known for known in GPUS if _strip_punctuation(known) == plain]
    named = [known for known in GPUS if all(part in plain for part in known.lower().split("-"))]
    begun = [known for known in GPUS if plain and _strip_punctuation(known).startswith(plain)]
    matches = exact or sorted(named, key=len)[-1:] or begun  # the longest: "l4" is in "l40s" too
    if len(matches) != 1:
        raise UserError(f"--gpu: {name!r} is {'several' if matches else 'none'} of {', '.join(matches or GPUS)}")
    return matches[0]


def _strip_punctuation(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def find_local_gpu() -> str | None:
    """Return the key of `GPUS` of the CUDA device here; None if there is none, or none with a known data sheet."""
    with suppress(UserError):
        return find_gpu(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None
    return None


def find_nearest_gpu(gpu_memory_gb: float) -> Gpu:
    """Return the GPU whose memory is nearest, to rank plans by where none is named."""
    return min(GPUS.values(), key=lambda gpu: abs(gpu.memory - gpu_memory_gb))


def predict_seconds(
    gpu: Gpu, dtype: torch.dtype, operations: float, traffic_bytes: float = 0.0, kernels: float = 0.0
) -> float:
    """Predict the time of matrix products and of the memory traffic beside them; at least that of the launches."""
    rate = gpu.fp32 if dtype == torch.float32 else gpu.bf16
    seconds = operations / (rate * 1e12 * RATE_SHARE) + traffic_bytes / (gpu.bandwidth * 1e12 * BANDWIDTH_SHARE)
    return max(seconds, LAUNCH_SECONDS * kernels)
