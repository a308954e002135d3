"""The configs of the InternVL3.5 models, and that of any base, without its weights.

The vision tower is InternViT-300M in all four, the language model the Qwen3 of that size (the config.json of
Qwen/Qwen3-0.6B, 1.7B, 4B and 8B); the rest is the config.json of OpenGVLab/InternVL3_5-1B-HF. For 1B this gives the
905.3 M parameters of the published model; 2B, 4B and 8B have not been held against theirs.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from transformers import InternVLConfig

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.params import Params, is_on_hub
from colintern.storage.hub import OfflineError, Repo, download_file
from colintern.storage.manifest import get_digests
from colintern.storage.paths import PRESETS, base_at_commit

# name -> hidden size, MLP size, layers and attention heads of its language model
SIZES = dict(
    zip(
        PRESETS,
        ((1024, 3072, 28, 16), (2048, 6144, 28, 16), (2560, 9728, 36, 32), (4096, 12288, 36, 32)),
        strict=True,
    )
)
TEXT = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}
VISION: dict[str, Any] = {
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


def preset(name: str) -> InternVLConfig:
    """The config of one of `SIZES`."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = TEXT | dict(zip(keys, SIZES[name], strict=True))
    return InternVLConfig(text_config=text, vision_config=VISION, image_seq_length=256, downsample_ratio=0.5)


def config(base: str, params: Params) -> InternVLConfig:
    """The config of a preset, of a folder, or of a hub id: `ID@COMMIT`, or that of params with its commit.

    Of a hub repository nothing but config.json is fetched, and that only where the cache lacks it.

    Raises:
        UserError: nothing of that name, a hub id without its commit, or a config.json of another kind of model.
        OfflineError: the hub cannot be reached and the cache lacks the file.
    """
    if base in SIZES:
        return preset(base)
    if not is_on_hub(base.partition("@")[0]):
        return _read(root() / base / "config.json", base)
    name, revision = base_at_commit(base, params)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what is fetched is told there, beside a report for machines
            return _read(download_file(Repo("base", name, revision, "model"), "config.json", get_digests()), base)
    except OfflineError as error:
        shipped = f"\n  or, with the config that is shipped: --base {known(name)}" if known(name) else ""
        raise OfflineError(f"{error}{shipped}", error.reason) from error


def at_hand(params: Params) -> InternVLConfig:
    """The config of params' base, from the hub only where neither the cache nor `SIZES` has it.

    Raises:
        UserError, OfflineError: see `config`.
    """
    name = known(params.base)  # "" of a folder, for which the hub's cache has no place
    repo = Repo("base", params.base, params.base_revision, "model")
    if name and not (repo.snapshot_folder / "config.json").is_file():
        return preset(name)
    return config(params.base, params)


def known(base: str) -> str:
    """The preset of a hub id of OpenGVLab's, "" if there is none."""
    name = base.lower().removeprefix("opengvlab/").removesuffix("-hf")
    return name if name in SIZES and is_on_hub(base) else ""


def _read(file: Path, base: str) -> InternVLConfig:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("model_type") != "internvl":
            raise UserError(f"base: {base!r}: {file} is that of a {found.get('model_type')}, not of an internvl")
        return InternVLConfig.from_dict(found)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        raise UserError(
            f"base: {base!r}: {file} cannot be used: {reason}; give a folder that has one, a hub id with its commit, "
            f"or one of {', '.join(SIZES)}"
        ) from error
