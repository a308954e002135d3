"""Source: a folder with JSON lines and images.

Each line of its `*.jsonl` files is one page: {"image": path below the folder, "query": text or "queries": [texts]};
"split" (train, dev or test) is optional, and so are queries: such a page is only there to be confused with others.
"""

from pathlib import Path
from typing import Any

from colintern.collected import Ask, Bad, Collected, Shelf, inside, json_lines, query_fault, split_fault
from colintern.images import BadImage, standard

KEYS = {"image", "query", "queries", "split"}


def collect(folder: Path, shelf: Shelf) -> Collected:
    """Every line of the folder's JSONL files; the images go to the shelf."""
    found = Collected()
    for file in sorted(folder.glob("*.jsonl")):
        for where, row in json_lines(file, found):
            _take(folder, where, row, shelf, found)
    return found


def _take(folder: Path, where: str, row: dict[str, Any], shelf: Shelf, found: Collected) -> None:
    if unknown := row.keys() - KEYS:
        found.unknown.update(unknown)
    name, split = row.get("image"), row.get("split")
    path, fault = inside(folder, name)
    name = str(name)
    fault = fault or split_fault(split)
    if not fault and name not in found.pages:
        try:
            found.pages[name] = shelf.put(standard(path.read_bytes()))
        except BadImage as error:
            fault = f"image {name!r}: {error}"
    if fault:
        found.bad.append(Bad(where, fault))
        return
    queries = row.get("queries", [])
    queries = [*queries, *([row["query"]] if "query" in row else [])] if isinstance(queries, list) else [queries]
    if split:
        found.fixed.setdefault(name, []).append((str(split), where))
    for query in queries:
        if reason := query_fault(query):
            found.bad.append(Bad(where, reason))
        else:
            found.asks.append(Ask(query, name, "given"))
