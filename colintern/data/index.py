"""The rows that can be trained on, found once by fetch-data: training starts without reading a page.

Only names, keys and queries stand here; the images stay in their parquet files.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from colintern.core.errors import UserError

INDEX = "data/rows.parquet"


class Row(NamedTuple):
    """A query and where its page is: row `row` of `file` of a set, `page` the sha256 of the bytes of its image."""

    source: str  # the set, as train_data names it
    split: str  # train or dev
    file: str  # path below the set's folder
    row: int
    page: str
    query: str


def write(rows: Iterable[Row]) -> None:
    """Write the index, to the same bytes for the same rows (given one version of pyarrow)."""
    columns = list(zip(*rows, strict=True)) or [()] * len(Row._fields)
    types = [pa.int64() if name == "row" else pa.string() for name in Row._fields]
    arrays = [pa.array(values, kind) for values, kind in zip(columns, types, strict=True)]
    pq.write_table(pa.table(arrays, names=list(Row._fields)), INDEX, compression="zstd")


def read() -> list[Row]:
    """The index, in the order in which it was written.

    Raises:
        UserError: it is missing, or damaged.
    """
    if not Path(INDEX).is_file():
        raise UserError(f"{INDEX}: missing; run the stage that makes it: dvc repro fetch-data")
    try:
        # No threads: the data loader's processes are forked from this one.
        table = pq.read_table(INDEX, use_threads=False)
        return [Row(*values) for values in zip(*(table[name].to_pylist() for name in Row._fields), strict=True)]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{INDEX}: damaged: {str(error)[:200]}; make it again: dvc repro -f fetch-data") from error
