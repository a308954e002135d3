"""Source: a folder of PDFs, each page one image.

The questions stand in `queries.csv` or `queries.jsonl` in the folder: query, file (path below the folder), page (from
1) and, if wanted, split (train, dev or test). A query with several lines is answered by several pages. Without such a
file the PDFs' own text layer is asked: pseudo-queries, named so wherever their numbers appear.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

from colintern.core.errors import UserError
from colintern.core.progress import ProgressBar
from colintern.ingest.collected import Bad, Collected, Shelf, inside, json_lines, query_fault, split_fault, torn
from colintern.ingest.pseudo import Text, pseudo_queries
from colintern.ingest.query_table import COLUMNS, csv_rows
from colintern.ingest.rendered import RenderedPdf, RenderedStore, fill_missing
from colintern.ingest.rendering import (
    LIMITS,
    MAX_TEXT,
    PageRef,
    RenderedPage,
    count_pages,
    group_pages,
    read_outlines,
    render_and_store_pages,
)
from colintern.storage.files import irregular_type, list_files
from colintern.storage.isolation import Failure, IsolatedPool
from colintern.storage.manifest import get_digests

QUERY_FILES = ("queries.csv", "queries.jsonl")
OUTLINE, TEXT = "outline entries", "text layers"  # kinds of bad rows that cost no page and no question


def collect(folder: Path, shelf: Shelf) -> Collected:
    """Every page of the folder's PDFs, and the queries for them."""
    found = Collected()
    files = {path.relative_to(folder).as_posix(): path for path in pdf_files(folder)}
    store = RenderedStore(shelf.rendered or shelf.folder)
    hashed = zip(files, get_digests().hash_files(list(files.values())), strict=True)
    hashes = {name: digest["sha256"] for name, digest in hashed}
    documents = {name: store.load(sha256) for name, sha256 in hashes.items()}
    loaded = {name: (pdf.outline, len(pdf.pages)) for name, pdf in documents.items()}
    with IsolatedPool(LIMITS) as pool:
        counts = _count_pages(files, documents, pool, found)
        documents = {name: documents[name] for name in counts}
        outlines = _read_outlines(files, documents, pool, found)
        for name, pdf in _store_pages(files, documents, store.shelf, pool, found):
            # A file whose hash is another one now was changed while it was read.
            if (pdf.outline, len(pdf.pages)) != loaded[name] and _has_hash(files[name], hashes[name]):
                store.save(hashes[name], pdf)
    found.read = set(files)
    if given := _query_file(folder):
        found.read.add(given.name)
        _read_queries(folder, given, counts, found)
    else:
        texts = [
            Text([document.get_text(index) for index in range(counts[name])], outlines[name])
            for name, document in documents.items()
        ]
        names = list(counts)
        for query in pseudo_queries(texts):
            page_name = _name(names[query.document], query.page)
            if page_name in found.pages:
                found.add_query(query.query, page_name, query.kind)
    store.prune(set(hashes.values()), documents.values())
    return found


def _has_hash(file: Path, sha256: str) -> bool:
    try:
        return get_digests()(file)["sha256"] == sha256
    except OSError:  # it was deleted
        return False


def pdf_files(folder: Path) -> list[Path]:
    """The PDFs below the folder, in the order of their paths; hidden files and folders are left out."""
    return list_files(folder, (".pdf",)).files


def is_query_file(path: Path) -> bool:
    """Tell whether a file of a folder of PDFs is the one that holds the questions; its suffix may be in capitals."""
    return path.stem + path.suffix.lower() in QUERY_FILES


def _name(file: str, index: int) -> str:
    return f"{file}#page={index + 1}"


def _count_pages(
    files: dict[str, Path], documents: dict[str, RenderedPdf], pool: IsolatedPool, found: Collected
) -> dict[str, int]:
    """Count the pages of each file; one that cannot be used counts as one bad page."""
    counts: dict[str, int] = {}
    known = {name: document.count for name, document in documents.items()}
    for name, count in fill_missing(known, lambda missing: pool.map(count_pages, [[files[name]] for name in missing])):
        if torn(name):  # no parquet file takes it
            where = name.encode(errors="backslashreplace").decode()
            found.bad.append(Bad(where, "its name is not UTF-8; rename it", "pages"))
        elif isinstance(count, Failure):
            found.bad.append(Bad(name, f"not a readable PDF: {count.reason}", "pages"))
        else:
            counts[name] = documents[name].count = count
    found.rows["pages"] += len(files) - len(counts) + sum(counts.values())
    return counts


def _read_outlines(
    files: dict[str, Path], documents: dict[str, RenderedPdf], pool: IsolatedPool, found: Collected
) -> dict[str, list[tuple[str, int]]]:
    """Read the outline entries that point at pages of their file, as (title, page from 0), by file."""
    outlines: dict[str, list[tuple[str, int]]] = {}
    known = {name: document.outline for name, document in documents.items()}
    for name, outline in fill_missing(
        known, lambda missing: pool.map(read_outlines, [[files[name]] for name in missing])
    ):
        if isinstance(outline, Failure):
            outlines[name], faults = [], {f"{name}, outline": outline.reason}
        else:
            documents[name].outline, outlines[name] = outline, outline.entries
            faults = {f"{name}, outline entry {number}": reason for number, reason in outline.faults.items()}
        if faults:
            found.rows[OUTLINE] += len(outlines[name]) + len(faults)
        found.bad += [Bad(where, reason, OUTLINE) for where, reason in faults.items()]
    return outlines


def _store_pages(
    files: dict[str, Path], documents: dict[str, RenderedPdf], shelf: Shelf, pool: IsolatedPool, found: Collected
) -> Iterator[tuple[str, RenderedPdf]]:
    """Put the pages of each file into `found` and `documents`; yield each file when all of its pages are there."""
    known = {
        (name, index): document.pages.get(index)
        for name, document in documents.items()
        for index in range(document.count or 0)
    }
    missing = sum(page is None for page in known.values())
    if missing < len(known):
        print(f"rendered before: {len(known) - missing} of {len(known)} pages")

    def render_missing_pages(pages: Sequence[tuple[str, int]]) -> Iterable[RenderedPage | Failure]:
        groups = group_pages(PageRef(files[name], index) for name, index in pages)
        results = pool.map(partial(render_and_store_pages, shelf), groups)
        return ProgressBar(results, "rendering", len(pages), unit="page", disable=not pages)

    for name, pages in groupby(fill_missing(known, render_missing_pages), lambda item: item[0][0]):
        document = documents[name]
        for (_, index), page in pages:
            where = _name(name, index)
            if isinstance(page, Failure):
                found.bad.append(Bad(where, page.reason, "pages"))
                continue
            document.pages[index], found.pages[where] = page, page.image
            if page.characters > MAX_TEXT:
                cut = f"its text has {page.characters:,} characters, of which {MAX_TEXT:,} are read"
                found.rows[TEXT] = len(known)
                found.bad.append(Bad(where, cut, TEXT))
        yield name, document


def _query_file(folder: Path) -> Path | None:
    found = sorted(filter(is_query_file, folder.iterdir()))
    if len(found) > 1:
        raise UserError(f"{folder}: has {' and '.join(path.name for path in found)}; keep one")
    if found and (kind := irregular_type(found[0])):  # without it, the PDFs' own text would be asked
        raise UserError(f"{found[0]}: is {kind}, not a regular file; replace or delete it")
    return found[0] if found else None


def _read_queries(folder: Path, file: Path, counts: dict[str, int], found: Collected) -> None:
    is_jsonl = file.suffix.lower() == ".jsonl"
    rows = json_lines(file, found, "questions") if is_jsonl else csv_rows(file, counts, found)
    locate = cache(partial(inside, folder))  # many rows name the same file
    for where, row in rows:
        if unknown := row.keys() - set(COLUMNS):
            found.unknown.update(map(str, unknown - {""}))
        file_name = row.get("file")
        path, fault = locate(file_name) if isinstance(file_name, str) else inside(folder, file_name)
        name, fault = ("", fault) if fault else _page(os.path.relpath(path, folder), row.get("page"), counts)
        fault = query_fault(row.get("query")) or fault or split_fault(row.get("split", ""))
        if not fault and name not in found.pages:
            fault = f"page {name} could not be rendered"
        if fault:
            found.bad.append(Bad(where, fault, "questions"))
            continue
        found.add_query(row["query"], name, "given")
        if row.get("split"):
            found.fixed.setdefault(name, []).append((row["split"], where))


def _page(file: str, page: Any, counts: dict[str, int]) -> tuple[str, str]:
    """The name of a row's page, and what is wrong with it ("" if nothing)."""
    page = str(page)
    if file not in counts:
        return "", f"{file} is not a readable PDF of this folder"
    # Python reads no number of more than 4,300 digits.
    if not page.isdecimal() or len(page) > 9 or not 1 <= int(page) <= counts[file]:
        return "", f"page {page!r:.40}: {file} has pages 1 to {counts[file]}"
    return _name(file, int(page) - 1), ""
