"""`deterministic`: the same bits from run to run on a GPU, where some kernels add as threads come."""

import os

import torch
from torch.utils import deterministic

# Read when cuBLAS and flash-attn are first used. NVIDIA: 8 buffers of 4 MiB give the same bits on all streams.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}


def set_deterministic(on: bool) -> None:
    """Take only kernels that give the same bits each time, or whatever is fastest; before the GPU is used.

    A kernel that has no such form raises a RuntimeError that names it, in the first step.
    """
    for name, value in ENVIRONMENT.items():
        if on:
            os.environ[name] = value
        elif os.environ.get(name) == value:
            del os.environ[name]
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = False
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # finds faults, costs a pass over each new tensor
