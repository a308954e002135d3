"""Choose the code that computes attention: one of transformers' own, or a kernel of the hub at a commit."""

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from colintern.core.errors import UserError
from colintern.modeling.kernels import get_kernel_repo, import_kernel


def choose_attn_implementation(attention: str, dtype: str, device: str | None = None) -> str:
    """Return transformers' name for an `attention` that is not a kernel of the hub.

    `auto` is flash_attention_2 in bfloat16 on CUDA where flash-attn is installed, else sdpa.

    Args:
        attention: as in params.yaml.
        dtype: such as "bfloat16"; flash-attn's kernels know no float32.
        device: None: the GPU if there is one.
    """
    assert "/" not in attention, f"{attention}: transformers would load what the hub's cache has"
    if attention != "auto":
        return attention
    usable = dtype == "bfloat16" and device != "cpu" and torch.cuda.is_available() and find_spec("flash_attn")
    return "flash_attention_2" if usable else "sdpa"


def resolve_attn_implementation(attention: str, dtype: str) -> str:
    """Return transformers' name for `attention` of params.yaml, and register a kernel of the hub under it.

    Raises:
        UserError: flash-attn is not installed; or a kernel was not fetched, does not fit this machine, or cannot be
            imported.
    """
    repo = get_kernel_repo(attention)
    if repo is None:
        name = choose_attn_implementation(attention, dtype)
        if name == "flash_attention_2" and not find_spec("flash_attn"):
            raise UserError(
                "attention: flash_attention_2 needs the package flash-attn, which is not installed; it must be auto, "
                "or a kernel of the hub as OWNER/NAME@<40 hex digits>"
            )
        return name
    if dtype == "float32" and torch.cuda.is_available():
        raise UserError(f"attention: {attention} on a GPU needs dtype: bfloat16")
    name = f"kernel-{repo.revision}"
    AttentionInterface.register(name, _adapt_kernel(attention, import_kernel(repo)))
    AttentionMaskInterface.register(name, _require_no_mask)
    return name


def _adapt_kernel(attention: str, function: Callable[..., Any]) -> Callable[..., tuple[Tensor, None]]:
    """Return the kernel with the signature of transformers' attention functions."""
    options = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
    if not options.keys() <= inspect.signature(function).parameters.keys():
        raise UserError(f"deterministic: true is not possible with attention: {attention}, which has no such option")

    def compute_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        assert attention_mask is None and sliding_window is None and softcap is None, "no base of ours has them"
        causal = bool(module.is_causal if is_causal is None else is_causal)
        more = options | ({"dropout_p": dropout} if dropout else {})
        q, k, v = (part.transpose(1, 2) for part in _cast_like_autocast(query, key, value))
        result = function(q, k, v, softmax_scale=scaling, causal=causal, **more)
        output = result[0] if isinstance(result, tuple) else result  # flash-attn 3 also returns the logarithms of sums
        if torch.is_grad_enabled() and query.requires_grad and not output.requires_grad:
            raise UserError(f"attention: {attention} has no gradient; it can evaluate, but not train")
        return output, None

    return compute_attention


def _cast_like_autocast(*parts: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast does before torch's own attention; it does not cast for a kernel."""
    kind = parts[0].device.type
    if not torch.is_autocast_enabled(kind):
        return parts
    return tuple(part.to(torch.get_autocast_dtype(kind)) for part in parts)


def _require_no_mask(*args: object, attention_mask: Tensor | None = None, **kwargs: object) -> None:
    assert attention_mask is None or attention_mask.all(), "right padding needs no mask"
