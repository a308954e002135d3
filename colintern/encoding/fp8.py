"""Page features in eight bits: groups of 64 values, each e4m3 (float8_e4m3fn), with a scale of its own in bfloat16.

Half the room of bfloat16, for a relative error of some 3 %, which each tensor carries with it. The format is that of
the OCP 8-bit floating point specification (2023): 3 bits of mantissa, largest value 448, no infinity.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 64
LARGEST = torch.finfo(torch.float8_e4m3fn).max
HEAD = 20  # bytes: three int32 of the shape, two float32: sums of the squares of error and value


class Error(NamedTuple):
    """Sums of squares over a tensor: of what rounding changed, and of its values."""

    changed: float
    values: float


def pack(value: Tensor) -> Tensor:
    """(tiles, tokens, hidden) floats, hidden a multiple of 64, to uint8 (20 + 66/64 of their number,)."""
    groups = value.detach().float().reshape(-1, GROUP)
    scale = (groups.abs().amax(1, keepdim=True) / LARGEST).to(torch.bfloat16)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    # A scale that bfloat16 rounded down leaves values above the largest, which would become NaN.
    small = (groups / scale.float()).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    back = (small.float() * scale.float()).to(value.dtype).float()
    sums = torch.stack([(groups - back).square().sum(), groups.square().sum()])
    shape = torch.tensor(value.shape, dtype=torch.int32, device=value.device)
    parts = (shape, sums, small, scale)
    return torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts])


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """What `pack` made of a tensor of that dtype, as such a tensor again."""
    shape = packed[:12].view(torch.int32).tolist()
    many = shape[0] * shape[1] * shape[2]
    small = packed[HEAD : HEAD + many].view(torch.float8_e4m3fn).float().view(-1, GROUP)
    scale = packed[HEAD + many :].clone().view(torch.bfloat16).float()[:, None]
    return (small * scale).to(dtype).view(shape)


def error(packed: Tensor) -> Error:
    """What rounding changed in a tensor that `pack` has made."""
    return Error(*packed[12:HEAD].clone().view(torch.float32).tolist())


def rounded(value: Tensor) -> Tensor:
    """A tensor as it comes back from `pack`."""
    return unpack(pack(value), value.dtype)
