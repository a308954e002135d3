"""`colintern data`: what is in the data."""

import argparse

from colintern.params import load

SUMMARY = "show what fetch-data found in the data"
EXAMPLE = "colintern data"


def arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> None:
    from colintern.data.trainset import made_for
    from colintern.statistics.inventory import inventory, table
    from colintern.storage.manifest import QUARANTINE, ensure_benchmark, is_local_benchmark, read_data_file

    params = load()
    made_for(params)  # the survey of other data shall not pass for that of params
    for name in filter(is_local_benchmark, params.benchmarks):
        ensure_benchmark(name)
    found = inventory(params.max_visual_tokens)
    print(table(found, read_data_file(QUARANTINE)["rows"]))
