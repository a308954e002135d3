"""Open the store that a URL or a folder names."""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from colintern.core.errors import UserError
from colintern.stores.base import PageStore
from colintern.stores.lance import LanceStore
from colintern.stores.parquet import ParquetStore
from colintern.stores.qdrant import QdrantFolderStore, QdrantServerStore

FORMS = "qdrant+http://HOST:PORT/COLLECTION, qdrant+path://FOLDER/COLLECTION or lancedb://PATH[/TABLE]"
DEFAULT_TABLE, DEFAULT_PORT = "pages", 6333
NAME = re.compile(r"\w[\w.-]*")


def open_store(url: str, identity: dict[str, Any] | None = None) -> PageStore:
    """Open a store; a path without a scheme is a folder of parquet files.

    Args:
        url: see `FORMS`; https too.
        identity: of the model whose vectors are written; a missing store is created. None opens it for reading.

    Raises:
        UserError: the URL is not valid; the store is missing, cannot be reached, or was filled by another model.
    """
    scheme, separator, rest = url.partition("://")
    path = Path(rest).expanduser()
    if not separator:
        return ParquetStore(Path(url), identity)
    if scheme in ("qdrant+http", "qdrant+https"):
        return _open_server(url, identity)
    if scheme == "qdrant+path" and len(path.parts) > 1 and NAME.fullmatch(path.name):
        return QdrantFolderStore(path, identity)
    if scheme == "lancedb" and path.name:
        return LanceStore(*split_table(path), identity)
    raise UserError(f"{redact_url(url)}: names no store; it must be {FORMS}")


def _open_server(url: str, identity: dict[str, Any] | None) -> PageStore:
    try:
        parts = urlsplit(url.removeprefix("qdrant+"))
        port, collection = parts.port or DEFAULT_PORT, parts.path.strip("/")
    except ValueError:  # its message may name a password
        collection = ""
    if not NAME.fullmatch(collection) or not parts.hostname:
        raise UserError(f"{redact_url(url)}: is not valid; it must be qdrant+http://HOST:PORT/COLLECTION")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    queried = [values[0] for name, values in parse_qs(parts.query).items() if "key" in name]
    key = next(iter(queried), parts.password) or os.environ.get("QDRANT_API_KEY", "")
    return QdrantServerStore(f"{parts.scheme}://{host}:{port}", collection, key, identity)


def split_table(path: Path) -> tuple[Path, str]:
    """Split PATH[/TABLE] of a LanceDB URL into the folder and the table.

    The last part is the table if the folder before it does not exist or holds tables; else the table is "pages".
    """
    parent = path.parent
    is_table = parent != Path() and (not parent.exists() or any(parent.glob("*.lance")))
    return (parent, path.name) if is_table else (path, DEFAULT_TABLE)


def redact_url(url: str) -> str:
    """Return a URL without user, password and query, which may hold an API key."""
    scheme, separator, rest = url.partition("://")
    return scheme + separator + re.split(r"[?#]", rest)[0].rpartition("@")[2] if "+http" in scheme else url
