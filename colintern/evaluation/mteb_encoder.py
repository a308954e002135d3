"""ColIntern3.5 as mteb sees it: an encoder of queries and page images whose similarity is MaxSim.

In a program of one's own, in any working folder, without a params.yaml:

    from colintern.evaluation.mteb_encoder import load, register
    mteb.evaluate(load("experiments/colintern"), mteb.get_tasks(["VidoreDocVQARetrieval"]))
    register("experiments/colintern", "colintern/mine")      # from now on mteb knows it:
    model = mteb.get_model("colintern/mine", pool_factor=3)
"""

from functools import partial
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from torch import Tensor, nn
from torch.utils.data import DataLoader

from colintern.core.errors import UserError
from colintern.core.progress import ProgressBar
from colintern.encoding.embed import embed_features, embed_pages, embed_queries
from colintern.encoding.page_features import Page, PageFeatures
from colintern.encoding.pooling import pool_tiles, truncate_dim
from colintern.encoding.tensor_cache import TensorCache
from colintern.modeling.loading import PretrainedRef, read_processor
from colintern.scoring.maxsim import maxsim_scores

LENGTHS = "-lengths"  # of the key under which a batch keeps how many vectors each page has


class ColIntern3_5Encoder(AbsEncoder):
    """What `mteb.evaluate` takes as a model.

    Args:
        model, processor: see `colintern.encoding.embed`.
        name: what the model is called in mteb's files: "organisation/model".
        revision: tells weights apart under one name, for example a hash of them.
        features: where the pages' features come from; without it each page goes through the whole model.
        embeddings: where those of pages are kept; a batch is taken from it if it was embedded as the same batch before.
        pool_factor, dim: see `colintern.encoding.pooling`; 1 and 128 leave the embeddings as they are.
        settings: of `load`, by which mteb's files tell results apart; the pipeline tells its own apart by folder.

    `page_count` and `vector_count` say what was encoded.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        name: str,
        revision: str,
        features: PageFeatures | None = None,
        embeddings: TensorCache | None = None,
        pool_factor: int = 1,
        dim: int = 128,
        settings: dict[str, Any] | None = None,
    ):
        self.model = model
        self.processor = processor
        self.features = features
        self.embeddings = embeddings
        self.pool_factor, self.dim = pool_factor, dim
        self.page_count = self.vector_count = 0
        # LoRA adds none: merging it into the layers changes no vector.
        parameters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
        self.mteb_model_meta = _meta(name, revision, parameters, settings=settings)

    def encode(  # type: ignore[override]  # a list: one padded tensor would take the longest page's memory for each page
        self, inputs: DataLoader, *, task_metadata: TaskMetadata, prompt_type: PromptType | None = None, **kwargs: Any
    ) -> list[Tensor]:
        """One (tokens, dim) float32 tensor for each query or page, on the CPU, in the loader's order.

        mteb hands what `encode` returns to `similarity` untouched, so nothing is padded. Its prompts are ignored: a
        query is formatted by the processor alone, as in training.

        Raises:
            UserError: a page without an image, named by its id.
            ValueError: a batch of neither text queries nor page images.
        """
        rows: list[Tensor] = []
        what = "pages" if prompt_type == PromptType.document else "queries"
        for batch in ProgressBar(inputs, desc=f"{task_metadata.name}: {what}"):
            if prompt_type == PromptType.query and "text" in batch:
                found = embed_queries(self.model, self.processor, batch["text"], len(batch["text"]))
                rows += truncate_dim(found, self.dim)
            elif prompt_type == PromptType.document and "image" in batch:
                for page, image in zip(batch["id"], batch["image"], strict=True):
                    if image is None:
                        raise UserError(f"page {page} of the evaluation corpus has no image; remove or repair its row")
                rows += self.smaller(self.pages(batch["image"]))
            else:
                raise ValueError(f"{prompt_type}: expected queries as text or pages as images, got {sorted(batch)}")
        for cache in (self.features and self.features.cache, self.embeddings):
            if cache:
                cache.flush()
        return rows

    def smaller(self, pages: list[Tensor]) -> list[Tensor]:
        """What of `pages` is ranked by: pooled and cut."""
        if self.pool_factor > 1:
            tile, before = self.processor.image_seq_length, self.processor.num_tokens_before_tiles
            pages = [pool_tiles(page, self.pool_factor, tile, before) for page in pages]
        rows = truncate_dim(pages, self.dim)
        self.page_count, self.vector_count = self.page_count + len(rows), self.vector_count + sum(map(len, rows))
        return rows

    def pages(self, images: list[Any]) -> list[Tensor]:
        """One (tokens, 128) float32 tensor for each page image, on the CPU, neither pooled nor cut.

        Computed or kept: a batch as a whole, because its size decides the last bits.
        """
        if self.features is None:
            return embed_pages(self.model, self.processor, images, len(images))
        keyed = [Page.from_image(image) for image in images]
        key = sha256(" ".join(page.key for page in keyed).encode()).hexdigest()
        if self.embeddings:
            rows, lengths = self.embeddings.get(key), self.embeddings.get(key + LENGTHS)
            if rows is not None and lengths is not None:
                return list(rows.split(lengths.tolist()))
        found = embed_features(self.model, self.processor, map(self.features, keyed), len(keyed))
        if self.embeddings:
            self.embeddings.put(key, torch.cat(found))
            self.embeddings.put(key + LENGTHS, torch.tensor([len(row) for row in found]))
        return found

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """MaxSim of queries with pages, (queries, pages) float32; each argument is as `encode` returns it."""
        return maxsim_scores(list(embeddings1), list(embeddings2), next(self.model.parameters()).device)


def _meta(
    name: str, revision: str, parameters: int | None, loader: Any = None, settings: dict[str, Any] | None = None
) -> ModelMeta:
    return ModelMeta(
        loader=loader,
        name=name,
        revision=revision,
        experiment_kwargs=_apart(settings or {}),
        release_date=None,
        languages=None,
        n_parameters=parameters,
        memory_usage_mb=None,
        max_tokens=None,
        embed_dim=None,
        license=None,
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction.MAX_SIM,
        use_instructions=False,
        training_datasets=None,
        modalities=["text", "image"],
        model_type=["late-interaction"],
    )


def _apart(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Those that decide scores and are not `load`'s own: mteb's cache would give one setting's score for another's, if
    name and revision were all."""
    plain = {key: one.default for key, one in signature(load).parameters.items() if key not in ("base", "device")}
    return {key: settings[key] for key in plain if key in settings and settings[key] != plain[key]} or None


def load(
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
) -> ColIntern3_5Encoder:
    """What `mteb.evaluate` takes, of a model's own folder alone; reads no params.yaml and keeps nothing on disk.

    Args:
        model: folder of an adapter or of a merged model, or ID@COMMIT on the hub.
        base, dtype, merge, device: see `colintern.modeling.loading.PretrainedRef.load`.
        max_visual_tokens, max_query_tokens: see `ColIntern3_5Processor`; None: the bounds it was trained with.
        pool_factor, dim: see `ColIntern3_5Encoder`; 1 to 64, and 1 to 128.

    mteb's files call it colintern/<folder's name>, at a hash of its weights; one on the hub by its id and commit. The
    settings asked for, but for base and device, are its `experiment_kwargs`, by which mteb keeps results apart.

    Raises:
        UserError: a setting that is not valid; see `PretrainedRef.resolve` and `PretrainedRef.load`.
    """
    for key, value, most in (("pool_factor", pool_factor, 64), ("dim", dim, 128)):
        if not 1 <= value <= most:
            raise UserError(f"{key}: {value} is not valid; it must be 1 to {most}")
    found = PretrainedRef.resolve(model)
    bounds: dict[str, Any] = {"max_visual_tokens": max_visual_tokens, "max_query_tokens": max_query_tokens}
    loaded = found.load(base, dtype, merge, device)
    given = {key: value for key, value in bounds.items() if value is not None}
    processor = read_processor(found.folder, loaded, **given)
    asked = {"dtype": dtype, "merge": merge, **bounds, "pool_factor": pool_factor, "dim": dim}
    name = _name(model)
    return ColIntern3_5Encoder(
        loaded, processor, name, found.revision, pool_factor=pool_factor, dim=dim, settings=asked
    )


def register(model: str | Path, name: str | None = None, **settings: Any) -> ModelMeta:
    """Make a model known to mteb, for this process: `mteb.get_model(name)` then loads it.

    mteb has no function for it: its registry, which `get_model` and `get_model_metas` read, is the dictionary that
    its own models are collected in.

    Args:
        model: as in `load`.
        name: in mteb's form, "organisation/model"; None: as in `load`.
        settings: of `load`; those that are given to `mteb.get_model` come before them, and mteb writes both into its
            files, as `experiment_kwargs`. mteb's own `embed_dim` is our `dim`.

    Raises:
        UserError: see `PretrainedRef.resolve`; a name that is none, or that another model has.
    """
    name = name or _name(model)
    if name.count("/") != 1:
        raise UserError(f"name: {name!r} is not valid; it must be organisation/model, such as colintern/mine")
    known = MODEL_REGISTRY.get(name)
    if known is not None and getattr(known.loader, "func", None) is not _load_registered:
        raise UserError(f"name: {name!r} is a model of mteb's own; choose another")
    if Path(model).is_dir():
        model = Path(model).resolve()
    loader = partial(_load_registered, model, settings)
    MODEL_REGISTRY[name] = _meta(name, PretrainedRef.resolve(model).revision, None, loader, settings)
    return MODEL_REGISTRY[name]


def _load_registered(
    model: str | Path, settings: dict[str, Any], name: str, revision: str, embed_dim: int | None = None, **asked: Any
) -> ColIntern3_5Encoder:
    """mteb calls it with the last three; an unknown setting is a TypeError of `load`."""
    if embed_dim is not None:
        asked["dim"] = embed_dim
    encoder = load(model, **settings | asked)
    meta = encoder.mteb_model_meta
    if meta and meta.revision != revision:
        raise UserError(f"{model}: its weights have changed since it was registered as {name}; register it again")
    return encoder


def _name(model: str | Path) -> str:
    return f"colintern/{Path(model).resolve().name}" if Path(model).is_dir() else str(model).partition("@")[0]
