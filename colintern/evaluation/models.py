"""Models to evaluate: a trained adapter, its base before training, a merged model; loaded only when they are needed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from colintern.core.project import root
from colintern.encoding.page_features import FEATURES_DIR, PageFeatures
from colintern.encoding.tensor_cache import TensorCache
from colintern.evaluation.mteb_encoder import ColIntern3_5Encoder
from colintern.modeling.adapter_files import is_adapter
from colintern.modeling.loading import (
    load_adapter,
    load_merged,
    load_processor,
    require_adapter,
    require_finite,
    require_merged,
    require_same_base,
)
from colintern.modeling.retriever import ColIntern3_5
from colintern.params import Params
from colintern.storage.identity import content_hash, fingerprint, get_stage_versions, read_identity, stage_code
from colintern.storage.manifest import MANIFEST, ensure_base, get_kernel_entry, read_data_file

MODEL_NAME = "colintern/colintern3_5"
EMBEDDINGS = Path("data/.embeddings")  # deleting it costs only time


class EvalModel(NamedTuple):
    """A model to evaluate."""

    name: str  # "organisation/model" in mteb's files, as is the next
    revision: str
    identity: dict[str, Any]  # all that decides its scores but the data
    params: dict[str, object]  # what it was trained with, as far as is known
    load_encoder: Callable[[], Any]  # ColIntern3_5Encoder, or what mteb loads
    reads_text: bool = False  # of pages, not their images
    fused: tuple["EvalModel", ...] = ()  # models whose rankings it fuses, evaluated before; nothing is loaded then


def make_eval_models(params: Params, folder: Path) -> dict[str, EvalModel]:
    """Describe the models that the folder of an adapter or of a merged model gives.

    mteb's files of both carry the hash of the adapter's weights as the revision, because the head of the untrained
    model is the adapter's.

    Returns:
        "trained" and, of an adapter if `params.eval_untrained`, "untrained": the base with the same head.

    Raises:
        UserError: a folder without weights or without a head, or an adapter of another base than `params.base`.
    """
    if not is_adapter(folder) and (folder / "config.json").is_file():
        require_merged(folder)
        digest = content_hash(folder)
        loader = partial(load_merged, params, folder)
        return {"trained": _make_model(params, folder, MODEL_NAME, digest[:40], {"merged": digest}, {}, loader)}
    require_adapter(folder)
    base = ensure_base(params)
    require_same_base(params, folder)
    revision = content_hash(folder / "adapter_model.safetensors")[:40]
    weights = {"adapter": content_hash(folder), "base": read_data_file(MANIFEST)["base"]}
    trained_with = read_identity(folder).get("params", {})
    models = {}
    for is_trained in (True, False) if params.eval_untrained else (True,):
        which, name = ("trained", MODEL_NAME) if is_trained else ("untrained", f"{MODEL_NAME}-untrained")
        loader = partial(load_adapter, params, base, folder, is_trained)
        identity = weights | {"trained": is_trained}
        models[which] = _make_model(params, folder, name, revision, identity, trained_with, loader)
    return models


def _make_model(
    params: Params,
    folder: Path,
    name: str,
    revision: str,
    weights: dict[str, object],
    trained_with: dict[str, object],
    load_model: Callable[[], ColIntern3_5],
) -> EvalModel:
    settings = {  # the sizes of the caches are not among them, because they change no result
        "attention": params.attention,
        "dtype": params.dtype,
        "eval_batch_size": params.eval_batch_size,
        "feature_cache_format": params.feature_cache_format,
        "max_query_tokens": params.max_query_tokens,
        "max_visual_tokens": params.max_visual_tokens,
        "threads": params.threads,
        "tiling": params.tiling,
    }
    sizes = {
        "pool_factor": params.pool_factor,
        "dim": params.dim,
        "embedding_precision": params.embedding_precision,
        "rescore_top_k": params.rescore_top_k,
    }
    identity = weights | {"kernel": get_kernel_entry(params.attention), "params": settings | sizes}
    identity |= get_runtime_identity()

    def load_encoder() -> ColIntern3_5Encoder:
        model = load_model()
        require_finite(model, folder)
        processor = load_processor(params, folder, model)
        cache = root() / FEATURES_DIR
        features = PageFeatures(model, processor, cache, params.feature_cache_gb, params.feature_cache_format)
        shard = fingerprint(identity | {"params": settings})  # cached embeddings are neither pooled nor truncated
        embeddings = TensorCache(root() / EMBEDDINGS, shard, int(params.embedding_cache_gb * 1e9))
        return ColIntern3_5Encoder(
            model, processor, name, revision, features, embeddings, params.pool_factor, params.dim,
            params.embedding_precision, params.rescore_top_k,
        )  # fmt: skip

    return EvalModel(name, revision, identity, trained_with, load_encoder)


def get_runtime_identity() -> dict[str, object]:
    """Return what decides scores beside the model and its settings: code, libraries, device."""
    return {
        "code": stage_code("eval"),
        "versions": get_stage_versions("eval"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
