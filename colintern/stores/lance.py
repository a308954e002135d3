"""Page vectors in a LanceDB table: a row a page, with a multivector column and no index, so that ranking is exact."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from colintern.core.errors import UserError
from colintern.stores.base import EmbeddedPage, PageStore, StoredPage
from colintern.stores.parquet import make_table

IDENTITY = b"colintern"  # in the schema's metadata
IDS_PER_DELETE = 1000


class LanceStore(PageStore):
    """A table of a LanceDB folder."""

    def __init__(self, folder: Path, table: str, identity: dict[str, Any] | None = None):
        super().__init__(f"lancedb://{folder}/{table}", folder, identity)
        try:
            import lancedb
        except ImportError as error:
            raise UserError("lancedb is not installed; install the extra `stores` of pyproject.toml") from error
        exists = (folder / f"{table}.lance").is_dir()
        if not exists and identity is None:
            raise UserError(f"{self.label}: does not exist; fill it with colintern embed --to")
        with self.convert_errors():
            database = lancedb.connect(str(folder))
            if not exists and identity is not None:
                database.create_table(table, schema=make_schema(identity))
            self.table: Any = database.open_table(table)
        kind = self.table.schema.field("vectors").type if self.get_identity() else None
        self.require_same_model(kind.value_type.list_size if kind else 0)

    def get_identity(self) -> dict[str, Any] | None:
        """Return the identity in the table's schema."""
        metadata = self.table.schema.metadata or {}
        if IDENTITY not in metadata:
            raise UserError(f"{self.label}: holds rows that colintern embed did not write; give another table")
        return json.loads(metadata[IDENTITY])

    def list_pages(self) -> dict[str, StoredPage]:
        """Return the stored pages by id."""
        fields = list(StoredPage._fields)
        with self.convert_errors():
            batches = self.table.search().select(fields).to_batches()
            return {row["id"]: StoredPage(**row) for batch in batches for row in batch.select(fields).to_pylist()}

    def upsert(self, rows: Sequence[EmbeddedPage]) -> None:
        """Add pages, and replace those with the same ids, in one transaction."""
        with self.convert_errors():
            table = make_table(rows).cast(self.table.schema.remove_metadata())
            self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(table)

    def delete(self, ids: Sequence[str]) -> None:
        """Remove pages."""
        for start in range(0, len(ids), IDS_PER_DELETE):
            quoted = ", ".join(f"'{id_}'" for id_ in ids[start : start + IDS_PER_DELETE])  # UUIDs
            with self.convert_errors():
                self.table.delete(f"id IN ({quoted})")

    def search(self, query: Tensor, top: int) -> list[tuple[str, float]]:
        """Rank all pages; LanceDB's distance is the sum of 1 - similarity over the query's tokens."""
        with self.convert_errors():
            found = self.table.search(query.float().numpy(), vector_column_name="vectors").distance_type("dot")
            hits = found.select(["id", "_distance"]).limit(top).to_list()
        return [(hit["id"], len(query) - hit["_distance"]) for hit in hits]


def make_schema(identity: dict[str, Any]) -> pa.Schema:
    """Return the schema of a table: what `make_table` returns, in the store's precision."""
    columns = {name: pa.int64() if name == "page" else pa.string() for name in StoredPage._fields}
    element = pa.float16() if identity["precision"] == "float16" else pa.float32()
    vectors = {"tokens": pa.int64(), "vectors": pa.list_(pa.list_(element, identity["dim"]))}
    return pa.schema(columns | vectors, metadata={IDENTITY: json.dumps(identity, sort_keys=True)})
