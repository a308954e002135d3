"""From an adapter to numbers: mteb's tasks, per-query scores, verdicts, comparisons."""
