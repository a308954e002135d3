"""Store unit vectors in fewer bytes: float16, int8, or the sign of each number.

One scale for all vectors lets shards and stores be written independently of each other. MaxSim takes float32 queries
and the numbers that `dequantize` returns.
"""

import torch
from torch import Tensor

INT8_SCALE = 127  # of a unit vector's numbers, which are -1 to 1
FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16}
BITS_PER_BYTE = 8


def quantize(vectors: Tensor, precision: str) -> Tensor:
    """Return what is stored of (n, dim) unit vectors.

    Example: (0.5, -0.2) is (64, -25) as int8 and, as binary, the bits 10 of one byte, 128.

    Returns:
        (n, dim) float32, float16 or int8; of "binary" (n, ceil(dim / 8)) uint8, where the first number of a vector is
        the highest bit of its first byte, 1 for a number above zero, as `numpy.packbits` has it.
    """
    if precision in FLOAT_DTYPES:
        return vectors.to(FLOAT_DTYPES[precision])
    if precision == "int8":
        return (vectors.float() * INT8_SCALE).round().clamp(-INT8_SCALE, INT8_SCALE).to(torch.int8)
    bits = torch.nn.functional.pad(vectors > 0, (0, -vectors.shape[1] % BITS_PER_BYTE))
    packed = bits.unflatten(1, (-1, BITS_PER_BYTE)).to(torch.uint8)
    return (packed << _bit_shifts(vectors.device)).sum(-1, dtype=torch.uint8)


def dequantize(stored: Tensor, precision: str, dim: int) -> Tensor:
    """Return (n, dim) float32 vectors that stand for the stored ones; of "binary" unit vectors of equal numbers."""
    if precision in FLOAT_DTYPES:
        return stored.float()
    if precision == "int8":
        return stored.float() / INT8_SCALE
    bits = (stored.unsqueeze(-1) >> _bit_shifts(stored.device)) & 1
    return (bits.flatten(1)[:, :dim].float() * 2 - 1) / dim**0.5


def get_bytes_per_vector(precision: str, dim: int) -> int:
    """Return the bytes that a vector takes."""
    return {"float32": 4 * dim, "float16": 2 * dim, "int8": dim, "binary": -(-dim // BITS_PER_BYTE)}[precision]


def _bit_shifts(device: torch.device) -> Tensor:
    return torch.arange(BITS_PER_BYTE - 1, -1, -1, dtype=torch.uint8, device=device)
