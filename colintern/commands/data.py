"""`colintern data`: print what is in the data."""

import argparse

from colintern.params import load_params

SUMMARY = "show what fetch-data found in the data"
EXAMPLE = "colintern data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments."""


def run(args: argparse.Namespace) -> None:
    """Print the survey of the data that params name."""
    from colintern.data.training_set import read_training_manifest
    from colintern.statistics.dataset_stats import format_stats, load_dataset_stats
    from colintern.storage.manifest import QUARANTINE, ensure_benchmark, is_local_benchmark, read_data_file

    params = load_params()
    read_training_manifest(params)  # refuses the survey of other data than params name
    for name in filter(is_local_benchmark, params.benchmarks):
        ensure_benchmark(name)
    print(format_stats(load_dataset_stats(params.max_visual_tokens, params.tiling), read_data_file(QUARANTINE)["rows"]))
