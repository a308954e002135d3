"""Other people's late-interaction models, as mteb knows and loads them, so that they stand in the same table.

Embeddings, formats and scores are those of mteb's loader, at the revision that mteb pins: what its leaderboard shows.
"""

import difflib
from importlib.metadata import version
from typing import Any

import mteb
from mteb.models import ModelMeta
from mteb.models.model_implementations import MODEL_REGISTRY

from colintern.core.errors import UserError
from colintern.evaluation.subjects import Subject, surroundings
from colintern.params import Params
from colintern.storage.hub import describe_error


def peer(params: Params, model: str) -> Subject | None:
    """The model of mteb's registry that is called so, NAME or NAME@REVISION; None where mteb knows none.

    Raises:
        UserError: mteb knows it, but it embeds no pages as many vectors, or is not pinned, or is asked for at another
            revision or in another size.
    """
    name, _, revision = model.partition("@")
    meta = MODEL_REGISTRY.get(name)
    if meta is None:
        return None
    if not _late(meta):
        raise UserError(
            f"MODEL: {name!r} is no late-interaction model of page images in mteb {mteb.__version__} "
            f"({', '.join(meta.model_type)}; {', '.join(meta.modalities)}); {nearest(name)}"
        )
    if meta.revision is None or meta.loader is None or (revision and revision != meta.revision):
        raise UserError(f"MODEL: {model!r}: mteb {mteb.__version__} loads {name} at {meta.revision}, and at no other")
    if (params.pool_factor, params.dim) != (1, 128):
        raise UserError(
            f"pool_factor, dim: {params.pool_factor}, {params.dim} are sizes of our own embeddings, and {name} has its "
            f"own; give --pool-factor 1 --dim 128"
        )

    def encoder() -> Any:
        try:
            return mteb.get_model(name, revision=meta.revision)
        except (ImportError, OSError) as error:
            raise UserError(f"MODEL: mteb cannot load {name!r}: {describe_error(error)}") from error

    settings = {"eval_batch_size": params.eval_batch_size, "threads": params.threads}
    engine = {"colpali-engine": version("colpali-engine")}
    identity = {"peer": name, "revision": meta.revision, "params": settings, "engine": engine} | surroundings()
    return Subject(name, meta.revision, identity, {}, encoder)


def nearest(name: str) -> str:
    """The names of mteb's that are most like it, in words."""
    names = {meta.name.lower(): meta.name for meta in MODEL_REGISTRY.values() if meta.name and _late(meta)}
    found = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.0)
    return f"the nearest of those: {', '.join(names[one] for one in found)}"


def _late(meta: ModelMeta) -> bool:
    return "late-interaction" in meta.model_type and {"text", "image"} <= set(meta.modalities)
