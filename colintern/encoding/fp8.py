"""Page features in eight bits: groups of 64 values, each e4m3 (float8_e4m3fn), with a scale per group in bfloat16.

Half the size of bfloat16 for a relative error of some 3 %, which is stored with each tensor. The format is that of the
OCP 8-bit floating point specification (2023): 3 bits of mantissa, largest value 448, no infinity.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GROUP_SIZE = 64
MAX_FP8 = torch.finfo(torch.float8_e4m3fn).max
HEADER_BYTES = 20  # three int32 for the shape, two float32 for `QuantizationError`


class QuantizationError(NamedTuple):
    """Sums of squares over a tensor: of the rounding errors, and of its values."""

    error: float
    values: float


def quantize_fp8(value: Tensor) -> Tensor:
    """Convert (tiles, tokens, hidden) floats, hidden a multiple of 64, to uint8 (20 + 66/64 of their number,)."""
    groups = value.detach().float().reshape(-1, GROUP_SIZE)
    scale = (groups.abs().amax(1, keepdim=True) / MAX_FP8).to(torch.bfloat16)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    # A scale that bfloat16 rounded down leaves values above the largest, which would become NaN.
    codes = (groups / scale.float()).clamp(-MAX_FP8, MAX_FP8).to(torch.float8_e4m3fn)
    restored = (codes.float() * scale.float()).to(value.dtype).float()
    sums = torch.stack([(groups - restored).square().sum(), groups.square().sum()])
    shape = torch.tensor(value.shape, dtype=torch.int32, device=value.device)
    parts = (shape, sums, codes, scale)
    return torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts])


def dequantize_fp8(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert the output of `quantize_fp8` back to a tensor of the original shape and `dtype`."""
    shape = packed[:12].view(torch.int32).tolist()
    end = HEADER_BYTES + shape[0] * shape[1] * shape[2]
    codes = packed[HEADER_BYTES:end].view(torch.float8_e4m3fn).float().view(-1, GROUP_SIZE)
    scale = packed[end:].clone().view(torch.bfloat16).float()[:, None]
    return (codes * scale).to(dtype).view(shape)


def read_quantization_error(packed: Tensor) -> QuantizationError:
    """Return the error of rounding that `quantize_fp8` stored."""
    return QuantizationError(*packed[12:HEADER_BYTES].clone().view(torch.float32).tolist())


def fake_quantize(value: Tensor) -> Tensor:
    """Round a tensor as `quantize_fp8` does, in its own type."""
    return dequantize_fp8(quantize_fp8(value), value.dtype)
