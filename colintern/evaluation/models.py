"""Models to evaluate: a trained adapter, its base before training, a merged model; loaded only when they are needed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from colintern.core.project import root
from colintern.encoding.loading import EncoderSettings, PageEncoder, load_page_encoder
from colintern.encoding.multi_process import EmbedBatch, EmbeddingPool, call_at_exit, count_workers
from colintern.encoding.tensor_cache import TensorCache
from colintern.evaluation.mteb_encoder import ColIntern3_5Encoder
from colintern.modeling.adapter_files import is_adapter
from colintern.modeling.loading import require_adapter, require_merged, require_same_base, require_same_tiling
from colintern.params import FULL_SIZE
from colintern.storage.identity import content_hash, fingerprint, get_stage_versions, read_identity, stage_code
from colintern.storage.manifest import MANIFEST, ensure_base, read_data_file

MODEL_NAME = "colintern/colintern3_5"
EMBEDDINGS = Path("data/.embeddings")  # deleting it costs only time
NON_IDENTITY_SETTINGS = {"base", "base_revision", "feature_cache_gb", "embedding_cache_gb", "launch"}


class EvalModel(NamedTuple):
    """A model to evaluate."""

    name: str  # "organisation/model" in mteb's files, as is the next
    revision: str
    identity: dict[str, Any]  # all that decides its scores but the data
    params: dict[str, object]  # what it was trained with, as far as is known
    load_encoder: Callable[[], Any]  # ColIntern3_5Encoder, or what mteb loads
    reads_text: bool = False  # of pages, not their images
    fused: tuple["EvalModel", ...] = ()  # models whose rankings it fuses, evaluated before; nothing is loaded then


def make_eval_models(settings: EncoderSettings, folder: Path, with_untrained: bool = False) -> dict[str, EvalModel]:
    """Describe the models that the folder of an adapter or of a merged model gives.

    mteb's files of both carry the hash of the adapter's weights as the revision, because the head of the untrained
    model is the adapter's.

    Returns:
        "trained" and, of an adapter if `with_untrained`, "untrained": the base with the same head.

    Raises:
        UserError: a folder without weights or without a head, or one that was trained on another base, with another
            tiling or another bound than those of `settings`.
    """
    is_merged = not is_adapter(folder) and (folder / "config.json").is_file()
    (require_merged if is_merged else require_adapter)(folder)
    require_same_tiling(folder, settings.max_visual_tokens, settings.tiling)
    if is_merged:
        digest = content_hash(folder)
        load = partial(load_page_encoder, settings, folder, None)
        return {"trained": _make_model(settings, MODEL_NAME, digest[:40], {"merged": digest}, {}, load)}
    base = ensure_base(settings.base, settings.base_revision)
    require_same_base(folder, settings.base, settings.base_revision)
    revision = content_hash(folder / "adapter_model.safetensors")[:40]
    weights = {"adapter": content_hash(folder), "base": read_data_file(MANIFEST)["base"]}
    trained_with = read_identity(folder).get("params", {})
    models = {}
    for is_trained in (True, False) if with_untrained else (True,):
        which, name = ("trained", MODEL_NAME) if is_trained else ("untrained", f"{MODEL_NAME}-untrained")
        load = partial(load_page_encoder, settings, folder, base, is_trained)
        models[which] = _make_model(settings, name, revision, weights | {"trained": is_trained}, trained_with, load)
    return models


def _make_model(
    settings: EncoderSettings,
    name: str,
    revision: str,
    weights: dict[str, object],
    trained_with: dict[str, object],
    load: Callable[[], PageEncoder],
) -> EvalModel:
    # The sizes of the caches and the number of processes are not in it, because they change no result.
    values = {key: value for key, value in settings._asdict().items() if key not in NON_IDENTITY_SETTINGS}
    identity = weights | {"params": values} | get_runtime_identity()
    full = identity | {"params": {key: value for key, value in values.items() if key not in FULL_SIZE}}
    shard = fingerprint(full)  # cached embeddings are neither pooled nor truncated
    load_encoder = partial(_load_encoder, settings, name, revision, shard, load)
    return EvalModel(name, revision, identity, trained_with, load_encoder)


def _load_encoder(
    settings: EncoderSettings, name: str, revision: str, shard: str, load: Callable[[], PageEncoder]
) -> ColIntern3_5Encoder:
    model, processor, features = load()
    embeddings = TensorCache(root() / EMBEDDINGS, shard, int(settings.embedding_cache_gb * 1e9))
    num_workers = count_workers(settings.launch)
    pool = None
    if num_workers > 1:
        load_worker = partial(_load_in_worker, partial(_load_encoder, settings, name, revision, shard, load))
        pool = EmbeddingPool(load_worker, num_workers)
    return ColIntern3_5Encoder(
        model, processor, name, revision, features, embeddings, settings.pool_factor, settings.dim,
        settings.embedding_precision, settings.rescore_top_k, pool=pool,
    )  # fmt: skip


def _load_in_worker(load_encoder: Callable[[], ColIntern3_5Encoder]) -> EmbedBatch[Image.Image]:
    encoder = load_encoder()
    call_at_exit(encoder.flush_caches)
    return encoder.embed_images


def get_runtime_identity() -> dict[str, object]:
    """Return what decides scores beside the model and its settings: code, libraries, device."""
    return {
        "code": stage_code("eval"),
        "versions": get_stage_versions("eval"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
