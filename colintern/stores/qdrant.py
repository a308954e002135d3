"""Page vectors in Qdrant, on a server or in a folder: a point a page, a multivector compared by MaxSim.

In a folder it is the engine of qdrant-edge-py, which keeps vectors in mapped files; the local mode of qdrant-client
would load all of them into memory. No graph is built, so that ranking is exact.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from colintern.core.errors import UserError
from colintern.storage.files import read_json_object
from colintern.stores.base import EmbeddedPage, PageStore, StoredPage

IDENTITY = "identity"  # in the payload of each point, since servers before 1.16 keep none of a collection
FIELDS = [name for name in StoredPage._fields if name != "id"]
POINTS_PER_REQUEST = 1000
TIMEOUT_SECONDS = 60
# The engine grows several mapped files by 32 MiB; a write to a mapping on a full disk would kill the process.
MIN_FREE_BYTES = 256 * 2**20
MISSING = "does not exist; fill it with colintern embed --to"
EXTRA = "is not installed; install the extra `stores` of pyproject.toml"


class _QdrantStore(PageStore):
    """What a server and a folder share."""

    def _scroll(self, fields: list[str], limit: int, offset: Any) -> tuple[list[Any], Any]:
        raise NotImplementedError

    def get_identity(self) -> dict[str, Any] | None:
        """Return the identity in the payload of the first point."""
        points, _ = self._scroll([IDENTITY], 1, None)
        if not points:
            return None
        if IDENTITY not in (points[0].payload or {}):
            raise UserError(f"{self.label}: holds points that colintern embed did not write; give another collection")
        return json.loads(points[0].payload[IDENTITY])

    def list_pages(self) -> dict[str, StoredPage]:
        """Return the stored pages by id."""
        pages: list[StoredPage] = []
        offset = None
        while True:
            points, offset = self._scroll(FIELDS, POINTS_PER_REQUEST, offset)
            pages += [StoredPage(str(point.id), **point.payload) for point in points]
            if offset is None:
                return {page.id: page for page in pages}

    def _make_points(self, rows: Sequence[EmbeddedPage]) -> list[tuple[str, list[list[float]], dict[str, Any]]]:
        """Return id, vectors and payload of each page."""
        identity = json.dumps(self.identity, sort_keys=True)
        payloads = [{name: getattr(row.page, name) for name in FIELDS} | {IDENTITY: identity} for row in rows]
        return [(row.page.id, row.vectors.tolist(), payload) for row, payload in zip(rows, payloads, strict=True)]


class QdrantFolderStore(_QdrantStore):
    """A collection in a folder, which one process at a time may open."""

    batch_bytes = 8 * 2**20

    def __init__(self, folder: Path, identity: dict[str, Any] | None = None):
        super().__init__(f"qdrant+path://{folder}", folder, identity)
        try:
            import qdrant_edge as edge
        except ImportError as error:
            raise UserError(f"qdrant-edge-py {EXTRA}") from error
        self.edge, self.top, config = edge, folder, folder / "edge_config.json"
        if not config.is_file() and identity is None:
            raise UserError(f"{self.label}: {MISSING}")
        if not config.is_file() and identity is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._require_free_disk(0)
            kind = edge.VectorStorageDatatype
            vectors = edge.EdgeVectorParams(
                size=identity["dim"],
                distance=edge.Distance.Dot,
                memory=edge.Memory.Cold,
                multivector_config=edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim),
                datatype=kind.Float16 if identity["precision"] == "float16" else kind.Float32,
            )
            with self.convert_errors():
                edge.EdgeShard.create(str(folder), edge.EdgeConfig(vectors={"": vectors})).close()
        with self.convert_errors():
            self.shard = edge.EdgeShard.load(str(folder))
            dim = read_json_object(config)["vectors"][""]["size"]
        try:
            self.require_same_model(dim)
        except UserError:
            self.shard.close()  # else the folder stays locked as long as the error is kept
            raise

    def _require_free_disk(self, size: int) -> None:
        if shutil.disk_usage(self.top).free < MIN_FREE_BYTES + 4 * size:
            self.raise_disk_full()

    def _scroll(self, fields: list[str], limit: int, offset: Any) -> tuple[list[Any], Any]:
        with self.convert_errors():
            return self.shard.scroll(self.edge.ScrollRequest(offset=offset, limit=limit, with_payload=fields))

    def upsert(self, rows: Sequence[EmbeddedPage]) -> None:
        """Add pages, and replace those with the same ids."""
        self._require_free_disk(sum(row.vectors.nbytes for row in rows))
        with self.convert_errors():
            points = [self.edge.Point(*point) for point in self._make_points(rows)]
            self.shard.update(self.edge.UpdateOperation.upsert_points(points))
            self.shard.flush()

    def delete(self, ids: Sequence[str]) -> None:
        """Remove pages."""
        with self.convert_errors():
            self.shard.update(self.edge.UpdateOperation.delete_points(list(ids)))
            self.shard.flush()

    def search(self, query: Tensor, top: int) -> list[tuple[str, float]]:
        """Rank all pages."""
        with self.convert_errors():
            nearest = self.edge.Query.Nearest(query.tolist())
            return [(str(hit.id), hit.score) for hit in self.shard.query(self.edge.QueryRequest(top, query=nearest))]


class QdrantServerStore(_QdrantStore):
    """A collection of the server at `url`, http(s)://host:port; `api_key` may be ""."""

    batch_bytes = 4 * 2**20  # a server takes requests of 32 MB, and a number is up to 20 characters of JSON

    def __init__(self, url: str, collection: str, api_key: str = "", identity: dict[str, Any] | None = None):
        super().__init__(f"qdrant+{url}/{collection}", None, identity)
        try:
            from qdrant_client import QdrantClient, models
        except ImportError as error:
            raise UserError(f"qdrant-client {EXTRA}") from error
        self.models, self.collection, self.api_key = models, collection, api_key
        with self.convert_errors():
            self.client = QdrantClient(
                url=url, api_key=api_key or None, timeout=TIMEOUT_SECONDS, check_compatibility=False
            )
            exists = self.client.collection_exists(collection)
            if not exists and identity is None:
                raise UserError(f"{self.label}: {MISSING}")
            if not exists and identity is not None:
                self._create_collection(identity)
            vectors = self.client.get_collection(collection).config.params.vectors
        if not isinstance(vectors, models.VectorParams) or vectors.multivector_config is None:
            raise UserError(f"{self.label}: has no unnamed multivector; give another collection")
        self.require_same_model(vectors.size)

    def _create_collection(self, identity: dict[str, Any]) -> None:
        models = self.models
        vectors = models.VectorParams(
            size=identity["dim"],
            distance=models.Distance.DOT,
            multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
            datatype=models.Datatype.FLOAT16 if identity["precision"] == "float16" else models.Datatype.FLOAT32,
            on_disk=True,
            hnsw_config=models.HnswConfigDiff(m=0),
        )
        self.client.create_collection(self.collection, vectors_config=vectors)

    def describe_error(self, error: Exception) -> str:
        """Describe a server that refuses a request, or that does not answer."""
        status, message = getattr(error, "status_code", None), str(getattr(error, "content", error))
        message = message.replace(self.api_key, "***") if self.api_key else message
        if status is None:
            return f"cannot be reached: {message}; start the server, or correct the address"
        return f"the server answered {status}: {message}" + ("; set QDRANT_API_KEY" if status in (401, 403) else "")

    def _scroll(self, fields: list[str], limit: int, offset: Any) -> tuple[list[Any], Any]:
        with self.convert_errors():
            return self.client.scroll(self.collection, limit=limit, offset=offset, with_payload=fields)

    def upsert(self, rows: Sequence[EmbeddedPage]) -> None:
        """Add pages, and replace those with the same ids."""
        with self.convert_errors():
            points = [self.models.PointStruct(id=i, vector=v, payload=p) for i, v, p in self._make_points(rows)]
            self.client.upsert(self.collection, points, wait=True)

    def delete(self, ids: Sequence[str]) -> None:
        """Remove pages."""
        with self.convert_errors():
            for start in range(0, len(ids), POINTS_PER_REQUEST):
                selector = self.models.PointIdsList(points=list(ids[start : start + POINTS_PER_REQUEST]))
                self.client.delete(self.collection, selector, wait=True)

    def search(self, query: Tensor, top: int) -> list[tuple[str, float]]:
        """Rank all pages."""
        exact = self.models.SearchParams(exact=True)
        with self.convert_errors():
            found = self.client.query_points(self.collection, query.tolist(), limit=top, search_params=exact)
        return [(str(hit.id), hit.score) for hit in found.points]
