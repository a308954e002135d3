"""Configurations of bases: those of InternVL3.5's published sizes, and those read from config.json.

In the presets the vision tower is InternViT-300M and the language model the Qwen3 of that size (the config.json of
Qwen/Qwen3-0.6B, 1.7B, 4B and 8B); the rest is the config.json of OpenGVLab/InternVL3_5-1B-HF. For 1B this gives the
905.3 M parameters of the published model; 2B, 4B and 8B were not checked against theirs.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.modeling.configuration_colintern import CONFIG_CLASSES, BackboneConfig
from colintern.params import Params, is_on_hub
from colintern.storage.hub import OfflineError, Repo, download_file
from colintern.storage.manifest import get_digests
from colintern.storage.paths import PRESETS, base_at_commit

# name -> hidden size, MLP size, layers and attention heads of its language model
PRESET_SIZES = dict(
    zip(
        PRESETS,
        ((1024, 3072, 28, 16), (2048, 6144, 28, 16), (2560, 9728, 36, 32), (4096, 12288, 36, 32)),
        strict=True,
    )
)
TEXT_CONFIG = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}
VISION_CONFIG: dict[str, Any] = {
    "model_type": "internvl_vision",
    "attention_bias": True,
    "hidden_size": 1024,
    "image_size": [448, 448],
    "intermediate_size": 4096,
    "norm_type": "layer_norm",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": [14, 14],
    "use_qk_norm": False,
}


def make_preset_config(name: str) -> BackboneConfig:
    """Return the config of one of `PRESET_SIZES`."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = TEXT_CONFIG | dict(zip(keys, PRESET_SIZES[name], strict=True))
    return BackboneConfig(text_config=text, vision_config=VISION_CONFIG, image_seq_length=256, downsample_ratio=0.5)


def load_base_config(base: str, params: Params) -> BackboneConfig:
    """Return the config of a preset, a folder, or a hub id: `ID@COMMIT`, or `params.base` with its commit.

    Only config.json is downloaded from a hub repository, and only if the cache lacks it.

    Raises:
        UserError: nothing of that name, a hub id without its commit, or a config.json of another kind of model.
        OfflineError: the hub cannot be reached and the cache lacks the file.
    """
    if base in PRESET_SIZES:
        return make_preset_config(base)
    if not is_on_hub(base.partition("@")[0]):
        return _read_config(root() / base / "config.json", base)
    name, revision = base_at_commit(base, params)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # download messages must not mix with a report for machines
            file = download_file(Repo("base", name, revision, "model"), "config.json", get_digests())
        return _read_config(file, base)
    except OfflineError as error:
        preset = get_preset_name(name)
        hint = f"\n  or, with the config that is shipped: --base {preset}" if preset else ""
        raise OfflineError(f"{error}{hint}", error.reason) from error


def load_cached_or_preset_config(params: Params) -> BackboneConfig:
    """Return the config of `params.base`, downloaded only if neither the cache nor `PRESET_SIZES` has it.

    Raises:
        UserError, OfflineError: see `load_base_config`.
    """
    preset = get_preset_name(params.base)  # "" for a folder, which the hub's cache does not contain
    repo = Repo("base", params.base, params.base_revision, "model")
    if preset and not (repo.snapshot_folder / "config.json").is_file():
        return make_preset_config(preset)
    return load_base_config(params.base, params)


def get_tile_size(config: BackboneConfig) -> int:
    """Return the side of a tile in pixels."""
    vision: Any = config.vision_config
    return vision.image_size[0]


def get_preset_name(base: str) -> str:
    """Return the preset of a hub id of OpenGVLab, "" if there is none."""
    name = base.lower().removeprefix("opengvlab/").removesuffix("-hf")
    return name if name in PRESET_SIZES and is_on_hub(base) else ""


def _read_config(file: Path, base: str) -> BackboneConfig:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.get("model_type") not in CONFIG_CLASSES:
            raise UserError(f"base: {base!r}: {file} is that of a {content.get('model_type')}, not of an internvl")
        return CONFIG_CLASSES[content["model_type"]].from_dict(content)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        raise UserError(
            f"base: {base!r}: {file} cannot be used: {reason}; give a folder that has one, a hub id with its commit, "
            f"or one of {', '.join(PRESET_SIZES)}"
        ) from error
