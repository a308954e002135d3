"""Train, evaluate and compare ColIntern3.5 visual document retrievers.

core/        errors, the project's folder, rules of values, the import graph, text for a terminal, progress
params       params.yaml as a validated object
storage/     bytes on disk: hub downloads, hashes, the manifest, locks
scoring/     MaxSim scores and ranking metrics
modeling/    the model, its processor, tiling, LoRA, attention, loading and saving
encoding/    pages and queries as vectors: page features, their caches, pooling
stores/      page vectors in parquet files, Qdrant and LanceDB
data/        readers of training rows and evaluation sets
ingest/      from a source (PDFs, JSON lines, parquet files, a hub) to validated rows and a manifest
statistics/  the data described: counts, histograms, languages
training/    from rows to an adapter: mini-batches, loss, the step, checkpoints, hard-negative mining
evaluation/  from an adapter to scores: the mteb encoder, tasks, per-query results
analysis/    finished evaluations: significance, comparison, baselines, bands
monitoring/  callbacks of a training run: health rules, throughput, progress, trackers
planning/    the cost of a run on a GPU, before it starts
preflight/   checks of settings, machine and adapter, before a run starts
reporting/   the report with heatmaps, plots, the model card
search/      an index over the pages of a folder, ranked for a query; a search page for a browser
tuning/      hyperparameter search: space, study, trials, pruning
commands/    `colintern NAME`, a module each
__main__     the command line

Each package imports from those above it in this list and from its own; dvc.yaml names what each stage depends on.

`from colintern import ColIntern3_5, ColIntern3_5Processor` loads torch and transformers when it is used, not before.
"""

import sys
from importlib import import_module

_PUBLIC = {
    "ColIntern3_5": "colintern.modeling.retriever",
    "ColIntern3_5Processor": "colintern.modeling.processor",
}
# Adapters from before the packages name this module in adapter_config.json, and PEFT imports it.
sys.modules["colintern.model"] = sys.modules[__name__]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'colintern' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
