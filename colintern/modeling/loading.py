"""A trained adapter as a model, or its base with the same head before training."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from colintern.model import ColIntern3_5, attention_kernel
from colintern.params import Params, UserError
from colintern.processor import ColIntern3_5Processor


def require_adapter(adapter: Path) -> None:
    """Raises UserError where a folder holds no adapter."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if not (adapter / name).is_file():
            raise UserError(f"{adapter}: holds no {name}; run the stage that makes it: dvc repro train")


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
        "attn_implementation": attention_kernel(params.attention, params.dtype),
    }


def load_processor(params: Params, adapter: Path) -> ColIntern3_5Processor:
    """The adapter's processor, with the bounds that params set."""
    return ColIntern3_5Processor.from_pretrained(
        adapter, max_visual_tokens=params.max_visual_tokens, max_query_tokens=params.max_query_tokens
    )
