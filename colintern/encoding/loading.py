"""Load what embeds pages: the model of a folder, its processor, and the cache of page features."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from colintern.core.project import root
from colintern.encoding.embed import embed_features
from colintern.encoding.multi_process import EmbedBatch, call_at_exit
from colintern.encoding.page_features import FEATURES_DIR, Page, PageFeatures
from colintern.modeling.loading import load_adapter, load_merged, read_processor, require_finite
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.modeling.retriever import ColIntern3_5
from colintern.modeling.runtime import configure_cpu_runtime
from colintern.params import Params


class EncoderSettings(NamedTuple):
    """The keys of params.yaml that decide how a model is loaded, and how pages are embedded and kept."""

    base: str
    base_revision: str
    max_visual_tokens: int
    tiling: str
    max_query_tokens: int
    dtype: str
    attention: str
    launch: int | str
    eval_batch_size: int
    pool_factor: int
    dim: int
    embedding_precision: str
    rescore_top_k: int
    feature_cache_gb: float
    feature_cache_format: str
    embedding_cache_gb: float
    threads: int


def get_encoder_settings(params: Params) -> EncoderSettings:
    """Return the settings of a params.yaml."""
    return EncoderSettings(
        base=params.base,
        base_revision=params.base_revision,
        max_visual_tokens=params.max_visual_tokens,
        tiling=params.tiling,
        max_query_tokens=params.max_query_tokens,
        dtype=params.dtype,
        attention=params.attention,
        launch=params.launch,
        eval_batch_size=params.eval_batch_size,
        pool_factor=params.pool_factor,
        dim=params.dim,
        embedding_precision=params.embedding_precision,
        rescore_top_k=params.rescore_top_k,
        feature_cache_gb=params.feature_cache_gb,
        feature_cache_format=params.feature_cache_format,
        embedding_cache_gb=params.embedding_cache_gb,
        threads=params.threads,
    )


class PageEncoder(NamedTuple):
    """A loaded model, its processor, and its page features."""

    model: ColIntern3_5
    processor: ColIntern3_5Processor
    features: PageFeatures

    def embed_batch(self, pages: Sequence[Page]) -> list[Tensor]:
        """Embed pages in one batch to one (tokens, 128) float32 tensor each, on the CPU."""
        return embed_features(self.model, self.processor, map(self.features, pages), len(pages))


def load_page_encoder(settings: EncoderSettings, folder: Path, base: str | None, trained: bool = True) -> PageEncoder:
    """Load an adapter or merged model, to the GPU if there is one.

    Args:
        settings: how.
        folder: of the adapter or merged model.
        base: where `manifest.ensure_base` found the weights of an adapter's base; None: `folder` is a merged model.
        trained: whether an adapter's LoRA is loaded too.

    Raises:
        UserError: weights that are missing, do not fit or are not finite; see `read_processor`.
    """
    configure_cpu_runtime(settings.threads)
    if base is None:
        model = load_merged(folder, settings.dtype, settings.attention)
    else:
        model = load_adapter(folder, base, settings.base_revision, settings.dtype, settings.attention, trained)
    require_finite(model, folder)
    bounds = {"max_visual_tokens": settings.max_visual_tokens, "max_query_tokens": settings.max_query_tokens}
    processor = read_processor(folder, model, **bounds, tiling=settings.tiling)
    cache = root() / FEATURES_DIR
    features = PageFeatures(model, processor, cache, settings.feature_cache_gb, settings.feature_cache_format)
    return PageEncoder(model, processor, features)


def load_batch_embedder(load: Callable[[], PageEncoder]) -> EmbedBatch[Page]:
    """Load a model in a process of an `EmbeddingPool`, which writes its cache when it exits."""
    encoder = load()
    call_at_exit(encoder.features.cache.flush)
    return encoder.embed_batch
