"""ColIntern3.5 as mteb takes it: an encoder of queries and page images whose similarity is MaxSim.

In a program of your own, in any working folder, without a params.yaml:

    from colintern.evaluation.mteb_encoder import load_encoder, register_encoder
    mteb.evaluate(load_encoder("experiments/colintern"), mteb.get_tasks(["VidoreDocVQARetrieval"]))
    register_encoder("experiments/colintern", "colintern/mine")      # from now on mteb knows it:
    model = mteb.get_model("colintern/mine", pool_factor=3)
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from inspect import signature
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from colintern.core.errors import UserError
from colintern.core.progress import ProgressBar
from colintern.encoding.embed import embed_features, embed_pages, embed_queries
from colintern.encoding.multi_process import EmbeddingPool
from colintern.encoding.page_features import Page, PageFeatures
from colintern.encoding.pooling import pool_tiles, truncate_dim
from colintern.encoding.precision import dequantize, quantize
from colintern.encoding.tensor_cache import TensorCache
from colintern.modeling.loading import PretrainedRef, read_processor
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.params import PRECISIONS
from colintern.scoring.maxsim import maxsim_scores, rescore_best

LENGTHS_SUFFIX = "-lengths"  # of the key under which a batch's numbers of vectors a page are cached
SIZE_BOUNDS = {"pool_factor": (1, 64), "dim": (1, 128), "rescore_top_k": (0, 10**6)}
PAGES_PER_BLOCK = 64  # dequantized at once


class EncodedPage(NamedTuple):
    """A page as `ColIntern3_5Encoder.encode` returns it."""

    stored: Tensor  # see `colintern.encoding.precision.quantize`
    full: Tensor | None  # (tokens, 128) float32, neither pooled nor truncated, for rescoring


class ColIntern3_5Encoder(AbsEncoder):
    """A model that `mteb.evaluate` takes.

    `page_count`, `vector_count` and `query_count` count what was encoded, `scoring_seconds` the time in `similarity`.

    Args:
        model: see `colintern.encoding.embed`.
        processor: of the model.
        name: what the model is called in mteb's files: "organisation/model".
        revision: distinguishes weights under one name, for example a hash of them.
        features: computes the pages' features; without it each page goes through the whole model.
        embeddings: cache of the pages'; a batch is taken from it if it was embedded as the same batch before.
        pool_factor: see `colintern.encoding.pooling`; 1 leaves the embeddings as they are.
        dim: numbers kept of a vector; 128 is all of them.
        precision: of the pages' vectors in the ranking, see `colintern.encoding.precision`; queries stay float32.
        rescore_top_k: best pages of each query that are scored again with the full vectors; 0 for none.
        settings: of `load_encoder`, by which mteb's files distinguish results.
        pool: processes that do `embed_images` for `encode`; None: this process does.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: ColIntern3_5Processor,
        name: str,
        revision: str,
        features: PageFeatures | None = None,
        embeddings: TensorCache | None = None,
        pool_factor: int = 1,
        dim: int = 128,
        precision: str = "float32",
        rescore_top_k: int = 0,
        settings: Mapping[str, object] | None = None,
        pool: EmbeddingPool[Image.Image] | None = None,
    ):
        self.pool = pool or EmbeddingPool(lambda: self.embed_images, 1)
        self.model = model
        self.processor = processor
        self.features = features
        self.embeddings = embeddings
        self.pool_factor, self.dim = pool_factor, dim
        self.precision, self.rescore_top_k = precision, rescore_top_k
        self.reset_counts()
        # LoRA adds none: merging it into the layers changes no vector.
        num_parameters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
        self.mteb_model_meta = _make_meta(name, revision, settings or {}, n_parameters=num_parameters)

    def reset_counts(self) -> None:
        """Set the counts and the time to zero."""
        self.page_count = self.vector_count = self.query_count = 0
        self.scoring_seconds = 0.0

    def encode(  # type: ignore[override]  # a list: one padded tensor would take the longest page's memory for each page
        self, inputs: DataLoader, *, task_metadata: TaskMetadata, prompt_type: PromptType | None = None, **kwargs: Any
    ) -> list[Tensor] | list[EncodedPage]:
        """Encode queries to one (tokens, 128) float32 tensor each, or pages, on the CPU, in the loader's order.

        mteb hands the result to `similarity` untouched, so nothing is padded. mteb's prompts are ignored: a query is
        formatted by the processor alone, as in training.

        Raises:
            UserError: a page without an image, named by its id.
            ValueError: a batch of neither text queries nor page images.
        """
        rows: list[Any] = []
        if prompt_type == PromptType.document:
            for pages in self.pool.embed_batches(
                _iter_images(ProgressBar(inputs, desc=f"{task_metadata.name}: pages"))
            ):
                rows += map(
                    EncodedPage, self._compress_pages(pages), pages if self.rescore_top_k else [None] * len(pages)
                )
            self.flush_caches()
            return rows
        for batch in ProgressBar(inputs, desc=f"{task_metadata.name}: queries"):
            if prompt_type != PromptType.query or "text" not in batch:
                raise ValueError(f"{prompt_type}: expected queries as text or pages as images, got {sorted(batch)}")
            rows += embed_queries(self.model, self.processor, batch["text"], len(batch["text"]))
            self.query_count += len(batch["text"])
        return rows

    def flush_caches(self) -> None:
        """Write what the caches have not written yet."""
        for cache in (self.features and self.features.cache, self.embeddings):
            if cache:
                cache.flush()

    def close(self) -> None:
        """End the processes of `pool`."""
        self.pool.close()

    def _compress_pages(self, pages: list[Tensor]) -> list[Tensor]:
        """Pool, truncate and quantize embeddings of pages, and count them."""
        if self.pool_factor > 1:
            tile, before = self.processor.image_seq_length, self.processor.num_tokens_before_tiles
            pages = [pool_tiles(page, self.pool_factor, tile, before) for page in pages]
        rows = [quantize(page, self.precision) for page in truncate_dim(pages, self.dim)]
        self.page_count, self.vector_count = self.page_count + len(rows), self.vector_count + sum(map(len, rows))
        return rows

    def select_scored_vectors(self, pages: list[Tensor]) -> list[Tensor]:
        """Return the float32 vectors that decide the final score of a page among the best.

        With `rescore_top_k` these are `pages`, the result of `embed_images`, unchanged; without it they are pooled,
        truncated, and rounded to `precision`. The latter are counted as encoded pages.
        """
        if self.rescore_top_k:
            return pages
        return [dequantize(page, self.precision, self.dim) for page in self._compress_pages(pages)]

    def embed_images(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Embed page images to one (tokens, 128) float32 tensor each, on the CPU, neither pooled nor truncated.

        A batch is taken from the cache as a whole, because its size decides the last bits.
        """
        if self.features is None:
            return embed_pages(self.model, self.processor, images, len(images))
        pages = [Page.from_image(image) for image in images]
        key = sha256(" ".join(page.key for page in pages).encode()).hexdigest()
        if self.embeddings:
            rows, lengths = self.embeddings.get(key), self.embeddings.get(key + LENGTHS_SUFFIX)
            if rows is not None and lengths is not None:
                return list(rows.split(lengths.tolist()))
        embeddings = embed_features(self.model, self.processor, map(self.features, pages), len(pages))
        if self.embeddings:
            self.embeddings.put(key, torch.cat(embeddings))
            self.embeddings.put(key + LENGTHS_SUFFIX, torch.tensor([len(page) for page in embeddings]))
        return embeddings

    def similarity(self, embeddings1: Iterable[Tensor], embeddings2: Iterable[EncodedPage]) -> Tensor:
        """Compute MaxSim, (queries, pages) float32, of queries with pages, each as `encode` returns them."""
        start, device = perf_counter(), next(self.model.parameters()).device
        queries, pages = list(embeddings1), list(embeddings2)
        truncated = truncate_dim(queries, self.dim)
        blocks = []
        for first in range(0, len(pages), PAGES_PER_BLOCK):
            block = [
                dequantize(page.stored, self.precision, self.dim) for page in pages[first : first + PAGES_PER_BLOCK]
            ]
            blocks.append(maxsim_scores(truncated, block, device))
        scores = torch.cat(blocks, dim=1)
        if self.rescore_top_k:
            rescore_best(
                scores, queries, [page.full for page in pages if page.full is not None], self.rescore_top_k, device
            )
        self.scoring_seconds += perf_counter() - start
        return scores


def _iter_images(batches: Iterable[dict[str, Any]]) -> Iterator[list[Image.Image]]:
    """Yield the pages of each batch of mteb's loader; see `ColIntern3_5Encoder.encode` for the errors."""
    for batch in batches:
        if "image" not in batch:
            raise ValueError(f"pages: expected images, got {sorted(batch)}")
        for page, image in zip(batch["id"], batch["image"], strict=True):
            if image is None:
                raise UserError(f"page {page} of the evaluation corpus has no image; remove or repair its row")
        yield batch["image"]


def _make_meta(name: str, revision: str, settings: Mapping[str, object], **fields: object) -> ModelMeta:
    # Those that decide scores and are not the default's: mteb's cache would give one setting's score for another's, if
    # name and revision were all.
    defaults = {key: parameter.default for key, parameter in signature(load_encoder).parameters.items()}
    changed = {
        key: settings[key]
        for key, default in defaults.items()
        if key not in ("base", "device") and key in settings and settings[key] != default
    }
    return ModelMeta.create_empty(
        {
            "name": name,
            "revision": revision,
            "experiment_kwargs": changed or None,
            "open_weights": True,
            "framework": ["PyTorch"],
            "similarity_fn_name": ScoringFunction.MAX_SIM,
            "use_instructions": False,
            "modalities": ["text", "image"],
            "model_type": ["late-interaction"],
        }
        | fields
    )


def load_encoder(
    model: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    merge: bool = False,
    device: str | None = None,
    max_visual_tokens: int | None = None,
    max_query_tokens: int | None = None,
    pool_factor: int = 1,
    dim: int = 128,
    precision: str = "float32",
    rescore_top_k: int = 0,
) -> ColIntern3_5Encoder:
    """Load a model for `mteb.evaluate` from its own folder alone; reads no params.yaml and writes nothing to the disk.

    mteb's files call it colintern/<folder's name>, at a hash of its weights; one on the hub by its id and commit. The
    settings that are given, but for base and device, are its `experiment_kwargs`, by which mteb keeps results apart.

    Args:
        model: folder of an adapter or of a merged model, or ID@COMMIT on the hub.
        base: see `colintern.modeling.loading.PretrainedRef.load`, as are the next three.
        dtype: type of the weights.
        merge: fold the adapter into the weights.
        device: where it computes.
        max_visual_tokens: see `ColIntern3_5Processor`; None: the bound it was trained with.
        max_query_tokens: see `ColIntern3_5Processor`; None: the bound it was trained with.
        pool_factor: see `ColIntern3_5Encoder`; 1 to 64.
        dim: see `ColIntern3_5Encoder`; 1 to 128.
        precision: see `ColIntern3_5Encoder`; one of `colintern.params.PRECISIONS`.
        rescore_top_k: see `ColIntern3_5Encoder`.

    Raises:
        UserError: a setting that is not valid; see `PretrainedRef.resolve` and `PretrainedRef.load`.
    """
    for key, value in (("pool_factor", pool_factor), ("dim", dim), ("rescore_top_k", rescore_top_k)):
        low, high = SIZE_BOUNDS[key]
        if not low <= value <= high:
            raise UserError(f"{key}: {value} is not valid; it must be {low} to {high}")
    if precision not in PRECISIONS:
        raise UserError(f"precision: {precision!r} is not valid; it must be one of {', '.join(PRECISIONS)}")
    source = PretrainedRef.resolve(model)
    loaded = source.load(base, dtype, merge, device)
    bounds = {"max_visual_tokens": max_visual_tokens, "max_query_tokens": max_query_tokens}
    given = {key: value for key, value in bounds.items() if value is not None}
    processor = read_processor(source.folder, loaded, **given)
    size = {"pool_factor": pool_factor, "dim": dim, "precision": precision, "rescore_top_k": rescore_top_k}
    settings = {"dtype": dtype, "merge": merge, **bounds, **size}
    name, revision = _get_name(model), source.revision
    return ColIntern3_5Encoder(loaded, processor, name, revision, settings=settings, **size)  # type: ignore[arg-type]


def register_encoder(model: str | Path, name: str | None = None, **settings: Any) -> ModelMeta:
    """Make a model known to mteb, for this process: `mteb.get_model(name)` then loads it.

    Args:
        model: see `load_encoder`.
        name: organisation/model; None: as `load_encoder` names it.
        settings: of `load_encoder`, unless `mteb.get_model` is given others.
    """
    name = name or _get_name(model)
    if name.count("/") != 1:
        raise UserError(f"name: {name!r} is not valid; it must be organisation/model, such as colintern/mine")
    known = MODEL_REGISTRY.get(name)
    if known is not None and getattr(known.loader, "func", None) is not _load_registered:
        raise UserError(f"name: {name!r} is a model of mteb's own; choose another")
    if Path(model).is_dir():
        model = Path(model).resolve()
    loader = partial(_load_registered, model, settings)
    MODEL_REGISTRY[name] = _make_meta(name, PretrainedRef.resolve(model).revision, settings, loader=loader)
    return MODEL_REGISTRY[name]


def _load_registered(
    model: str | Path, settings: dict[str, Any], name: str, revision: str, embed_dim: int | None = None, **given: Any
) -> ColIntern3_5Encoder:
    """Load for mteb, which gives the last three; an unknown setting is a TypeError of `load_encoder`."""
    if embed_dim is not None:
        given["dim"] = embed_dim
    encoder = load_encoder(model, **settings | given)
    meta = encoder.mteb_model_meta
    if meta and meta.revision != revision:
        raise UserError(f"{model}: its weights have changed since it was registered as {name}; register it again")
    return encoder


def _get_name(model: str | Path) -> str:
    return f"colintern/{Path(model).resolve().name}" if Path(model).is_dir() else str(model).partition("@")[0]
