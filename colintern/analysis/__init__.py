"""Read finished evaluations: significance, comparisons, baselines, tables. Nothing here decides a result."""
