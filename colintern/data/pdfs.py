"""Source: a folder of PDFs, each page one image.

The questions stand in `queries.csv` or `queries.jsonl` in the folder: query, file (path below the folder), page (from
1) and, if wanted, split (train, dev or test). A query with several lines is answered by several pages. Without such a
file the PDFs' own text layer is asked: pseudo-queries, named so wherever their numbers appear.
"""

import csv
import io
import os
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from colintern.data.collected import Ask, Bad, Collected, Shelf, inside, json_lines, query_fault, split_fault, torn
from colintern.data.pseudo import Text, pseudo_queries
from colintern.data.rendering import (
    LIMITS,
    PageRef,
    Rendered,
    count_pages,
    group_pages,
    read_outlines,
    render_pages,
)
from colintern.files.isolation import IsolatedPool, Lost
from colintern.params import UserError

QUERY_FILES = ("queries.csv", "queries.jsonl")
COLUMNS = ("query", "file", "page", "split")
OUTLINE, TEXT = "outline entries", "text layers"  # kinds of bad rows that cost no page and no question
REST = "more cells than columns"


def collect(folder: Path, shelf: Shelf) -> Collected:
    """Every page of the folder's PDFs, and the queries for them."""
    found = Collected()
    files = {path.relative_to(folder).as_posix(): path for path in pdf_files(folder)}
    with IsolatedPool(LIMITS) as pool:
        counts = _count(files, pool, found)
        outlines = _read_outlines({name: files[name] for name in counts}, pool, found)
        texts = _render({name: (files[name], pages) for name, pages in counts.items()}, shelf, pool, found)
    found.read = set(files)
    if given := _query_file(folder):
        found.read.add(given.name)
        _read_queries(folder, given, counts, found)
    else:
        documents = [Text(texts[name], outlines[name]) for name in counts]
        names = list(counts)
        for query in pseudo_queries(documents):
            page_name = _name(names[query.document], query.page)
            if page_name in found.pages:
                found.asks.append(Ask(query.query, page_name, query.kind))
    return found


def pdf_files(folder: Path) -> list[Path]:
    """The PDFs below the folder, in the order of their paths; hidden files and folders are left out."""
    paths = (p for p in folder.rglob("*") if p.suffix.lower() == ".pdf" and p.is_file())
    return sorted(p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _name(file: str, index: int) -> str:
    return f"{file}#page={index + 1}"


def _count(files: dict[str, Path], pool: IsolatedPool, found: Collected) -> dict[str, int]:
    """Number of pages of each file; one that is no readable PDF is a bad page."""
    good = {name: path for name, path in files.items() if not torn(name)}  # no parquet file takes such a name
    counts = dict(zip(good, pool.map(count_pages, [[path] for path in good.values()]), strict=True))
    for name in files:
        count = counts.get(name, 0)
        if isinstance(count, Lost):
            found.bad.append(Bad(name, f"not a readable PDF: {counts.pop(name).reason}", "pages"))
        elif name not in good:
            where = name.encode(errors="backslashreplace").decode()
            found.bad.append(Bad(where, "its name is not UTF-8; rename it", "pages"))
    found.rows["pages"] += len(files) - len(counts) + sum(counts.values())
    return counts


def _read_outlines(files: dict[str, Path], pool: IsolatedPool, found: Collected) -> dict[str, list[tuple[str, int]]]:
    """The (title, page from 0) of the entries that point at pages of their file, by file."""
    outlines = {}
    outcomes = pool.map(read_outlines, [[path] for path in files.values()])
    for name, outline in zip(files, outcomes, strict=True):
        lost = isinstance(outline, Lost)
        outlines[name] = [] if lost else outline.entries
        faults = [("", outline.reason)] if lost else [(f" entry {number}", reason) for number, reason in outline.faults]
        if faults:
            found.rows[OUTLINE] += len(outlines[name]) + len(faults)
        found.bad += [Bad(f"{name}, outline{entry}", reason, OUTLINE) for entry, reason in faults]
    return outlines


def _render(
    files: dict[str, tuple[Path, int]], shelf: Shelf, pool: IsolatedPool, found: Collected
) -> dict[str, list[str]]:
    """Put the pages of each file, given with their number, into `found`; the texts of the pages, by file."""
    texts: dict[str, list[str]] = {name: [] for name in files}
    places = [(name, index) for name, (_, pages) in files.items() for index in range(pages)]
    groups = group_pages(PageRef(files[name][0], index, shelf) for name, index in places)
    outcomes = tqdm(pool.map(render_pages, groups), "rendering", len(places), unit="page", disable=None)
    for (name, index), page in zip(places, outcomes, strict=True):
        if isinstance(page, Lost):
            page = Rendered(page, "", "")
        if isinstance(page.image, Lost):
            found.bad.append(Bad(_name(name, index), page.image.reason, "pages"))
        else:
            found.pages[_name(name, index)] = page.image
        if page.text_fault:
            found.rows[TEXT] = len(places)
            found.bad.append(Bad(_name(name, index), page.text_fault, TEXT))
        texts[name].append(page.text)
    return texts


def _query_file(folder: Path) -> Path | None:
    found = [folder / name for name in QUERY_FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder}: has {' and '.join(QUERY_FILES)}; keep one")
    return found[0] if found else None


def _read_queries(folder: Path, file: Path, counts: dict[str, int], found: Collected) -> None:
    rows = json_lines(file, found, "questions") if file.suffix == ".jsonl" else _csv_rows(file, counts, found)
    for where, row in rows:
        if unknown := row.keys() - set(COLUMNS):
            found.unknown.update(map(str, unknown - {""}))
        name, fault = _page(folder, row, counts)
        fault = query_fault(row.get("query")) or fault or split_fault(row.get("split", ""))
        if not fault and name not in found.pages:
            fault = f"page {name} could not be rendered"
        if fault:
            found.bad.append(Bad(where, fault, "questions"))
            continue
        found.asks.append(Ask(row["query"], name, "given"))
        if row.get("split"):
            found.fixed.setdefault(name, []).append((row["split"], where))


def _csv_rows(file: Path, pdfs: Container[str], found: Collected) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = file.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8: {error}; from Excel, save it as CSV UTF-8") from error
    head = text.partition("\n")[0]
    comma = ";" if head.count(";") > head.count(",") else ","  # Excel's, where numbers have decimal commas
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey=REST, delimiter=comma, strict=True)
    first = 1
    try:
        _check_header(file, list(reader.fieldnames or []))
        first = reader.line_num + 1
        for row in reader:
            # A stray quote takes in the rows up to the next one, without an error where a comma follows that.
            if any(cell in pdfs for line in _further_lines(row, comma) for cell in line):
                raise csv.Error("one of its cells holds whole rows")
            cells = [*(cell for key, cell in row.items() if key != REST), *row.get(REST, [])]
            if any(cell and cell.strip() for cell in cells):  # else what a spreadsheet writes for an empty line
                found.rows["questions"] += 1
                yield f"{file.name}:{reader.line_num}", row
            first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{file}: the row that begins in line {first}: {error}; a quote in a quoted cell must be doubled, and one "
            f"that begins a cell must be closed"
        ) from error


def _further_lines(row: dict[str, Any], comma: str) -> Iterator[list[str]]:
    """The lines of the cells that have several, read as rows."""
    for cell in row.values():
        if isinstance(cell, str) and len(lines := cell.splitlines()) > 1:
            yield from csv.reader(lines, delimiter=comma)


def _check_header(file: Path, header: list[str]) -> None:
    if lacking := [name for name in COLUMNS[:3] if name not in header]:
        raise UserError(
            f"{file}: has no column {', '.join(lacking)}; its first line is {header!r:.200}, it must name "
            f"{', '.join(COLUMNS)}"
        )
    if twice := [name for name in COLUMNS if header.count(name) > 1]:
        raise UserError(f"{file}: has the column {twice[0]} {header.count(twice[0])} times; it must have it once")


def _page(folder: Path, row: dict[str, Any], counts: dict[str, int]) -> tuple[str, str]:
    """The name of a row's page, and what is wrong with it ("" if nothing)."""
    file, page = row.get("file"), str(row.get("page"))
    path, fault = inside(folder, file)
    if fault:
        return "", fault
    file = os.path.relpath(path, folder)  # ./a.pdf is a.pdf
    if file not in counts:
        return "", f"{file} is not a readable PDF of this folder"
    # Python reads no number of more than 4,300 digits.
    if not page.isdecimal() or len(page) > 9 or not 1 <= int(page) <= counts[file]:
        return "", f"page {page!r:.40}: {file} has pages 1 to {counts[file]}"
    return _name(file, int(page) - 1), ""
