"""A trained adapter as a model, its base with the same head before training, or a merged model, as params.yaml says."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from colintern.model import ColIntern3_5
from colintern.modeling.attention import implementation
from colintern.params import Params, UserError
from colintern.processor import ColIntern3_5Processor


def require_adapter(adapter: Path) -> None:
    """Raises UserError where a folder holds no adapter."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if not (adapter / name).is_file():
            raise UserError(f"{adapter}: holds no {name}; run the stage that makes it: dvc repro train")


def require_merged(folder: Path) -> None:
    """Raises UserError where the weights in a folder cannot be read or have no head."""
    files = sorted(folder.glob("*.safetensors"))
    if not any("custom_text_proj.weight" in _names(file) for file in files):
        raise UserError(
            f"{folder}: its weights have no custom_text_proj.weight, so it is a base before training; give an "
            f"adapter's folder, or one that was merged"
        )


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as content:
            return list(content.keys())
    except SafetensorError as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def untrained(weights: Mapping[str, Tensor]) -> str:
    """Which of an adapter's lora_B no step has moved, in words, "" if none: B starts at zero."""
    up = {name: value for name, value in weights.items() if ".lora_B" in name}
    still = [name for name, value in up.items() if not value.any()]
    if not still:
        return ""
    which = "every lora_B" if len(still) == len(up) else f"{len(still)} of {len(up)} lora_B, such as {still[0]},"
    return f"{which} is zero, as before the first step: nothing was learned there"


def require_finite(model: nn.Module, folder: Path) -> None:
    """Raises UserError where a weight is not a number."""
    broken = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{folder}: {broken[0]} has NaN or infinite values ({len(broken)} such weights)")


def require_base(params: Params, folder: Path) -> None:
    """Raises UserError where an adapter was trained on another base than `params.base`."""
    config = json.loads((folder / "adapter_config.json").read_text())
    name, revision = config["base_model_name_or_path"], config.get("revision") or ""
    if (name, revision) != (params.base, params.base_revision):
        raise UserError(
            f"{folder}: was trained on base {name!r} at {revision!r}, but params.yaml has {params.base!r} at "
            f"{params.base_revision!r}"
        )


def load_adapter(params: Params, base: str, adapter: Path, trained: bool = True) -> nn.Module:
    """The model, on the GPU if there is one; `base` is where `manifest.check_base` found its weights.

    Raises:
        UserError: weights that are missing or do not fit, such as an adapter without its head.
    """
    options = _options(params)
    model: Any
    try:
        if trained:
            model = ColIntern3_5.from_pretrained(adapter, base=base, **options)
        else:
            model = ColIntern3_5.from_pretrained(base, revision=params.base_revision or None, **options)
            model.load_head(adapter)
    except ValueError as error:
        raise UserError(str(error)) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def load_merged(params: Params, folder: Path) -> nn.Module:
    """A model whose adapter was folded into its weights, on the GPU if there is one.

    Raises:
        UserError: weights that are missing or do not fit.
    """
    try:
        model: Any = ColIntern3_5.from_pretrained(folder, **_options(params))
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _options(params: Params) -> dict[str, Any]:
    return {
        "dtype": getattr(torch, params.dtype),
        "attn_implementation": implementation(params.attention, params.dtype),
    }


def load_processor(params: Params, adapter: Path) -> ColIntern3_5Processor:
    """The adapter's processor, with the bounds that params set."""
    return ColIntern3_5Processor.from_pretrained(
        adapter, max_visual_tokens=params.max_visual_tokens, max_query_tokens=params.max_query_tokens
    )
