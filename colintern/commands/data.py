"""`colintern data`: what is in the data."""

import argparse

from colintern.params import load

SUMMARY = "show what fetch-data found in the data"
EXAMPLE = "colintern data"


def arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> None:
    from colintern.data.inventory import inventory, table
    from colintern.files.manifest import QUARANTINE, read

    found = inventory(load())
    print(table(found, read(QUARANTINE)["rows"]))
