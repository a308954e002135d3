"""Source: a folder with JSON lines and images.

Each line of its `*.jsonl` files is one page: {"image": path below the folder, "query": text or "queries": [texts]};
"split" (train, dev or test) is optional, and so are queries: such a page is only there to be confused with others.
"""

import os
from pathlib import Path
from typing import Any

from colintern.data.images import BadImage, standard
from colintern.ingest.collected import Bad, Collected, Shelf, Stored, inside, json_lines, query_fault, split_fault
from colintern.storage.files import list_files
from colintern.storage.parallel import parallel_map

KEYS = {"image", "query", "queries", "split"}


def collect(folder: Path, shelf: Shelf) -> Collected:
    """Every line of the folder's JSONL files; the images go to the shelf."""
    found = Collected()
    files = line_files(folder)
    rows = [line for file in files for line in json_lines(file, found)]
    named = {row["image"] for _, row in rows if isinstance(row.get("image"), str)}
    places = {name: inside(folder, name) for name in sorted(named)}
    paths = {name: path for name, (path, fault) in places.items() if not fault}
    found.read = {os.path.relpath(path, folder) for path in (*files, *paths.values())}
    tasks = [(path, shelf) for path in paths.values()]
    stored = dict(zip(paths, parallel_map(_store, tasks, "reading images", "page"), strict=True))
    for where, row in rows:
        name = row.get("image")
        fault = places[name][1] if isinstance(name, str) else inside(folder, name)[1]
        _take(where, row, fault, stored, found)
    found.bad.sort(key=lambda bad: (bad.where.rpartition(":")[0], int(bad.where.rpartition(":")[2])))
    return found


def line_files(folder: Path) -> list[Path]:
    """The JSONL files of the folder, hidden ones left out: macOS puts a `._rows.jsonl` beside each on other disks."""
    return list_files(folder, (".jsonl",), recursive=False).files


def _store(task: tuple[Path, Shelf]) -> Stored | str:
    """The image on the shelf, or why there is none."""
    path, shelf = task
    try:
        data = standard(path.read_bytes())
    except (BadImage, OSError) as error:
        return str(error)
    return shelf.put(data)  # a full disk is no fault of the page


def _take(where: str, row: dict[str, Any], fault: str, stored: dict[str, Stored | str], found: Collected) -> None:
    """Put one row's page and queries into `found`, or its faults; `fault`: that of the name of its image."""
    found.unknown.update(row.keys() - KEYS)
    name, split = row.get("image"), row.get("split")
    fault = fault or split_fault(split)
    page = "" if fault else stored[str(name)]
    if isinstance(page, str):
        found.bad.append(Bad(where, fault or f"image {name!r}: {page}"))
        return
    found.pages.setdefault(str(name), page)
    queries = row.get("queries", [])
    queries = [*(queries if isinstance(queries, list) else [queries]), *([row["query"]] if "query" in row else [])]
    if split:
        found.fixed.setdefault(str(name), []).append((str(split), where))
    for query in queries:
        if reason := query_fault(query):
            found.bad.append(Bad(where, reason))
        else:
            found.add_query(query, str(name), "given")
