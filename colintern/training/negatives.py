"""Hard negatives as a file: for each training row, pages that score high and do not answer it.

One parquet row a training row: `query`, `page` (sha256 of the bytes of the row's page), `negatives` (the same of each
negative, the hardest first) and `scores` (MaxSim of each). The file's metadata says what made it.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from colintern.core.errors import UserError

SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("page", pa.string()),
        ("negatives", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
    ]
)
PROVENANCE = b"colintern"  # key of the file's metadata


class Mined(NamedTuple):
    """A row of the file."""

    query: str
    page: str
    negatives: list[str]
    scores: list[float]


def write(path: Path, rows: Sequence[Mined], provenance: dict[str, Any]) -> None:
    """Write the file, whole or not at all; `provenance`: what the negatives were made with, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([row._asdict() for row in rows], schema=SCHEMA)
    table = table.replace_schema_metadata({PROVENANCE: json.dumps(provenance, sort_keys=True)})
    partial = path.with_name(f".{path.name}.partial")
    parquet.write_table(table, partial)
    os.replace(partial, path)


def read(path: Path) -> dict[tuple[str, str], list[str]]:
    """(query, page) -> its negatives.

    Raises:
        UserError: not such a file.
    """
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise UserError(f"negatives_file: {path}: is not a parquet file: {error}") from error
    if not table.schema.equals(SCHEMA) or PROVENANCE not in (table.schema.metadata or {}):
        raise UserError(f"negatives_file: {path}: was not written by `colintern mine`; it has {table.schema.names}")
    columns = (table[name].to_pylist() for name in ("query", "page", "negatives"))
    return {(query, page): negatives for query, page, negatives in zip(*columns, strict=True)}
