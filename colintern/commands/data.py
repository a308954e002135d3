"""`colintern data`: print what is in the data."""

import argparse

from colintern.params import load

SUMMARY = "show what fetch-data found in the data"
EXAMPLE = "colintern data"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments."""


def run(args: argparse.Namespace) -> None:
    """Print the survey of the data that params name."""
    from colintern.data.training_set import read_training_manifest
    from colintern.statistics.dataset_stats import format_stats, load_dataset_stats
    from colintern.storage.manifest import QUARANTINE, benchmark_folder, local, read

    params = load()
    read_training_manifest(params)  # refuses the survey of other data than params name
    for name in filter(local, params.benchmarks):
        benchmark_folder(name)
    print(format_stats(load_dataset_stats(params.max_visual_tokens), read(QUARANTINE)["rows"]))
