"""Read finished evaluations: significance, comparisons, baselines, bands. Nothing here decides a result."""
