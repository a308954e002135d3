"""Choose the code that computes attention: one of transformers' own, or a kernel of the hub whose bytes were checked.

transformers can load kernels of the hub itself, from whatever bytes the cache has. Here it never does: a kernel's files
are hashed against data/manifest.json, imported from links to just those, and compared with torch's own attention on a
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
from colintern.storage.manifest import Files, ensure_files, get_digests, get_files_folder, get_kernel_entry

AttentionFunction = Callable[..., Tensor | tuple[Tensor, ...]]
KEY = "attention"
FUNCTION = "flash_attn_func"  # in flash-attn 2 and 3 and the kernels made from them
# Largest difference of a correct kernel from float32 arithmetic, relative to the largest value.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


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


def resolve_attn_implementation(attention: str, dtype: str, training: bool = False) -> str:
    """Return transformers' name for `attention` of params.yaml, and register a kernel of the hub under it.

    Raises:
        UserError: flash-attn is not installed; or a kernel was not fetched, is not the one that was fetched, does not
            fit this machine, cannot be imported, or computes something else.
    """
    entry = get_kernel_entry(attention)
    if entry is None:
        name = choose_attn_implementation(attention, dtype)
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
    function = _import_function(attention, folder, tuple(entry["files"]))
    _check_kernel(attention, function, getattr(torch, dtype), training)
    AttentionInterface.register(name, _adapt_kernel(function))
    AttentionMaskInterface.register(name, _require_no_mask)
    return name


def unavailable_reason(attention: str, dtype: str) -> str:
    """Return why a kernel that was fetched cannot run here, "" if it can; nothing of it is imported.

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
def _import_function(attention: str, folder: Path, files: tuple[str, ...]) -> AttentionFunction:
    module = import_kernel(KEY, folder, files)
    function = getattr(module, FUNCTION, None)
    if not callable(function):
        there = ", ".join(sorted(name for name in vars(module) if not name.startswith("_"))) or "nothing"
        raise UserError(f"attention: {attention} has no {FUNCTION}, and only {there}; it is no attention kernel")
    return function


def _adapt_kernel(function: AttentionFunction) -> Callable[..., tuple[Tensor, None]]:
    """Return the kernel with the signature of transformers' attention functions."""
    takes = inspect.signature(function).parameters
    options = {"deterministic": torch.are_deterministic_algorithms_enabled()} if "deterministic" in takes else {}

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
        return _get_output(function(q, k, v, softmax_scale=scaling, causal=causal, **more)), None

    return compute_attention


def _cast_like_autocast(*parts: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast does before torch's own attention; it does not cast for a kernel."""
    kind = parts[0].device.type
    if not torch.is_autocast_enabled(kind):
        return parts
    return tuple(part.to(torch.get_autocast_dtype(kind)) for part in parts)


def _require_no_mask(*args: object, attention_mask: Tensor | None = None, **kwargs: object) -> None:
    assert attention_mask is None or attention_mask.all(), "right padding needs no mask"


def _get_output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result  # flash-attn 3 also returns the logarithms of the sums


def _check_kernel(attention: str, function: AttentionFunction, dtype: torch.dtype, training: bool) -> None:
    """Raise UserError if a kernel differs from torch's own attention on 33 tokens with 4 heads that share 2 keys."""
    if torch.are_deterministic_algorithms_enabled() and "deterministic" not in inspect.signature(function).parameters:
        raise UserError(f"deterministic: true is not possible with attention: {attention}, which has no such option")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 33, heads, 64, generator=generator).to(device, dtype) for heads in (4, 2, 2)]
    for causal in (True, False):
        expected = _run_with_gradients(_reference_attention, inputs, causal, training)
        try:
            results = _run_with_gradients(function, inputs, causal, training)
        except Exception as error:  # whatever foreign code raises
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"attention: {attention}: {FUNCTION} fails on {device} in {dtype}: {reason}") from error
        for name, right, result in zip(("result", *("gradient",) * 3), expected, results, strict=False):
            if result is None:
                raise UserError(f"attention: {attention}: {FUNCTION} has no gradient; it can evaluate, but not train")
            difference = ((result.float() - right.float()).abs().max() / right.float().abs().max()).item()
            if not difference <= TOLERANCES[dtype]:
                reason = f"the {name} of {FUNCTION}(causal={causal}) is {difference:.2g} off torch's own"
                raise UserError(f"attention: {attention}: {reason}, more than {TOLERANCES[dtype]:g}")


def _run_with_gradients(function: AttentionFunction, inputs: list[Tensor], causal: bool, training: bool) -> list[Any]:
    """Return the output and, if training, the gradients of the inputs, None if there is none."""
    with torch.enable_grad():
        leaves = [part.clone().requires_grad_(training) for part in inputs]
        output = _get_output(function(*leaves, softmax_scale=0.125, causal=causal))
        if not training:
            return [output]
        if not output.requires_grad:
            return [output, None, None, None]
        weights = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
        return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)]


def _reference_attention(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, causal: bool) -> Tensor:
    """Compute torch's attention in float32, with the signature of a kernel."""
    q, k, v = (part.float().transpose(1, 2) for part in (query, key, value))
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True).transpose(1, 2)
