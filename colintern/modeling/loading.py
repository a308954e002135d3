"""A trained adapter as a model, its base with the same head before training, or a merged model, as params.yaml says."""

import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer

from colintern.core.errors import UserError
from colintern.modeling.adapter_files import CONFIG_FILE, WEIGHTS_FILE, describe_error, read_adapter_config
from colintern.modeling.attention import implementation
from colintern.modeling.modeling_colintern import ColIntern3_5
from colintern.modeling.processing_colintern import ColIntern3_5Processor
from colintern.params import Params
from colintern.storage.files import read_json_object, require_regular_file
from colintern.storage.paths import suggest_adapter_source

TOKENIZER_FILE, TOKENIZER_CONFIG, PROCESSOR_CONFIG = "tokenizer.json", "tokenizer_config.json", "processor_config.json"
MAX_TILE = 4096  # pixels


def require_adapter(adapter: Path) -> None:
    """Raises UserError where a folder holds no adapter."""
    if not adapter.is_dir():
        raise UserError(f"{adapter}: does not exist, or is no folder; give the folder of an adapter")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (adapter / name).is_file():
            raise UserError(f"{adapter}: holds no {name}; {suggest_adapter_source(adapter)}")


def require_merged(folder: Path) -> None:
    """Raises UserError where the weights in a folder cannot be read or have no head."""
    read_json_object(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    if not any("custom_text_proj.weight" in _names(file) for file in files):
        raise UserError(
            f"{folder}: its weights have no custom_text_proj.weight, so it is a base before training; give an "
            f"adapter's folder, or one that was merged"
        )


def _names(file: Path) -> list[str]:
    require_regular_file(file)
    try:
        with safe_open(file, "pt") as content:
            return list(content.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


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
    """The model, on the GPU if there is one; `base` is where `manifest.ensure_base` found its weights.

    Raises:
        UserError: weights that are missing or do not fit, such as an adapter without its head.
    """
    options = _options(params)
    if trained:
        model = load_model(adapter, base=base, **options)
    else:
        model = load_model(base, revision=params.base_revision or None, **options)
        model.load_head(adapter)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def load_model(path: str | Path, **options: Any) -> Any:
    """Load what `ColIntern3_5.from_pretrained` loads.

    Raises:
        UserError: weights that are missing, damaged or do not fit.
    """
    try:
        return ColIntern3_5.from_pretrained(path, **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    except Exception as error:  # whatever a damaged config.json or file of weights leads to in transformers
        raise UserError(f"{path}: cannot be loaded: {describe_error(error)}") from error


def load_merged(params: Params, folder: Path) -> nn.Module:
    """A model whose adapter was folded into its weights, on the GPU if there is one.

    Raises:
        UserError: weights that are missing or do not fit.
    """
    return load_model(folder, **_options(params)).to("cuda" if torch.cuda.is_available() else "cpu")


def _options(params: Params) -> dict[str, Any]:
    return {
        "dtype": getattr(torch, params.dtype),
        "attn_implementation": implementation(params.attention, params.dtype),
    }


def load_processor(params: Params, adapter: Path, model: Any = None) -> ColIntern3_5Processor:
    """Load the adapter's processor with the bounds that params set.

    Raises:
        UserError: see `read_processor`.
    """
    bounds = {"max_visual_tokens": params.max_visual_tokens, "max_query_tokens": params.max_query_tokens}
    return read_processor(adapter, model, **bounds)


def read_processor(folder: Path, model: Any = None, **bounds: Any) -> ColIntern3_5Processor:
    """Load the processor of an adapter or merged model from its folder.

    Args:
        model: that it must fit, if it is loaded.
        bounds: see `ColIntern3_5Processor`.

    Raises:
        UserError: a file is missing, damaged or does not fit the model, which is named; or a bound is not valid.
    """
    for name in (PROCESSOR_CONFIG, TOKENIZER_CONFIG, TOKENIZER_FILE):
        if not os.path.lexists(folder / name):
            raise UserError(f"{folder / name}: is missing; copy the processor's files from the base of the adapter")
        require_regular_file(folder / name)
    read_json_object(folder / PROCESSOR_CONFIG)
    read_json_object(folder / TOKENIZER_CONFIG)
    try:
        processor = ColIntern3_5Processor.from_pretrained(folder, **bounds)
        _try_processor(processor)
    except Exception as error:  # whatever a wrong value leads to in transformers
        file = folder / _find_damaged_file(folder)
        raise UserError(f"{file}: the processor cannot be used: {describe_error(error)}") from error
    if model is not None:
        _require_fit(model, processor, folder)
    return processor


def _try_processor(processor: ColIntern3_5Processor) -> None:
    """Process a query and a page, because transformers checks values of a configuration only when they are used."""
    if type(processor.tile) is not int or not 1 <= processor.tile <= MAX_TILE:
        raise ValueError(f"size: {processor.tile!r} is not valid; it must be 1 to {MAX_TILE}")
    processor.process_queries(["a"])
    pixels = processor.process_images([Image.new("RGB", (32, 32), "gray")])["pixel_values"]
    if not pixels.isfinite().all():
        raise ValueError("image_mean and image_std give values that are not finite")


def _find_damaged_file(folder: Path) -> str:
    """Return the file because of which the processor in a folder cannot be used."""
    try:
        Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception:
        return TOKENIZER_FILE
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)  # a local folder # nosec B615
        tokenizer(f"a{tokenizer.context_image_token}{tokenizer.start_image_token}{tokenizer.end_image_token}")
    except Exception:
        return TOKENIZER_CONFIG
    return PROCESSOR_CONFIG


def _require_fit(model: Any, processor: ColIntern3_5Processor, folder: Path) -> None:
    """Raise UserError where the processor in a folder does not fit the model: sizes of a tile, tokens, vocabulary."""
    config = model.config
    for file, key, value, expected in (
        (PROCESSOR_CONFIG, "size of a tile", [processor.tile] * 2, list(config.vision_config.image_size)),
        (PROCESSOR_CONFIG, "image_seq_length", processor.image_seq_length, config.image_seq_length),
        (TOKENIZER_CONFIG, "id of context_image_token", processor.image_token_id, config.image_token_id),
    ):
        if value != expected:
            raise UserError(f"{folder / file}: {key}: {value} is not valid; the model has {expected}")
    largest, size = max(processor.tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if largest >= size:
        raise UserError(f"{folder / TOKENIZER_FILE}: has a token with the id {largest}; the model has {size} tokens")
