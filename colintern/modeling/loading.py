"""Load models and processors from folders: with given settings, or as the folder itself says (`PretrainedRef`)."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from PIL import Image
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer

from colintern.core.errors import UserError
from colintern.modeling.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    describe_error,
    is_adapter,
    read_adapter_config,
    read_adapter_files,
    validate_adapter,
)
from colintern.modeling.attention import choose_attn_implementation, resolve_attn_implementation
from colintern.modeling.configuration_colintern import HEAD, load_config
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.modeling.retriever import ColIntern3_5
from colintern.params import split_hub_id
from colintern.storage import hub
from colintern.storage.files import read_json_object, require_regular_file
from colintern.storage.identity import content_hash, read_identity
from colintern.storage.paths import suggest_adapter_source

TOKENIZER_FILE, TOKENIZER_CONFIG, PROCESSOR_CONFIG = "tokenizer.json", "tokenizer_config.json", "processor_config.json"
MAX_TILE_SIZE = 4096  # pixels
DTYPES = ("float32", "bfloat16", "float16")
DOWNLOAD_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.jinja"]  # no pickles


class PretrainedRef(NamedTuple):
    """The folder of a model that is loaded without a params.yaml; `revision` identifies its weights."""

    folder: Path
    revision: str
    is_adapter: bool

    @classmethod
    def resolve(cls, model: str | Path) -> "PretrainedRef":
        """Find a model in a folder, or download it from the hub as ID@COMMIT; no weight is loaded.

        Raises:
            UserError: neither a folder nor ID@COMMIT; or a model without weights or head, or an untrained adapter.
        """
        if Path(model).is_dir():
            folder, revision = Path(model), ""
        else:
            name, revision = split_hub_id("model", str(model))
            try:
                folder = Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOAD_PATTERNS))
            except (HfHubHTTPError, LocalEntryNotFoundError) as error:
                raise UserError(f"model: {model!r} cannot be fetched: {hub.describe_hub_error(error)}") from error
        if not is_adapter(folder) and (folder / "config.json").is_file():
            require_merged(folder)
            return cls(folder, revision or content_hash(folder)[:40], False)
        require_adapter(folder)
        validate_adapter(read_adapter_files(folder), None)
        return cls(folder, revision or content_hash(folder / WEIGHTS_FILE)[:40], True)

    @property
    def identity(self) -> dict[str, Any]:
        """Return the identity that the training run wrote, empty if there is none."""
        return read_identity(self.folder)

    def load(self, base: str | Path | None, dtype: str | None, merge: bool, device: str | None) -> nn.Module:
        """Load the model.

        Args:
            base: folder of an adapter's base; None: the one that the adapter names.
            dtype: such as "float32"; None: the one it was trained in, else that of the stored weights.
            merge: fold an adapter into the weights of its base.
            device: None: the GPU if there is one.

        Raises:
            UserError: weights that are missing, do not fit or are not finite; a base that is missing or is not the one
                the adapter was trained on.
        """
        dtype = dtype or self.identity.get("params", {}).get("dtype") or "auto"
        if dtype not in ("auto", *DTYPES):
            raise UserError(f"dtype: {dtype!r} is not valid; it must be one of {', '.join(DTYPES)}")
        device = device or _get_device()
        options: dict[str, Any] = {"attn_implementation": choose_attn_implementation("auto", dtype, device)}
        if self.is_adapter:
            options |= {"base": str(self._find_base(base)), "merge": merge}
        model = load_model(self.folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **options)
        require_finite(model, self.folder)
        return model.to(device)

    def _find_base(self, base: str | Path | None) -> str | Path:
        """Return a hub id or a folder; a relative one is also searched in the folders around the adapter."""
        config = read_adapter_config(self.folder)
        name = base or str(config.base_model_name_or_path)
        if base is None and config.revision:
            return name
        tops = [Path(), *self.folder.resolve().parents] if base is None else [Path()]
        folder = next((top / name for top in tops if (top / name / "config.json").is_file()), None)
        if folder is None:
            raise UserError(f"base: {str(name)!r}, the base of {self.folder}, is no model's folder here; give base=")
        for file, expected in self.identity.get("base", {}).get("files", {}).items():
            if not (folder / file).is_file() or content_hash(folder / file) != expected["sha256"]:
                raise UserError(f"base: {folder / file} is not the file that {self.folder} was trained on; give base=")
        return folder


def _get_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_adapter(adapter: Path) -> None:
    """Raise UserError if a folder contains no adapter."""
    if not adapter.is_dir():
        raise UserError(f"{adapter}: does not exist, or is no folder; give the folder of an adapter")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (adapter / name).is_file():
            raise UserError(f"{adapter}: holds no {name}; {suggest_adapter_source(adapter)}")


def require_merged(folder: Path) -> None:
    """Raise UserError if the weights in a folder cannot be read or have no head."""
    read_json_object(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    if not any(f"{HEAD}.weight" in _read_names(file) for file in files):
        raise UserError(
            f"{folder}: its weights have no {HEAD}.weight, so it is a base before training; give an "
            f"adapter's folder, or one that was merged"
        )


def _read_names(file: Path) -> list[str]:
    require_regular_file(file)
    try:
        with safe_open(file, "pt") as content:
            return list(content.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def require_finite(model: nn.Module, folder: Path) -> None:
    """Raise UserError if a weight is NaN or infinite."""
    broken = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{folder}: {broken[0]} has NaN or infinite values ({len(broken)} such weights)")


def require_same_base(folder: Path, base: str, base_revision: str) -> None:
    """Raise UserError if an adapter was trained on another base than that of params.yaml."""
    config = read_adapter_config(folder)
    name, revision = config.base_model_name_or_path, config.revision or ""
    if (name, revision) != (base, base_revision):
        raise UserError(
            f"{folder}: was trained on base {name!r} at {revision!r}, but params.yaml has {base!r} at {base_revision!r}"
        )


def require_same_tiling(folder: Path, max_visual_tokens: int, tiling: str) -> None:
    """Raise UserError if an adapter or merged model was trained on pages that were cut in another way.

    Its processor, saved in training, records the values; those before `tiling` existed are of "exact".
    """
    if not (folder / PROCESSOR_CONFIG).is_file():
        return  # `read_processor` names it
    saved = {"tiling": "exact"} | read_json_object(folder / PROCESSOR_CONFIG)
    for key, value in (("tiling", tiling), ("max_visual_tokens", max_visual_tokens)):
        if (trained := saved.get(key, value)) != value:
            raise UserError(
                f"{folder}: was trained with {key}: {trained}, but params.yaml has {value}; set {key}: {trained} in "
                "params.yaml, or train again: dvc repro"
            )


def load_adapter(
    adapter: Path, base: str, base_revision: str, dtype: str, attention: str, trained: bool = True
) -> ColIntern3_5:
    """Load an adapter with its base, or its base with the adapter's head, to the GPU if there is one.

    Args:
        adapter: its folder.
        base: where `manifest.ensure_base` found the base's weights.
        base_revision: as in params.yaml, like the next two.
        dtype: see params.yaml.
        attention: see params.yaml.
        trained: whether LoRA is loaded too.

    Raises:
        UserError: weights that are missing or do not fit, such as an adapter without its head.
    """
    if trained:
        model = load_model(adapter, base=base, **_get_options(dtype, attention))
    else:
        model = load_model(base, revision=base_revision or None, **_get_options(dtype, attention))
        model.load_head(adapter)
    return model.to(_get_device())


def load_merged(folder: Path, dtype: str, attention: str) -> ColIntern3_5:
    """Load a model whose adapter was folded into its weights, to the GPU if there is one.

    Raises:
        UserError: weights that are missing or do not fit.
    """
    return load_model(folder, **_get_options(dtype, attention)).to(_get_device())


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


def _get_options(dtype: str, attention: str) -> dict[str, object]:
    return {"dtype": getattr(torch, dtype), "attn_implementation": resolve_attn_implementation(attention, dtype)}


def read_processor(folder: Path, model: nn.Module | None = None, **bounds: int | str) -> ColIntern3_5Processor:
    """Load the processor of an adapter or merged model from its folder.

    Args:
        folder: where its files are.
        model: the model that it must fit, if it is loaded.
        bounds: see `ColIntern3_5Processor`.

    Raises:
        UserError: a file, which is named, is missing, damaged or does not fit the model; or a bound is not valid.
    """
    for name in (PROCESSOR_CONFIG, TOKENIZER_CONFIG, TOKENIZER_FILE):
        if not os.path.lexists(folder / name):
            raise UserError(f"{folder / name}: is missing; copy the processor's files from the base of the adapter")
        require_regular_file(folder / name)
    read_json_object(folder / PROCESSOR_CONFIG)
    read_json_object(folder / TOKENIZER_CONFIG)
    try:
        processor = ColIntern3_5Processor.from_pretrained(folder, **bounds)  # type: ignore[arg-type]
        _try_processor(processor)
    except Exception as error:  # whatever a wrong value leads to in transformers
        file = folder / _find_damaged_file(folder)
        raise UserError(f"{file}: the processor cannot be used: {describe_error(error)}") from error
    if model is not None:
        _require_fit(model, processor, folder)
    return processor


def _try_processor(processor: ColIntern3_5Processor) -> None:
    """Process a query and a page, because transformers checks values of a configuration only when they are used."""
    size = processor.tile_size
    if type(size) is not int or not 1 <= size <= MAX_TILE_SIZE:
        raise ValueError(f"size: {size!r} is not valid; it must be 1 to {MAX_TILE_SIZE}")
    processor.process_queries(["a"])
    pixels = processor.process_images([Image.new("RGB", (32, 32), "gray")])["pixel_values"]
    if not pixels.isfinite().all():
        raise ValueError("image_mean and image_std give values that are not finite")


def _find_damaged_file(folder: Path) -> str:
    """Return the file that makes the processor in a folder unusable."""
    try:
        Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception:
        return TOKENIZER_FILE
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, config=load_config(str(folder)))  # nosec B615
        tokenizer(f"a{tokenizer.context_image_token}{tokenizer.start_image_token}{tokenizer.end_image_token}")
    except Exception:
        return TOKENIZER_CONFIG
    return PROCESSOR_CONFIG


def _require_fit(model: Any, processor: ColIntern3_5Processor, folder: Path) -> None:
    """Raise UserError if a processor does not fit the model: size and tokens of a tile, vocabulary."""
    config = model.config
    for file, key, value, expected in (
        (PROCESSOR_CONFIG, "size of a tile", [processor.tile_size] * 2, list(config.vision_config.image_size)),
        (PROCESSOR_CONFIG, "image_seq_length", processor.image_seq_length, config.image_seq_length),
        (TOKENIZER_CONFIG, "id of context_image_token", processor.image_token_id, config.image_token_id),
    ):
        if value != expected:
            raise UserError(f"{folder / file}: {key}: {value} is not valid; the model has {expected}")
    largest, size = max(processor.tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if largest >= size:
        raise UserError(f"{folder / TOKENIZER_FILE}: has a token with the id {largest}; the model has {size} tokens")
