"""Train, evaluate and compare ColIntern3.5 visual document retrievers.

core/        errors, the project's folder, rules of values, text for a terminal, progress
params       params.yaml as a checked object
storage/     bytes on disk: what is fetched from a hub, hashed, listed, locked
scoring/     MaxSim scores and ranking metrics
modeling/    the model, its processor, tiling, LoRA, attention, loading and saving
encoding/    pages and queries as vectors: page features, their caches, pooling, the check of an adapter
data/        from sources to checked rows
monitoring/  a run observed: rules on its curve, throughput, progress, trackers
training/    from rows to an adapter: batches, loss, the step, checkpoints
evaluation/  from an adapter to numbers: the mteb encoder, tasks, per-query scores, comparisons
search/      the pages of a folder, indexed once, ranked for a query
planning/    before a run: what it will cost, what fits
preflight/   before a run: what would go wrong
reporting/   what people look at: a report with heatmaps, what was found, a model's card
tuning/      a search over settings: its space, its study, its trials, what it found
commands/    `colintern NAME`, a module each
__main__     finds them

Each imports from those above it in this list and from its own; dvc.yaml says which stage reaches what.

`from colintern import ColIntern3_5, ColIntern3_5Processor` loads torch and transformers when it is used, not before.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "ColIntern3_5": "colintern.modeling.modeling_colintern",
    "ColIntern3_5Processor": "colintern.modeling.processing_colintern",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'colintern' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
