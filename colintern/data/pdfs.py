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
from typing import Any, NamedTuple

import pypdfium2 as pdfium
from PIL import Image

from colintern.data.collected import Ask, Bad, Collected, Shelf, inside, json_lines, query_fault, split_fault, torn
from colintern.data.images import BadImage, check_size, png_bytes
from colintern.data.pseudo import Text, pseudo_queries
from colintern.files.parallel import spread
from colintern.params import UserError

# Pixels an inch: an A4 page is 1,191 x 1,684, more than InternVL3.5 takes in at 12 tiles.
DPI = 144
CHUNK = 8  # pages a task: a document is opened again for each
QUERY_FILES = ("queries.csv", "queries.jsonl")
COLUMNS = ("query", "file", "page", "split")
REST = "more cells than columns"


class Task(NamedTuple):
    """Pages `first` to before `last` of a PDF, and where their images go."""

    path: Path
    name: str
    first: int
    last: int
    shelf: Shelf


class Rendered(NamedTuple):
    """A page: its name, what `Shelf.put` gave for its image, its text; or why there is none."""

    name: str
    page: Any
    text: str
    fault: str


def collect(folder: Path, shelf: Shelf) -> Collected:
    """Every page of the folder's PDFs, and the queries for them."""
    found = Collected()
    files = {path.relative_to(folder).as_posix(): path for path in pdf_files(folder)}
    outlines = {name: outline for name, path in files.items() if (outline := _outline(name, path, found)) is not None}
    counts = {name: pages for name, (pages, _) in outlines.items()}
    texts: dict[str, list[str]] = {name: [] for name in counts}
    tasks = [
        Task(files[name], name, first, min(first + CHUNK, pages), shelf)
        for name, pages in counts.items()
        for first in range(0, pages, CHUNK)
    ]
    for task, pages in zip(tasks, spread(_render, tasks, "rendering", f"{CHUNK} pages"), strict=True):
        for page in pages:
            texts[task.name].append(page.text)
            if page.fault:
                found.bad.append(Bad(page.name, page.fault, "pages"))
            else:
                found.pages[page.name] = page.page
    found.rows["pages"] += sum(counts.values())
    found.read = set(files)
    if given := _query_file(folder):
        found.read.add(given.name)
        _read_queries(folder, given, counts, found)
    else:
        documents = [Text(texts[name], outlines[name][1]) for name in counts]
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


def open_pdf(path: Path) -> pdfium.PdfDocument:
    """The document with its forms: without them, and before a page is taken, a field is drawn empty.

    Raises:
        pdfium.PdfiumError: damaged, or locked with a password.
    """
    pdf = pdfium.PdfDocument(path)
    pdf.init_forms()
    return pdf


def _name(file: str, index: int) -> str:
    return f"{file}#page={index + 1}"


def _outline(name: str, path: Path, found: Collected) -> tuple[int, list[tuple[str, int]]] | None:
    """Number of pages, and the outline's entries that point at one; None, and a bad row, if it is no readable PDF."""
    if torn(name):  # no parquet file takes it
        found.rows["pages"] += 1
        where = name.encode(errors="backslashreplace").decode()
        found.bad.append(Bad(where, "its name is not UTF-8; rename it", "pages"))
        return None
    try:
        with open_pdf(path) as pdf:
            entries = [(entry.get_title(), entry.get_dest()) for entry in pdf.get_toc()]
            targets = [(title, dest.get_index()) for title, dest in entries if dest is not None]
            return len(pdf), [(title, index) for title, index in targets if index is not None]
    except pdfium.PdfiumError as error:  # damaged, or locked with a password
        found.rows["pages"] += 1
        found.bad.append(Bad(name, f"not a readable PDF: {error}", "pages"))
        return None


def _render(task: Task) -> list[Rendered]:
    pages = []
    with open_pdf(task.path) as pdf:
        for index in range(task.first, task.last):
            name, text = _name(task.name, index), ""
            try:
                page = pdf[index]
                text = page.get_textpage().get_text_range()
                pages.append(Rendered(name, task.shelf.put(png_bytes(page_image(page))), text, ""))
            except (pdfium.PdfiumError, BadImage) as error:
                pages.append(Rendered(name, None, text, str(error)))
    return pages


def page_image(page: pdfium.PdfPage) -> Image.Image:
    """A page at `DPI`.

    Raises:
        BadImage: it would be too large.
        pdfium.PdfiumError: it cannot be rendered.
    """
    check_size(*(round(side * DPI / 72) for side in page.get_size()))
    return page.render(scale=DPI / 72).to_pil()


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
