"""Causal attention for the CPU: matrix products over blocks of rows. transformers knows it as `blocked`.

In bfloat16 torch's own kernel for the CPU takes 1.5 to 2.4 times as long, because the products inside it are three
times as slow as torch's matrix products; in float32 neither is faster (`python -m bench.attention`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "blocked"
ROWS = 128  # of a block: what it is computed with stays in the cache


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale * query @ key^T, over no later token) @ value, with a gradient.

    The weights of one block of rows are held at once; the backward pass computes them again. Products have the inputs'
    precision, as in transformers' `eager`; the gradients of keys and values are summed in float32.

    Example: with equal keys, the second token's result is the mean of the first two values.

    Args:
        query: (B, H, L, D).
        key, value: (B, h, L, D); h divides H, and H / h query heads in a row share a key head.
        scale: of the products, mostly 1 / sqrt(D).

    Returns:
        (B, H, L, D).
    """
    return _forward(query, key, value, scale)  # type: ignore[no-any-return]


# As operators torch.compile takes them whole, instead of unrolling their loops for each length.
@custom_op("colintern::causal_attention", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    rows, keys, values = _by_key_head(query, key, value)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for start, end in _blocks(rows):
        _, weights = _weights(rows, keys, scale, start, end)
        out[:, :, start:end] = torch.bmm(weights, values[:, :end]).unflatten(1, (rows.shape[1], -1))
    return out.view(query.shape)


@custom_op("colintern::causal_attention_backward", mutates_args=())
def _backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, keys, values = _by_key_head(query, key, value)
    [grads] = _by_key_head(grad, heads=key.shape[1])
    to_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    to_keys, to_values = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (keys, values))
    for start, end in _blocks(rows):
        block, weights = _weights(rows, keys, scale, start, end)
        above = grads[:, :, start:end].flatten(1, 2)
        to_weights = torch.bmm(above, values[:, :end].transpose(1, 2))
        to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
        to_rows[:, :, start:end] = _scaled(to_scores, keys[:, :end], scale).unflatten(1, (rows.shape[1], -1))
        to_keys[:, :end] += _scaled(to_scores.transpose(1, 2), block, scale)
        to_values[:, :end] += torch.bmm(weights.transpose(1, 2), above)
    return to_rows.view(query.shape), to_keys.to(key.dtype).view(key.shape), to_values.to(key.dtype).view(key.shape)


def _by_key_head(query: Tensor, *others: Tensor, heads: int | None = None) -> list[Tensor]:
    """(B, H, L, D) as (B * h, H / h, L, D), and each (B, h, L, D) as (B * h, L, D)."""
    groups = len(query) * (heads or others[0].shape[1])
    return [query.reshape(groups, -1, *query.shape[2:]), *(x.reshape(groups, *x.shape[2:]) for x in others)]


def _blocks(rows: Tensor) -> list[tuple[int, int]]:
    return [(start, min(start + ROWS, rows.shape[2])) for start in range(0, rows.shape[2], ROWS)]


def _weights(rows: Tensor, keys: Tensor, scale: float, start: int, end: int) -> tuple[Tensor, Tensor]:
    """A block of rows, (groups, heads of one * rows, D), and the weight that each gives to each key up to its last."""
    block = rows[:, :, start:end].flatten(1, 2)
    scores = _scaled(block, keys[:, :end].transpose(1, 2), scale)
    later = torch.full((end - start, end - start), float("-inf"), dtype=scores.dtype, device=scores.device).triu(1)
    scores.unflatten(1, (rows.shape[1], -1))[..., start:] += later
    return block, scores.softmax(-1)


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b, rounded once."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _send_back(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.scale), None


_forward.register_fake(lambda query, *others: torch.empty_like(query, memory_format=torch.contiguous_format))
_backward.register_fake(
    lambda grad, *sides: tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in sides[:3])
)
_forward.register_autograd(_send_back, setup_context=_keep)


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts the inputs of torch's own attention; it does not know other kernels.

    Around a float32 base it returns values in bfloat16, and queries and keys, whose norms follow, in float32.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers calls it. torch's kernel where tokens look both ways, as in the tower, or a mask says how."""
    if attention_mask is not None or kwargs.get("dropout") or not module.is_causal:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query, key, value = cast_for_autocast(query, key, value)
    return blocked_attention(query, key, value, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
