"""A trained adapter as a model, its base with the same head before training, or a merged model, as params.yaml says."""

import os
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer

from colintern.adapter_files import (
    AdapterFiles,
    find_value_fault,
    read_adapter_config,
    read_adapter_files,
    read_json_object,
    require_regular_file,
    require_sound,
)
from colintern.model import ColIntern3_5
from colintern.modeling.attention import implementation
from colintern.params import Params, UserError
from colintern.processor import ColIntern3_5Processor

PROCESSOR_FILES = (  # where transformers finds a processor; the first is written by our own
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
REQUIRED_FILES = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
MAX_TILE = 4096  # pixels
IMAGE_TOKENS = ("start_image_token", "end_image_token", "context_image_token", "video_token")


def require_adapter(adapter: Path) -> AdapterFiles:
    """Read an adapter folder and check what can be checked without its base.

    Raises:
        UserError: see `read_checked_adapter`.
    """
    files = read_adapter_files(adapter)
    require_sound(files, None)
    return files


def require_merged(folder: Path) -> None:
    """Raises UserError where the weights in a folder cannot be read, are no floats, or have no head."""
    head = None
    for file in sorted(folder.glob("*.safetensors")):
        require_regular_file(file)
        try:
            with safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118 - not a dictionary
                    if content.get_slice(name).get_dtype() not in ("F64", "F32", "F16", "BF16"):
                        raise UserError(f"{file}: {find_value_fault(name, content.get_tensor(name))}")
                    if name.endswith("custom_text_proj.weight"):
                        head = content.get_tensor(name)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{file}: cannot be read: {error}") from error
        if head is not None and not head.any():
            raise UserError(f"{file}: custom_text_proj.weight is all zero: every page would get the same vectors")
    if head is None:
        raise UserError(
            f"{folder}: its weights have no custom_text_proj.weight, so it is a base before training; give an "
            f"adapter's folder, or one that was merged"
        )


def require_finite(model: nn.Module, folder: Path) -> None:
    """Raises UserError where a weight is not a number."""
    broken = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{folder}: {broken[0]} has NaN or infinite values ({len(broken)} such weights)")


def require_base(params: Params, folder: Path) -> None:
    """Raises UserError where an adapter was trained on another base than `params.base`."""
    config = read_adapter_config(folder)
    name, revision = config.base_model_name_or_path, config.revision or ""
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
    """The adapter's processor, with the bounds that params set.

    Raises:
        UserError: see `read_processor`.
    """
    return read_processor(adapter, max_visual_tokens=params.max_visual_tokens, max_query_tokens=params.max_query_tokens)


def read_processor(folder: Path, **bounds: Any) -> ColIntern3_5Processor:
    """Load the processor of an adapter or merged model from its folder; `bounds`: see `ColIntern3_5Processor`.

    Raises:
        UserError: a file is missing or damaged, which is named, or a bound is not valid.
    """
    for name in PROCESSOR_FILES:
        if os.path.lexists(folder / name):
            require_regular_file(folder / name)
            if name != "tokenizer.json":  # the largest, and read by a library that bounds its depth
                read_json_object(folder / name)
        elif name in REQUIRED_FILES:
            raise UserError(f"{folder}: holds no {name}; copy it from the run that trained it")
    try:
        processor = ColIntern3_5Processor.from_pretrained(folder, **bounds)
        _try_processor(processor)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
        if any(f"{name}=" in reason for name in bounds):
            raise UserError(f"{folder / PROCESSOR_FILES[0]}: {error}") from error
        raise UserError(f"{_blame_processor_file(folder)}: the processor cannot be used: {reason}") from error
    return processor


def _try_processor(processor: ColIntern3_5Processor) -> None:
    """Process a query and a page, because transformers checks the values of a configuration when they are used."""
    if type(processor.tile) is not int or not 1 <= processor.tile <= MAX_TILE:
        raise ValueError(f"size: {processor.tile!r} is not valid; it must be 1 to {MAX_TILE}")
    processor.process_queries(["a"])
    pixels = processor.process_images([Image.new("RGB", (32, 32), "gray")])["pixel_values"]
    if not pixels.isfinite().all():
        raise ValueError("its image_mean and image_std give values that are not finite")


def _blame_processor_file(folder: Path) -> Path:
    """Return the file that keeps the processor in a folder from being used."""
    try:
        Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:
        return folder / "tokenizer.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        attrgetter(*IMAGE_TOKENS)(tokenizer)
        tokenizer("a")
    except Exception:
        return folder / "tokenizer_config.json"
    return folder / PROCESSOR_FILES[0]


def require_processor_fit(model: Any, processor: ColIntern3_5Processor, folder: Path) -> None:
    """Raise UserError where the processor in a folder does not fit the model: sizes of a tile, tokens, vocabulary."""
    config, tile = model.config, processor.tile
    for key, have, want in (
        ("image_processor.size", [tile, tile], list(config.vision_config.image_size)),
        ("image_seq_length", processor.image_seq_length, config.image_seq_length),
    ):
        if have != want:
            raise UserError(f"{folder / PROCESSOR_FILES[0]}: {key}: {have} is not valid; the model has {want}")
    if processor.image_token_id != config.image_token_id:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: context_image_token: {processor.image_token!r} has the id "
            f"{processor.image_token_id}; the model expects {config.image_token_id}"
        )
    largest, size = max(processor.tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if largest >= size:
        raise UserError(f"{folder / 'tokenizer.json'}: has a token with the id {largest}; the model has {size} tokens")
