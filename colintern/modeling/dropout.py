"""Dropout before the adapters that does not depend on how a batch is split, ordered or padded.

Each token of each adapted module takes one of `NUM_MASKS` random masks, which are drawn again at each step. Which one
is a hash of the run's seed, the step, the side of the batch, the row, the token's position in it and the module. So
mini-batches of any size, a second pass over the same rows and the shards of several processes get the same masks; and
it is cheaper than a random number for every element (`python -m bench.options`). Shapes: B rows, L tokens.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import embedding

MASK_BITS = 12
NUM_MASKS = 2**MASK_BITS  # of each width; two tokens share one with a probability of 1 / NUM_MASKS
GOLDEN = -0x61C8864680B583EB  # 2^64 divided by the golden ratio, as int64
MIX = (30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)  # of splitmix64, Steele et al. 2014


class BatchInvariantDropout(nn.Module):
    """Replaces a LoRA layer's `nn.Dropout`; outside `DropoutMaskBank.assign_rows` it is one."""

    salt: Tensor

    def __init__(self, p: float, name: str, bank: "DropoutMaskBank"):
        super().__init__()
        self.p, self.bank = p, bank
        # Not persistent: PEFT saves every state whose name contains lora_.
        self.register_buffer("salt", torch.tensor(_hash_to_int64("module", name) | 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Zero some elements of (B, L, width) and scale the others, as `nn.Dropout` does.

        Raises:
            ValueError: `assign_rows` was called for other rows than those of `x`.
        """
        tokens = self.bank.token_hashes
        if tokens is None or not self.training or not self.p:
            return nn.functional.dropout(x, self.p, self.training)
        if tokens.shape != x.shape[:-1]:
            raise ValueError(f"dropout for {tuple(tokens.shape)} tokens, {tuple(x.shape[:-1])} came")
        # The upper bits of a product with an odd number are the best mixed ones.
        indices = ((tokens * self.salt) >> (64 - MASK_BITS)) & (NUM_MASKS - 1)
        return _Masked.apply(x, indices, self.bank.masks[x.shape[-1]])  # type: ignore[no-untyped-call]


class _Masked(torch.autograd.Function):
    """Saves for the backward pass the indices of the masks, not the masks."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, indices: Tensor, masks: Tensor) -> Tensor:
        ctx.save_for_backward(indices, masks)
        return x * _select_masks(masks, indices).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        indices, masks = ctx.saved_tensors
        return grad * _select_masks(masks, indices).to(grad.dtype), None, None


def _select_masks(masks: Tensor, indices: Tensor) -> Tensor:
    """Return the mask of each token, (..., width)."""
    # torch.compile repeats indexing in the backward pass, but keeps the output of an embedding; uncompiled, on a CPU,
    # indexing takes four times as long.
    return masks[indices] if torch.compiler.is_compiling() else embedding(indices, masks)


class DropoutMaskBank:
    """The masks of a model's adapters; constructing it replaces their dropout by `BatchInvariantDropout`.

    Args:
        model: wrapped in LoRA.
        seed: of the run.
        dtype: of the masks; that of the adapters' inputs saves a conversion.
    """

    def __init__(self, model: nn.Module, seed: int, dtype: torch.dtype):
        self.seed, self.dtype, self.step = seed, dtype, -1
        self.token_hashes: Tensor | None = None  # (B, L) int64, of the rows in the current pass
        self.masks: dict[int, Tensor] = {}  # by width: (NUM_MASKS, width), 0 or 1 / (1 - p)
        self.modules: list[tuple[int, BatchInvariantDropout]] = []  # with their widths
        for name, module in list(model.named_modules()):
            for key, layer in getattr(module, "lora_dropout", {}).items():
                if isinstance(layer, nn.Dropout | BatchInvariantDropout):
                    dropout = BatchInvariantDropout(layer.p, name, self).to(next(module.parameters()).device)
                    module.lora_dropout[key] = dropout  # type: ignore[index, operator, union-attr]
                    self.modules.append((module.in_features, dropout))  # type: ignore[arg-type]

    def draw_masks(self, step: int, device: torch.device) -> None:
        """Draw the masks of a step."""
        self.step = step
        for width, p in sorted({(width, module.p) for width, module in self.modules if module.p}):
            generator = None  # tensors on the meta device have no random numbers
            if device.type != "meta":
                generator = torch.Generator(device).manual_seed(_hash_to_int64(self.seed, step, width))
            if width not in self.masks or self.masks[width].device != device:
                self.masks[width] = torch.empty(NUM_MASKS, width, dtype=self.dtype, device=device)
            self.masks[width].bernoulli_(1 - p, generator=generator).div_(1 - p)

    @contextmanager
    def assign_rows(self, side: str, rows: Tensor, length: int) -> Iterator[None]:
        """Select masks for the rows of one pass, forward or backward, of a mini-batch through the model.

        Args:
            side: "query" or "page".
            rows: (B,) int64, the rows' indices in the whole batch.
            length: L of the mini-batch.
        """
        row_hashes = _mix_bits(rows * GOLDEN + _hash_to_int64(self.seed, self.step, side))
        self.token_hashes = _mix_bits(row_hashes[:, None] + torch.arange(length, device=rows.device) * GOLDEN)
        try:
            yield
        finally:
            self.token_hashes = None


def _hash_to_int64(*facts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=8).digest(), "little", signed=True)


def _mix_bits(x: Tensor) -> Tensor:
    """Let every bit of an int64 decide each bit of the result."""
    for shift, factor in MIX:
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))
