"""Read a folder of PDFs, each page one image.

The questions are in `queries.csv` or `queries.jsonl` in the folder: query, file (path below the folder), page (from 1)
and, if wanted, split (train, dev or test). A query with several lines is answered by several pages. Pseudo-queries are
made from the PDFs' own text layer, and named so wherever their numbers appear.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

from colintern.core.errors import UserError
from colintern.core.progress import ProgressBar
from colintern.ingest import documents as docs
from colintern.ingest.documents import ImageStore, RawDocuments, resolve_within
from colintern.ingest.pdf_rendering import (
    LIMITS,
    MAX_TEXT_CHARACTERS,
    PageRef,
    RenderedPage,
    count_pages,
    group_pages,
    read_outlines,
    render_and_store_pages,
)
from colintern.ingest.pseudo_queries import DocumentText, make_pseudo_queries
from colintern.ingest.query_csv import COLUMNS, read_query_csv
from colintern.ingest.render_cache import RenderCache, RenderedPdf, fill_missing
from colintern.storage.files import irregular_type, list_files
from colintern.storage.isolation import Failure, IsolatedPool
from colintern.storage.manifest import get_digests

logger = logging.getLogger(__name__)
QUERY_FILES = ("queries.csv", "queries.jsonl")
OUTLINE, TEXT = "outline entries", "text layers"  # kinds of invalid rows that cost no page and no question


def read_pdf_folder(folder: Path, store: ImageStore) -> RawDocuments:
    """Read every page of the folder's PDFs, and the queries for them."""
    documents, query_file = RawDocuments(), _find_query_file(folder)
    files = {path.relative_to(folder).as_posix(): path for path in list_pdfs(folder)}
    render_cache = RenderCache(store.render_cache or store.folder)
    digests_of_files = get_digests().hash_files(list(files.values()))
    hashes = {name: digest["sha256"] for name, digest in zip(files, digests_of_files, strict=True)}
    pdfs = {name: render_cache.load(sha256) for name, sha256 in hashes.items()}
    loaded = {name: (pdf.outline, len(pdf.pages)) for name, pdf in pdfs.items()}
    with IsolatedPool(LIMITS) as pool:
        counts = _count_pages(files, pdfs, pool, documents)
        pdfs = {name: pdfs[name] for name in counts}
        outlines = _read_outlines(files, pdfs, pool, documents)
        for name, pdf in _store_pages(files, pdfs, render_cache.images, pool, documents):
            # A file whose hash is another one now was changed while it was read.
            if (pdf.outline, len(pdf.pages)) != loaded[name] and _has_hash(files[name], hashes[name]):
                render_cache.save(hashes[name], pdf)
    documents.read_files = set(files)
    if query_file:
        documents.read_files.add(query_file.name)
        _read_queries(folder, query_file, counts, documents)
    texts = [
        DocumentText([pdf.get_text(index) for index in range(counts[name])], outlines[name])
        for name, pdf in pdfs.items()
    ]
    names = list(counts)
    for query in make_pseudo_queries(texts):
        page_name = _name_page(names[query.document], query.page)
        if page_name in documents.pages:
            documents.add_query(query.query, page_name, query.kind)
            documents.has_pseudo_queries = True
    render_cache.prune(set(hashes.values()), pdfs.values())
    return documents


def list_pdfs(folder: Path) -> list[Path]:
    """List the PDFs below the folder, in the order of their paths; hidden files and folders are left out."""
    return list_files(folder, (".pdf",)).files


def is_query_file(path: Path) -> bool:
    """Check whether a file of a folder of PDFs holds its questions; the suffix may be in capitals."""
    return path.stem + path.suffix.lower() in QUERY_FILES


def _has_hash(file: Path, sha256: str) -> bool:
    try:
        return get_digests()(file)["sha256"] == sha256
    except OSError:  # it was deleted
        return False


def _name_page(file: str, index: int) -> str:
    return f"{file}#page={index + 1}"


def _count_pages(
    files: dict[str, Path], pdfs: dict[str, RenderedPdf], pool: IsolatedPool, documents: RawDocuments
) -> dict[str, int]:
    """Count the pages of each file; one that cannot be used counts as one invalid page."""
    counts: dict[str, int] = {}
    known = {name: pdf.count for name, pdf in pdfs.items()}
    for name, count in fill_missing(known, lambda missing: pool.map(count_pages, [[files[name]] for name in missing])):
        if docs.has_lone_surrogate(name):  # parquet files take no such text
            where = name.encode(errors="backslashreplace").decode()
            documents.reject_row(where, "its name is not UTF-8; rename it", "pages")
        elif isinstance(count, Failure):
            documents.reject_row(name, f"not a readable PDF: {count.reason}", "pages")
        else:
            counts[name] = pdfs[name].count = count
    documents.row_counts["pages"] += len(files) - len(counts) + sum(counts.values())
    return counts


def _read_outlines(
    files: dict[str, Path], pdfs: dict[str, RenderedPdf], pool: IsolatedPool, documents: RawDocuments
) -> dict[str, list[tuple[str, int]]]:
    """Read the outline entries that point at pages of their file, as (title, page from 0), by file."""
    entries: dict[str, list[tuple[str, int]]] = {}
    known = {name: pdf.outline for name, pdf in pdfs.items()}
    outlines = fill_missing(known, lambda missing: pool.map(read_outlines, [[files[name]] for name in missing]))
    for name, outline in outlines:
        if isinstance(outline, Failure):
            entries[name], errors = [], {f"{name}, outline": outline.reason}
        else:
            pdfs[name].outline, entries[name] = outline, outline.entries
            errors = {f"{name}, outline entry {number}": reason for number, reason in outline.errors.items()}
        if errors:
            documents.row_counts[OUTLINE] += len(entries[name]) + len(errors)
        for where, reason in errors.items():
            documents.reject_row(where, reason, OUTLINE)
    return entries


def _store_pages(
    files: dict[str, Path],
    pdfs: dict[str, RenderedPdf],
    images: ImageStore,
    pool: IsolatedPool,
    documents: RawDocuments,
) -> Iterator[tuple[str, RenderedPdf]]:
    """Render the pages that `pdfs` lack; yield each file when all of its pages are in `documents`."""
    known = {(name, index): pdf.pages.get(index) for name, pdf in pdfs.items() for index in range(pdf.count or 0)}
    num_missing = sum(page is None for page in known.values())
    if num_missing < len(known):
        logger.info(f"rendered before: {len(known) - num_missing} of {len(known)} pages")

    def render_missing_pages(pages: Sequence[tuple[str, int]]) -> Iterable[RenderedPage | Failure]:
        groups = group_pages(PageRef(files[name], index) for name, index in pages)
        results = pool.map(partial(render_and_store_pages, images), groups)
        return ProgressBar(results, "rendering", len(pages), unit="page", disable=not pages)

    for name, pages in groupby(fill_missing(known, render_missing_pages), lambda item: item[0][0]):
        for (_, index), page in pages:
            where = _name_page(name, index)
            if isinstance(page, Failure):
                documents.reject_row(where, page.reason, "pages")
                continue
            pdfs[name].pages[index], documents.pages[where] = page, page.image
            documents.document_of[where] = name
            if page.text.strip():
                documents.texts[where] = page.text
            if page.characters > MAX_TEXT_CHARACTERS:
                reason = f"its text has {page.characters:,} characters, of which {MAX_TEXT_CHARACTERS:,} are read"
                documents.row_counts[TEXT] = len(known)
                documents.reject_row(where, reason, TEXT)
        yield name, pdfs[name]


def _find_query_file(folder: Path) -> Path | None:
    files = sorted(filter(is_query_file, folder.iterdir()))
    if len(files) > 1:
        raise UserError(f"{folder}: has {' and '.join(path.name for path in files)}; keep one")
    if files and (kind := irregular_type(files[0])):  # without it, pseudo-queries would be made
        raise UserError(f"{files[0]}: is {kind}, not a regular file; replace or delete it")
    return files[0] if files else None


def _read_queries(folder: Path, file: Path, counts: dict[str, int], documents: RawDocuments) -> None:
    is_jsonl = file.suffix.lower() == ".jsonl"
    rows: Iterator[tuple[str, Mapping[str, Any]]] = (
        docs.read_json_lines(file, documents, "questions") if is_jsonl else read_query_csv(file, counts, documents)
    )
    resolve = cache(partial(resolve_within, folder))  # many rows name the same file
    for where, row in rows:
        documents.unknown_keys.update(str(key) for key in row.keys() - {*COLUMNS, ""})
        name, page, split = row.get("file"), "", row.get("split", "")
        error = docs.find_query_error(row.get("query"))
        try:
            path = resolve(name) if isinstance(name, str) else resolve_within(folder, name)
            page = _find_page(os.path.relpath(path, folder), str(row.get("page")), counts)
            error = error or docs.find_split_error(split)
        except ValueError as reason:
            error = error or str(reason)
        if not error and page not in documents.pages:
            error = f"page {page} could not be rendered"
        if error:
            documents.reject_row(where, error, "questions")
            continue
        documents.add_query(row["query"], page, docs.GIVEN)
        if split:
            documents.named_splits.setdefault(page, []).append((split, where))


def _find_page(file: str, page: str, counts: dict[str, int]) -> str:
    """Return the name of a row's page; raise ValueError with the reason if there is no such page."""
    if file not in counts:
        raise ValueError(f"{file} is not a readable PDF of this folder")
    # Python reads no number of more than 4,300 digits.
    if not page.isdecimal() or len(page) > 9 or not 1 <= int(page) <= counts[file]:
        raise ValueError(f"page {page!r:.40}: {file} has pages 1 to {counts[file]}")
    return _name_page(file, int(page) - 1)
