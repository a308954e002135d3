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
    from colintern.storage.manifest import QUARANTINE, benchmark_folder, local, read

    params = load()
    made_for(params)  # the survey of other data shall not pass for that of params
    for name in filter(local, params.benchmarks):
        benchmark_folder(name)
    found = inventory(params.max_visual_tokens)
    print(table(found, read(QUARANTINE)["rows"]))
