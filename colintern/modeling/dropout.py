"""Dropout before the adapters that does not depend on how a batch is cut, ordered or padded.

Each token of each adapted module takes one of `MASKS` random masks, which are drawn anew at each step. Which one is a
hash of the run's seed, the step, the side of the batch, the row, the token's place in it and the module. So parts of
any size, a second pass over the same rows and the shares of several processes draw the same; and it is cheaper than a
random number for every element (`python -m bench.options`).
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

BITS = 12
MASKS = 2**BITS  # of each width; two tokens have the same one as often as 1 in MASKS
GOLDEN = -0x61C8864680B583EB  # 2^64 divided by the golden ratio, as int64
MIX = (30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)  # of splitmix64, Steele et al. 2014


class RowDropout(nn.Module):
    """Takes the place of a LoRA layer's `nn.Dropout`; outside `Masks.rows` it is one."""

    salt: Tensor

    def __init__(self, p: float, name: str, masks: "Masks"):
        super().__init__()
        self.p, self.masks = p, masks
        # PEFT saves all that is called lora_ and in the state.
        self.register_buffer("salt", torch.tensor(_number("module", name) | 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) with some elements zero and the others scaled, as `nn.Dropout`.

        Raises:
            ValueError: the rows that were announced are not those of `x`.
        """
        tokens = self.masks.tokens
        if tokens is None or not self.training or not self.p:
            return nn.functional.dropout(x, self.p, self.training)
        if tokens.shape != x.shape[:-1]:
            raise ValueError(f"dropout for {tuple(tokens.shape)} tokens, {tuple(x.shape[:-1])} came")
        # The upper bits of a product with an odd number: the step's best mixed ones.
        chosen = ((tokens * self.salt) >> (64 - BITS)) & (MASKS - 1)
        return _Masked.apply(x, chosen, self.masks.drawn[x.shape[-1]])  # type: ignore[no-untyped-call]


class _Masked(torch.autograd.Function):
    """Keeps for the backward pass which masks were taken, not the masks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: Tensor, masks: Tensor) -> Tensor:
        ctx.save_for_backward(chosen, masks)
        return x * _taken(masks, chosen).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        chosen, masks = ctx.saved_tensors
        return grad * _taken(masks, chosen).to(grad.dtype), None, None


def _taken(masks: Tensor, chosen: Tensor) -> Tensor:
    """(..., width): which of the masks each token takes."""
    # torch.compile takes indexing a second time in the backward pass, but keeps what an embedding gave; uncompiled, on
    # a CPU, indexing takes four times as long.
    return masks[chosen] if torch.compiler.is_compiling() else embedding(chosen, masks)


class Masks:
    """The masks of a model's adapters, which get `RowDropout` by this.

    Args:
        model: wrapped in LoRA.
        seed: of the run.
        dtype: the masks'; that of the adapters' inputs spares a conversion.
    """

    def __init__(self, model: nn.Module, seed: int, dtype: torch.dtype):
        self.seed, self.dtype, self.step = seed, dtype, -1
        self.tokens: Tensor | None = None  # (B, L) int64, of the rows that are in the model
        self.drawn: dict[int, Tensor] = {}  # by width: (MASKS, width), 0 or 1 / (1 - p)
        self.modules: list[tuple[int, RowDropout]] = []
        for name, module in list(model.named_modules()):
            for key, layer in getattr(module, "lora_dropout", {}).items():
                if isinstance(layer, nn.Dropout | RowDropout):
                    own = RowDropout(layer.p, name, self).to(next(module.parameters()).device)
                    module.lora_dropout[key] = own  # type: ignore[index, operator, union-attr]
                    self.modules.append((module.in_features, own))  # type: ignore[arg-type]

    def draw(self, step: int, device: torch.device) -> None:
        """Draw the masks of a step."""
        self.step = step
        for width, p in sorted({(width, module.p) for width, module in self.modules if module.p}):
            generator = None  # tensors without memory have no random numbers
            if device.type != "meta":
                generator = torch.Generator(device).manual_seed(_number(self.seed, step, width))
            if width not in self.drawn or self.drawn[width].device != device:
                self.drawn[width] = torch.empty(MASKS, width, dtype=self.dtype, device=device)
            self.drawn[width].bernoulli_(1 - p, generator=generator).div_(1 - p)

    @contextmanager
    def rows(self, side: str, rows: Tensor, length: int) -> Iterator[None]:
        """Around each pass, forward or backward, of a part of the batch through the model.

        Args:
            side: "query" or "page".
            rows: (B,) int64, the rows' numbers in the whole batch.
            length: L of what goes through the model.
        """
        row = _mixed(rows * GOLDEN + _number(self.seed, self.step, side))
        self.tokens = _mixed(row[:, None] + torch.arange(length, device=rows.device) * GOLDEN)
        try:
            yield
        finally:
            self.tokens = None


def _number(*facts: object) -> int:
    """An int64 that each of `facts` decides."""
    return int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=8).digest(), "little", signed=True)


def _mixed(x: Tensor) -> Tensor:
    """Each bit of an int64 from every bit of it."""
    for shift, factor in MIX:
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))
