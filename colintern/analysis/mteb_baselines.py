"""Find published late-interaction models in mteb's registry, for comparison.

Embeddings, formats and scores are those of mteb's loader, at the revision that mteb pins: what its leaderboard shows.
"""

import difflib
from importlib.metadata import version

import mteb
from mteb.models import ModelMeta
from mteb.models.model_implementations import MODEL_REGISTRY

from colintern.core.errors import UserError
from colintern.evaluation.models import EvalModel, get_runtime_identity
from colintern.params import Params
from colintern.storage.hub import describe_hub_error


def find_mteb_baseline(params: Params, model: str) -> EvalModel | None:
    """Find the model of mteb's registry with this name, NAME or NAME@REVISION; None if mteb has none.

    Raises:
        UserError: it does not embed pages as many vectors, or is not pinned, or another revision or
            another size of embeddings is requested.
    """
    name, _, revision = model.partition("@")
    meta = MODEL_REGISTRY.get(name)
    if meta is None:
        return None
    if not _is_late_interaction(meta):
        raise UserError(
            f"MODEL: {name!r} is no late-interaction model of page images in mteb {mteb.__version__} "
            f"({', '.join(meta.model_type)}; {', '.join(meta.modalities)}); {suggest_baselines(name)}"
        )
    if meta.revision is None or meta.loader is None or (revision and revision != meta.revision):
        raise UserError(f"MODEL: {model!r}: mteb {mteb.__version__} loads {name} at {meta.revision}, and at no other")
    size = params.pool_factor, params.dim, params.embedding_precision, params.rescore_top_k
    if size != (1, 128, "float32", 0):
        raise UserError(
            f"pool_factor, dim, embedding_precision, rescore_top_k: {', '.join(map(str, size))} are of our own "
            f"embeddings, and {name} has its own; give --pool-factor 1 --dim 128 --precision float32 --rescore 0"
        )

    def load_encoder() -> object:
        try:
            return mteb.get_model(name, revision=meta.revision)
        except (ImportError, OSError) as error:
            raise UserError(f"MODEL: mteb cannot load {name!r}: {describe_hub_error(error)}") from error

    settings = {"eval_batch_size": params.eval_batch_size, "threads": params.threads}
    engine = {"colpali-engine": version("colpali-engine")}
    identity = {"peer": name, "revision": meta.revision, "params": settings, "engine": engine}
    return EvalModel(name, meta.revision, identity | get_runtime_identity(), {}, load_encoder)


def suggest_baselines(name: str) -> str:
    """Name the late-interaction models of mteb whose names are most like `name`, for an error."""
    metas = filter(_is_late_interaction, MODEL_REGISTRY.values())
    names = {meta.name.lower(): meta.name for meta in metas if meta.name}
    matches = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.0)
    return f"the nearest of those: {', '.join(names[match] for match in matches)}"


def _is_late_interaction(meta: ModelMeta) -> bool:
    return "late-interaction" in meta.model_type and {"text", "image"} <= set(meta.modalities)
