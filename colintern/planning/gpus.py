"""GPUs by their data sheets, and how long a step's kernels would take on one: a prediction, not a measurement."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from colintern.core.errors import UserError
from colintern.planning.meter import Kernel


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
# Assumed, for want of a GPU to measure on: the shares of the two peak rates that kernels reach, and the seconds the
# host needs to start one.
RATE_SHARE, BANDWIDTH_SHARE, LAUNCH = 0.7, 0.8, 6e-6
ASSUMED = "at 70 % of the data sheet's rate, 80 % of its bandwidth, 6 us a kernel"


def find(name: str) -> str:
    """The name in `GPUS` of a card, whatever case, hyphens and maker: "rtx 5090", "NVIDIA A100-SXM4-80GB".

    Raises:
        UserError: none of that name, or several.
    """
    plain = _plain(name)
    exact = [known for known in GPUS if _plain(known) == plain]
    named = [known for known in GPUS if all(part in plain for part in known.lower().split("-"))]
    begun = [known for known in GPUS if plain and _plain(known).startswith(plain)]
    found = exact or sorted(named, key=len)[-1:] or begun  # the longest: "l4" is in "l40s" too
    if len(found) != 1:
        raise UserError(f"--gpu: {name!r} is {'several' if found else 'none'} of {', '.join(found or GPUS)}")
    return found[0]


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def seconds(kernels: Mapping[Kernel, float], gpu: Gpu) -> float:
    """Predicted time of kernels that run one after another, each as fast as its operations or its bytes allow; no
    less than the host needs to start them."""
    rates = {torch.float32: gpu.fp32, torch.bfloat16: gpu.bf16, torch.float16: gpu.bf16}
    device = sum(
        times
        * max(
            kernel.operations / (rates.get(kernel.dtype, gpu.fp32) * 1e12 * RATE_SHARE),
            kernel.bytes / (gpu.bandwidth * 1e12 * BANDWIDTH_SHARE),
        )
        for kernel, times in kernels.items()
    )
    return max(device, LAUNCH * sum(kernels.values()))
