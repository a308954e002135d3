"""What can be evaluated: a trained adapter, its base before training, a merged model; none loaded before it must be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from colintern.core.project import root
from colintern.encoding.page_features import FEATURES, PageFeatures
from colintern.encoding.tensor_cache import TensorCache
from colintern.evaluation.mteb_encoder import ColIntern3_5Encoder
from colintern.modeling.adapter_files import is_adapter
from colintern.modeling.loading import (
    load_adapter,
    load_merged,
    load_processor,
    require_adapter,
    require_base,
    require_finite,
    require_merged,
)
from colintern.params import Params
from colintern.storage.identity import content_hash, fingerprint, get_stage_versions, read_identity, stage_code
from colintern.storage.manifest import MANIFEST, ensure_base, get_kernel_entry, read_data_file

NAME = "colintern/colintern3_5"
EMBEDDINGS = Path("data/.embeddings")  # deleting it costs only time


class Subject(NamedTuple):
    """A model to evaluate.

    `name`, "organisation/model", and `revision`: its own in mteb's files. `identity`: all that decides its scores but
    the data. `params`: what it was trained with, as far as is known. `encoder()` loads it.
    """

    name: str
    revision: str
    identity: dict[str, Any]
    params: dict[str, Any]
    encoder: Callable[[], Any]


def subjects(params: Params, folder: Path) -> dict[str, Subject]:
    """What the folder of an adapter or of a merged model gives: "trained" and, of an adapter if
    `params.eval_untrained`, "untrained": its base with the same head before training.

    mteb's files of both carry the hash of the adapter's weights as the revision, because the head of the untrained
    model is the adapter's.

    Raises:
        UserError: a folder without weights or without a head, or an adapter of another base than `params.base`.
    """
    if not is_adapter(folder) and (folder / "config.json").is_file():
        return {"trained": _merged(params, folder)}
    require_adapter(folder)
    base = ensure_base(params)
    require_base(params, folder)
    names = [("trained", NAME)] + [("untrained", f"{NAME}-untrained")] * params.eval_untrained
    return {which: _adapter(params, base, folder, which == "trained", name) for which, name in names}


def _adapter(params: Params, base: str, folder: Path, trained: bool, name: str) -> Subject:
    revision = content_hash(folder / "adapter_model.safetensors")[:40]
    what = {"adapter": content_hash(folder), "base": read_data_file(MANIFEST)["base"], "trained": trained}
    known = read_identity(folder).get("params", {})

    def encoder() -> ColIntern3_5Encoder:
        return _encoder(params, load_adapter(params, base, folder, trained), folder, name, revision, identity)

    identity = _identity(params, what)
    return Subject(name, revision, identity, known, encoder)


def _merged(params: Params, folder: Path) -> Subject:
    require_merged(folder)
    what = {"merged": content_hash(folder)}

    def encoder() -> ColIntern3_5Encoder:
        return _encoder(params, load_merged(params, folder), folder, NAME, what["merged"][:40], identity)

    identity = _identity(params, what)
    return Subject(NAME, what["merged"][:40], identity, {}, encoder)


def _encoder(
    params: Params, model: nn.Module, folder: Path, name: str, revision: str, identity: dict[str, Any]
) -> ColIntern3_5Encoder:
    require_finite(model, folder)
    processor = load_processor(params, folder, model)
    features = PageFeatures(model, processor, root() / FEATURES, params.feature_cache_gb, params.feature_cache_format)
    settings = {key: value for key, value in identity["params"].items() if key not in ("pool_factor", "dim")}
    kept = fingerprint(identity | {"params": settings})  # what is kept is neither pooled nor cut
    embeddings = TensorCache(root() / EMBEDDINGS, kept, int(params.embedding_cache_gb * 1e9))
    return ColIntern3_5Encoder(model, processor, name, revision, features, embeddings, params.pool_factor, params.dim)


def _identity(params: Params, what: dict[str, Any]) -> dict[str, Any]:
    """The sizes of the caches are not in it, because they change no result."""
    settings = {
        "pool_factor": params.pool_factor,
        "dim": params.dim,
        "attention": params.attention,
        "dtype": params.dtype,
        "eval_batch_size": params.eval_batch_size,
        "feature_cache_format": params.feature_cache_format,
        "max_query_tokens": params.max_query_tokens,
        "max_visual_tokens": params.max_visual_tokens,
        "threads": params.threads,
    }
    return what | {"kernel": get_kernel_entry(params.attention), "params": settings} | surroundings()


def surroundings() -> dict[str, Any]:
    """What decides scores beside the model and its settings: code, libraries, device."""
    return {
        "code": stage_code("eval"),
        "versions": get_stage_versions("eval"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
