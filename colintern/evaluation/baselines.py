"""Models that a retriever is compared with: BM25 over the text of pages, their fusion, and any model that mteb loads.

Embeddings, formats and scores are those of mteb's loader, at the revision that mteb pins: what its leaderboard shows.
"""

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import mteb
from mteb.models import ModelMeta
from mteb.models.hybrid_wrappers import fuse_rrf
from mteb.models.model_implementations import MODEL_REGISTRY

from colintern.core.errors import UserError
from colintern.evaluation.models import EvalModel, get_runtime_identity
from colintern.evaluation.results import BM25, HYBRID, Rankings
from colintern.params import FULL_SIZE, Params
from colintern.storage.hub import describe_hub_error

BM25_MODEL = "mteb/baseline-bm25s"
# In mteb's words; a cross-encoder ranks what another model has found.
RETRIEVER_TYPES = {"dense", "sparse", "late-interaction", "hybrid"}


def add_baselines(params: Params, models: Mapping[str, EvalModel]) -> dict[str, EvalModel]:
    """Return the models with those of `params.baselines`, by their names there.

    Raises:
        UserError: a name that is not `bm25`, `hybrid`, or a model that mteb loads.
    """
    bm25 = find_mteb_baseline(params, BM25_MODEL)
    assert bm25 is not None
    baselines = {BM25: bm25, HYBRID: _fuse_models(models["trained"], bm25)}
    for name in params.baselines:
        if name not in baselines:
            baseline = find_mteb_baseline(params, name, "baselines")
            if baseline is None:
                raise UserError(
                    f"baselines: {name!r} is not {BM25}, {HYBRID} or a model that mteb {mteb.__version__} knows; "
                    f"{suggest_baselines(name)}"
                )
            baselines[name] = baseline
    wanted = [BM25, *params.baselines] if HYBRID in params.baselines else params.baselines
    return {**models, **{name: baselines[name] for name in wanted}}


def find_mteb_baseline(params: Params, model: str, key: str = "MODEL") -> EvalModel | None:
    """Find the model of mteb's registry with this name, NAME or NAME@REVISION; None if mteb has none.

    A model that takes no images reads the text of pages.

    Raises:
        UserError: it does not retrieve by text, or is not pinned, or another revision is requested; `key` says where.
    """
    name, _, revision = model.partition("@")
    meta = MODEL_REGISTRY.get(name)
    if meta is None:
        return None
    if not _is_retriever(meta):
        raise UserError(
            f"{key}: {name!r} does not retrieve pages by text in mteb {mteb.__version__} "
            f"({', '.join(meta.model_type)}; {', '.join(meta.modalities)}); {suggest_baselines(name)}"
        )
    if meta.revision is None or meta.loader is None or (revision and revision != meta.revision):
        raise UserError(f"{key}: {model!r}: mteb {mteb.__version__} loads {name} at {meta.revision}, and at no other")

    def load_encoder() -> object:
        _silence_bm25s()
        try:
            return mteb.get_model(name, revision=meta.revision)
        except (ImportError, OSError) as error:
            raise UserError(f"{key}: mteb cannot load {name!r}: {describe_hub_error(error)}") from error

    settings = {"eval_batch_size": params.eval_batch_size, "threads": params.threads}
    engine = {"colpali-engine": version("colpali-engine")}
    identity = {"peer": name, "revision": meta.revision, "params": settings, "engine": engine}
    reads_text = "image" not in meta.modalities
    return EvalModel(name, meta.revision, identity | get_runtime_identity(), {}, load_encoder, reads_text)


def require_full_size(params: Params, name: str) -> None:
    """Refuse sizes of our own embeddings for a model of mteb, which has its own."""
    size = {key: getattr(params, key) for key in FULL_SIZE}
    if size != FULL_SIZE:
        raise UserError(
            f"{', '.join(size)}: {', '.join(map(str, size.values()))} are of our own embeddings, and {name} has its "
            f"own; give --pool-factor 1 --dim 128 --precision float32 --rescore 0"
        )


def suggest_baselines(name: str) -> str:
    """Name the models of mteb that can be evaluated whose names are most like `name`, for an error."""
    metas = filter(_is_retriever, MODEL_REGISTRY.values())
    names = {meta.name.lower(): meta.name for meta in metas if meta.name}
    matches = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.0)
    return f"the nearest of those: {', '.join(names[match] for match in matches)}"


def _silence_bm25s() -> None:
    os.environ["DISABLE_TQDM"] = "1"  # read when it is imported
    import bm25s

    logging.getLogger(bm25s.__name__).setLevel(logging.WARNING)


def _is_retriever(meta: ModelMeta) -> bool:
    return "text" in meta.modalities and RETRIEVER_TYPES.issuperset(meta.model_type)


def _fuse_models(*models: EvalModel) -> EvalModel:
    identity = {"fused": [model.identity for model in models], "params": {}} | get_runtime_identity()
    name, revision = f"{models[0].name}-hybrid", models[0].revision
    return EvalModel(name, revision, identity, {}, lambda: None, fused=models)


class RankFusion:
    """Rank pages by reciprocal rank fusion of rankings of other models, with k = 60: a search model of mteb.

    Args:
        model: the hybrid, as `add_baselines` describes it.
        rankings: of the models that it fuses; a page below the `NUM_FUSED_PAGES` best of a ranking gets nothing for it.
    """

    def __init__(self, model: EvalModel, rankings: Sequence[Rankings]):
        self.rankings = rankings
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": model.name, "revision": model.revision, "modalities": ["text", "image"], "model_type": ["hybrid"]}
        )

    def index(self, corpus: object, **kwargs: Any) -> None:
        """Do nothing: the pages are ranked."""

    def search(self, queries: Any, *, hf_subset: str, **kwargs: Any) -> dict[str, dict[str, float]]:
        """Return the fused scores of each query's pages."""
        found = {}
        for query in queries["id"]:
            pages = [ranking[hf_subset, query] for ranking in self.rankings]
            positions = [{page: -float(position) for position, page in enumerate(ranked)} for ranked in pages]
            found[query] = dict(fuse_rrf(positions, [1.0] * len(positions)))
        return found
