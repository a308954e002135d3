"""From an adapter to numbers: the mteb encoder, tasks, per-query scores, verdicts, comparisons."""
