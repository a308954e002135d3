"""Which code computes attention: one of transformers' choices, or a kernel of the hub that was checked to the byte.

transformers can load kernels of the hub itself, from whatever bytes the cache has. Here it never does: a kernel's files
are hashed against data/manifest.json, imported from links to just those, and held against torch's own attention on a
few numbers, gradient included, before the model gets it under a name that is made of their hashes.
"""

import hashlib
import inspect
import json
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from colintern.core.errors import UserError
from colintern.modeling.kernels import find_build, find_unmet_need, import_kernel
from colintern.modeling.modeling_colintern import attention_kernel
from colintern.storage.manifest import Files, ensure_files, get_digests, get_files_folder, get_kernel_entry

KEY = "attention"
FUNCTION = "flash_attn_func"  # what flash-attn 2 and 3 and the kernels made of them all have
# How far a right kernel may be from float32 arithmetic, as a share of the largest number.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def implementation(attention: str, dtype: str, training: bool = False) -> str:
    """transformers' name for what params.yaml calls `attention`.

    Raises:
        UserError: flash-attn is not installed; or a kernel was not fetched, is not the one that was fetched, does not
            fit this machine, cannot be imported, or computes something else.
    """
    entry = get_kernel_entry(attention)
    if entry is None:
        name = attention_kernel(attention, dtype)
        if name == "flash_attention_2" and not find_spec("flash_attn"):
            raise UserError(
                "attention: flash_attention_2 needs the package flash-attn, which is not installed; it must be auto, "
                "or a kernel of the hub as OWNER/NAME@<40 hex digits>"
            )
        return name
    folder = get_files_folder(Files(**entry), "kernel")
    get_digests().invalidate(*(folder / file for file in entry["files"]))  # code is hashed right before it runs
    ensure_files(entry, KEY, "kernel")
    build = find_build(KEY, folder)
    if need := find_unmet_need(build, dtype):
        raise UserError(f"attention: {attention}: its build {build.variant_str} {need}")
    name = f"kernel-{hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:16]}"
    function = _function(attention, folder, tuple(entry["files"]))
    _check(attention, function, getattr(torch, dtype), training)
    AttentionInterface.register(name, _attend(function))
    AttentionMaskInterface.register(name, _no_mask)
    return name


def lacking(attention: str, dtype: str) -> str:
    """What keeps a kernel that was fetched from running here, in words, "" if nothing; nothing of it is imported.

    Raises:
        UserError: it was not fetched.
    """
    entry = get_kernel_entry(attention)
    assert entry, attention
    try:
        return find_unmet_need(find_build(KEY, get_files_folder(Files(**entry), "kernel")), dtype)
    except UserError as error:
        return str(error).removeprefix(f"{KEY}: ")


@cache  # a second import in one process would be another module
def _function(attention: str, folder: Path, files: tuple[str, ...]) -> Callable[..., Any]:
    module = import_kernel(KEY, folder, files)
    function = getattr(module, FUNCTION, None)
    if not callable(function):
        there = ", ".join(sorted(name for name in vars(module) if not name.startswith("_"))) or "nothing"
        raise UserError(f"attention: {attention} has no {FUNCTION}, and only {there}; it is no attention kernel")
    return function


def _attend(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, None]]:
    """The kernel as transformers calls attention."""
    takes = inspect.signature(function).parameters
    options = {"deterministic": torch.are_deterministic_algorithms_enabled()} if "deterministic" in takes else {}

    def attend(
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
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        assert attention_mask is None and sliding_window is None and softcap is None, "no base of ours has them"
        causal = bool(module.is_causal if is_causal is None else is_causal)
        more = options | ({"dropout_p": dropout} if dropout else {})
        q, k, v = (part.transpose(1, 2) for part in _cast(query, key, value))
        return _first(function(q, k, v, softmax_scale=scaling, causal=causal, **more)), None

    return attend


def _cast(*parts: Tensor) -> tuple[Tensor, ...]:
    """What autocast does before torch's own attention; it does not know a kernel."""
    kind = parts[0].device.type
    if not torch.is_autocast_enabled(kind):
        return parts
    return tuple(part.to(torch.get_autocast_dtype(kind)) for part in parts)


def _no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    assert attention_mask is None or attention_mask.all(), "right padding needs no mask"


def _first(found: Any) -> Tensor:
    """flash-attn 3 also returns the logarithms of the sums."""
    return found[0] if isinstance(found, tuple) else found


def _check(attention: str, function: Callable[..., Any], dtype: torch.dtype, training: bool) -> None:
    """Raises UserError where a kernel is not torch's own attention, on 33 tokens with 4 heads that share 2 keys."""
    if torch.are_deterministic_algorithms_enabled() and "deterministic" not in inspect.signature(function).parameters:
        raise UserError(f"deterministic: true cannot be promised with attention: {attention}, which has no such option")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 33, heads, 64, generator=generator).to(device, dtype) for heads in (4, 2, 2)]
    for causal in (True, False):
        want = _values(_own, drawn, causal, training)
        try:
            have = _values(function, drawn, causal, training)
        except Exception as error:  # whatever foreign code raises
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"attention: {attention}: {FUNCTION} fails on {device} in {dtype}: {what}") from error
        for name, right, found in zip(("result", *("gradient",) * 3), want, have, strict=False):
            if found is None:
                raise UserError(f"attention: {attention}: {FUNCTION} has no gradient; it can evaluate, but not train")
            off = ((found.float() - right.float()).abs().max() / right.float().abs().max()).item()
            if not off <= TOLERANCES[dtype]:
                what = f"the {name} of {FUNCTION}(causal={causal}) is {off:.2g} off torch's own"
                raise UserError(f"attention: {attention}: {what}, more than {TOLERANCES[dtype]:g}")


def _values(function: Callable[..., Any], drawn: list[Tensor], causal: bool, training: bool) -> list[Any]:
    """What a function makes of numbers and, if training, its gradients, None where there is none."""
    with torch.enable_grad():
        leaves = [part.clone().requires_grad_(training) for part in drawn]
        out = _first(function(*leaves, softmax_scale=0.125, causal=causal))
        if not training:
            return [out]
        if not out.requires_grad:
            return [out, None, None, None]
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def _own(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, causal: bool) -> Tensor:
    """torch's attention in float32, called as a kernel is."""
    q, k, v = (part.float().transpose(1, 2) for part in (query, key, value))
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True).transpose(1, 2)
