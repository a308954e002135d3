"""Read a folder with JSON lines and images.

Each line of its `*.jsonl` files is one page: {"image": path below the folder, "query": text or "queries": [texts]}.
"split" (train, dev or test) is optional, and so are queries: a page without one is only ranked against the others.
"""

import os
from pathlib import Path

from colintern.data.images import InvalidImageError, normalize_image_bytes
from colintern.ingest.documents import (
    GIVEN,
    ImageStore,
    RawDocuments,
    StoredImage,
    find_query_error,
    find_split_error,
    read_json_lines,
    resolve_within,
)
from colintern.storage.files import list_files
from colintern.storage.parallel import parallel_map

KEYS = {"image", "query", "queries", "split"}


def read_jsonl_folder(folder: Path, store: ImageStore) -> RawDocuments:
    """Read every line of the folder's JSONL files and put the images into `store`."""
    documents = RawDocuments()
    files = list_jsonl_files(folder)
    rows = [row for file in files for row in read_json_lines(file, documents)]
    images: dict[str, StoredImage | str] = {}  # by name; a text is the reason why there is none
    paths = {}
    for name in sorted({name for _, row in rows if isinstance(name := row.get("image"), str)}):
        try:
            paths[name] = resolve_within(folder, name)
        except ValueError as error:
            images[name] = str(error)
    documents.read_files = {os.path.relpath(path, folder) for path in (*files, *paths.values())}
    stored = parallel_map(_store_image, [(path, store) for path in paths.values()], "reading images", "page")
    for name, image in zip(paths, stored, strict=True):
        images[name] = f"image {name!r}: {image}" if isinstance(image, str) else image
    for where, row in rows:
        _add_row(where, row, images, documents)
    documents.invalid_rows.sort(key=lambda row: (row.where.rpartition(":")[0], int(row.where.rpartition(":")[2])))
    return documents


def list_jsonl_files(folder: Path) -> list[Path]:
    """List the folder's JSONL files, hidden ones left out: macOS puts a `._rows.jsonl` beside each on other disks."""
    return list_files(folder, (".jsonl",), recursive=False).files


def _store_image(task: tuple[Path, ImageStore]) -> StoredImage | str:
    """Store an image, or return the reason why it cannot be used."""
    path, store = task
    try:
        data = normalize_image_bytes(path.read_bytes())
    except (InvalidImageError, OSError) as error:
        return str(error)
    return store.put(data)  # a full disk is not a fault of the page


def _add_row(where: str, row: dict[str, object], images: dict[str, StoredImage | str], documents: RawDocuments) -> None:
    documents.unknown_keys.update(row.keys() - KEYS)
    name, split = row.get("image"), row.get("split")
    image = images[name] if isinstance(name, str) else f"names no file: {name!r}"
    error = image if isinstance(image, str) else find_split_error(split)
    if error or isinstance(image, str):
        documents.reject_row(where, error)
        return
    documents.pages.setdefault(str(name), image)
    if split:
        documents.named_splits.setdefault(str(name), []).append((str(split), where))
    queries = row.get("queries", [])
    for query in [*(queries if isinstance(queries, list) else [queries]), *([row["query"]] if "query" in row else [])]:
        if error := find_query_error(query):
            documents.reject_row(where, error)
        else:
            documents.add_query(query, str(name), GIVEN)
